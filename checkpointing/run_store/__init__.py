"""A run's directory: claims, catalog, journal, pins, retention."""
