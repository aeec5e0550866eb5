"""Metrics trackers."""
