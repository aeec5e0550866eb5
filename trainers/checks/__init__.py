"""Checks before training: of the settings, of a resume, of memory."""
