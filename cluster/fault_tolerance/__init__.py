"""Failures: detection, causes, restart policy."""
