"""Images: names, registries, pulling, unpacking, and what of it is kept."""
