"""Preparation of data: rows encoded to samples once, and cached on each machine."""
