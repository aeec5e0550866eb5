"""Storage backends: local file systems and object stores, with retries."""
