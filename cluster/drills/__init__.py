"""Runs with injected faults, compared bit by bit with undisturbed ones: `outlast demo` and `outlast drill`."""
