"""The format on disk: names, manifests, safetensors."""
