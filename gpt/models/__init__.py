"""The model families, one a file, on shared layers and attention."""
