"""Models: building, adapters, merging, names of weights, export."""
