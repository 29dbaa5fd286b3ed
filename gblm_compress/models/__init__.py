"""Finding, checking and loading models; their layers, and the manifest of a pruned or exported folder."""
