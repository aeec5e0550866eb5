"""What is displayed of a run: its timeline, goodput, status, terminal panel, HTML report and model card.

Everything is computed from the run's storage, so it works after the cluster is gone. Nothing here changes a run.
"""
