"""Restoring: verified reads of a checkpoint into a model and its optimizer."""
