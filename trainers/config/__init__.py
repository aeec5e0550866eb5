"""Settings of a training run: pydantic models, one module for each block of the run file."""
