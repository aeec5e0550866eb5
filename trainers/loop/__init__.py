"""The exact step loop."""
