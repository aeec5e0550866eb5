"""Restoring: verified reads into a model and its optimizer."""
