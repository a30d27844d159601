"""What a long run needs around the algorithm: set-up, guards, checkpoints, curves."""
