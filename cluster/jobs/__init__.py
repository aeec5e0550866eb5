"""Runs as jobs of a Ray cluster: submission through the job server, and a supervisor that submits them again."""
