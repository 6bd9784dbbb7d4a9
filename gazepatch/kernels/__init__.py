"""Triton kernels of the gaze decode path. Their PyTorch twins are in `gazepatch.ops`, which says what they compute."""
