"""Preparation of data: encoded once, cached on each node."""
