"""The on-disk format: names and paths, manifests, safetensors files."""
