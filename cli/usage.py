"""Settings and arguments that are wrong are bad usage of a command, whoever finds out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from gazepatch.errors import ConfigError


@contextmanager
def bad_usage() -> Iterator[None]:
    """Turn a ConfigError into a usage error of the running command."""
    try:
        yield
    except ConfigError as error:
        raise click.UsageError(str(error), click.get_current_context()) from error
