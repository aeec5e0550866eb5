"""outlast.k8s: plain YAML, filled in by `outlast.cluster.manifests`. A package only so that installed code finds it."""
