"""Lint rules for manifests."""
