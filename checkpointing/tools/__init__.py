"""Implementation of the `outlast checkpoints` commands, and seals for other trainers."""
