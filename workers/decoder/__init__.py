"""The decoder: a pre-norm Transformer assembled from parts, and the checkpoints it is loaded from."""
