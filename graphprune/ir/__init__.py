"""The program: graphs over named tensors, what their nodes compute and cost."""
