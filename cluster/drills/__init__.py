"""Fault drills: the demo and the drill."""
