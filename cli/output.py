"""How commands print: JSON for programs, and tables for people."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs to read.")


def quiet() -> None:
    """Keep what transformers and the Hub's client say off stderr: hints, and bars that no person is there to see."""
    import transformers

    transformers.utils.logging.set_verbosity_error()  # hints about settings that nobody here has chosen
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()  # the bars of the Hub's client as well


def print_json(value: object) -> None:
    """One JSON value; dataclasses become objects."""
    click.echo(json.dumps(plain(value), indent=2))


def plain(value: Any) -> Any:
    """The same value in what JSON can hold. Infinities and NaN become null: JSON has no word for them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns as wide as their widest cell."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@contextmanager
def bar_of(name: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for what takes longer than two seconds, if a person is there to see it.

    Gives the function to call with what is done, in `unit`, and what there is to do.
    """
    from tqdm.auto import tqdm  # type: ignore[import-untyped,unused-ignore]

    with tqdm(desc=name, unit=unit, unit_scale=True, delay=2, disable=None, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
