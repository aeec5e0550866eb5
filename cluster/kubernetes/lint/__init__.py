"""Lint of manifests, without a cluster: each module holds the rules of one topic, `linter.py` runs them. All pure."""
