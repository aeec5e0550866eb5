"""The driver: one launch, from the run file to the end."""
