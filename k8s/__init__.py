"""outlast.k8s: plain YAML that `outlast.cluster.kubernetes.render` fills in. A package, so that installs find it."""
