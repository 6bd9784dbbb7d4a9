"""A demonstration that needs no model hub: a stock LLaVA with a real pretrained language model reads a printed page.

What stands in for a trained vision encoder is said in `gazepatch.demo.checkpoint`.
"""
