"""Settings of a run from a run file, starter run files, and references to runs on the command line."""
