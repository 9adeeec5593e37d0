"""One small module an architecture: how its config and its weight names map onto our parts."""
