"""The command `gazepatch`. Every command has a module of its own, imported when it is called; see `cli/group.py`."""

from gazepatch.cli.group import main

__all__ = ["main"]
