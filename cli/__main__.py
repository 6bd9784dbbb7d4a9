"""`python -m gazepatch.cli`."""

from gazepatch.cli import main

main(prog_name="gazepatch")
