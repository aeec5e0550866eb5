"""Tasks: how rows are encoded, the loss, the scores and the predictions."""
