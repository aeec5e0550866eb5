"""Checks before any resources are allocated: `validate` of a run file, `plan` of a run, `doctor` of a cluster."""
