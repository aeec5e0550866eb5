"""Distributed training: the world of ranks, reductions in a fixed order, FSDP, seeds."""
