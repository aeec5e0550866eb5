"""Checks before training: preflight, resume, memory."""
