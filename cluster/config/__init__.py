"""Run files and references to runs."""
