"""Kubernetes manifests: rendering, applying, reading."""
