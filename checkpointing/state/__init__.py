"""The state of training: weights, optimizer state, shards, and the group of ranks that holds them."""
