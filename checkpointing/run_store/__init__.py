"""The directory of a run: claims, catalog, journals, pins, retention."""
