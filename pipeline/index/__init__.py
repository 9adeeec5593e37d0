"""The cosine index: build, save, load, search."""
