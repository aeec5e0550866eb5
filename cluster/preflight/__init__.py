"""Checks before any resources are allocated: validate, estimate, doctor."""
