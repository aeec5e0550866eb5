"""What the command line does with checkpoints: query, diff, pin, prune, export."""
