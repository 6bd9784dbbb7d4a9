"""Training: context tokens, LoRA or the whole model learn to read few regions as well as dense attention reads all.

`gazepatch.train` is the door; it runs on transformers' `Trainer`.
"""
