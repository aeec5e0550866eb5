"""Tasks: what is encoded, the loss, and the scores."""
