"""Triton kernels, and what launches them. Each computes what its PyTorch twin does, which says what that is.

| kernel | twin |
|---|---|
| selection of regions | `gazepatch.selection` |
| attention of a decode step | `gazepatch.ops.decode` |
| attention of a prompt's routed queries, forward and backward | `gazepatch.ops.prefill` |
| means of windows | `gazepatch.chunk.Chunk.means` |

`plan` decides what a decode step launches, `ops` and `routed` are the launches as operators of torch, `settings` their
block sizes and numbers of programs, and `launch` and `repeated` how one is made, and made again. `device` holds the
code that runs on the GPU.
"""
