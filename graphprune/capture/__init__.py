"""From a module to a program, by torch.export."""
