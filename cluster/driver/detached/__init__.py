"""A launch whose workers outlive its driver: the actor that runs them, and drivers that attach to it."""
