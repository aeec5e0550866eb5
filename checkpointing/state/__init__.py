"""The state of a training: weights, optimizer state, shards, and the group of ranks that holds them."""
