"""Models: built, adapted, merged, named."""
