"""Attention of a decode step and of a prompt in plain PyTorch, and the choice between that and the kernels."""
