"""Process groups, deterministic reductions, FSDP."""
