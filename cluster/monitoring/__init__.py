"""What is shown of a run: timeline, status, goodput."""
