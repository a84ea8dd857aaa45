"""Training a program: data, loop, losses, checkpoints."""
