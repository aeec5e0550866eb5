"""Saving: staging, background writes, the commit."""
