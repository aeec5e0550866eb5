"""Snapshots of a sharded training in the shared memory of its nodes, which outlives the processes."""
