"""Finding, checking and loading models; their layers, and the manifest of what was done to them."""
