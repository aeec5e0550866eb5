"""The YAML templates that `outlast.cluster.kubernetes.render` fills in, as package data. It must hold no code."""
