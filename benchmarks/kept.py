"""The results file: rows are kept as they come, so that a run that is cut short goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

#: Tables that do not depend on the kernels, and stay good when these change.
OF_OTHERS = ("triad", "dense", "few_dense")


class Kept:
    """Rows by table, of one machine, in `decode_gpu.json` and, to be read, `decode_gpu.txt`.

    A file of another machine, or of other versions, is not gone on with: it is put aside under another name. When the
    kernels have changed since, it is put aside as well, and only the tables that do not depend on them are taken over.

    Args:
        folder: Where the files are; made if it is not there.
        machine: What figures depend on.
        kernels: `kernels_digest`.
        anew: Put aside whatever is there.
        derived: Tables that follow from the rows, for the text.
    """

    def __init__(
        self,
        folder: Path,
        machine: Row,
        kernels: str,
        anew: bool = False,
        derived: Callable[[dict[str, list[Row]]], dict[str, list[Row]]] = lambda tables: {},
    ) -> None:
        self.path, self.machine, self.kernels, self.derived = folder / "decode_gpu.json", machine, kernels, derived
        self.tables: dict[str, list[Row]] = {}
        self.said: str | None = None
        if not self.path.exists():
            return
        held = json.loads(self.path.read_text(encoding="utf-8"))
        if anew:
            self.said = f"starting anew: the results that were there are now {self._put_aside()}"
        elif differing := sorted(name for name in machine.keys() | held["machine"] if self._differs(held, name)):
            was, now = ({name: of.get(name) for name in differing} for of in (held["machine"], machine))
            self.said = f"the results that were there are of {was}, this is {now}: they are now {self._put_aside()}"
        elif held["kernels"] != kernels:
            self.tables = {name: rows for name, rows in held["tables"].items() if name in OF_OTHERS}
            if self.tables.keys() != held["tables"].keys():
                self.said = f"the kernels have changed: what they measured until now is in {self._put_aside()}"
        else:
            self.tables = held["tables"]

    def _differs(self, held: dict[str, Row], name: str) -> bool:
        return held["machine"].get(name) != self.machine.get(name)

    def _put_aside(self) -> Path:
        number = 1
        while (aside := self.path.with_name(f"decode_gpu.before-{number}.json")).exists():
            number += 1
        self.path.rename(aside)
        if (text := self.path.with_suffix(".txt")).exists():
            text.rename(aside.with_suffix(".txt"))
        return aside

    def has(self, table: str, key: Row) -> Row | None:
        """The row with this key."""
        return row_of(self.tables.get(table, ()), **key)

    def add(self, table: str, key: Row, found: Row) -> Row:
        """Keep a row in the place of the one with this key; it says which GPU it is of."""
        row = key | found | {"gpu": self.machine["gpu"]}
        rows = self.tables.setdefault(table, [])
        if (before := self.has(table, key)) is not None:
            rows[rows.index(before)] = row
        else:
            rows.append(row)
        self.write()
        return row

    def write(self) -> None:
        """Write what there is so far; a cut at any moment leaves whole files."""
        figures = {"machine": self.machine, "kernels": self.kernels, "tables": self.tables}
        shown = {"machine": [self.machine], **self.tables, **self.derived(self.tables)}
        text = "\n\n".join(f"{name}\n{table(rows)}" for name, rows in shown.items() if rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for path, content in ((self.path, json.dumps(figures, indent=1)), (self.path.with_suffix(".txt"), text)):
            partial = path.with_name(f"{path.name}.partial")
            partial.write_text(content + "\n", encoding="utf-8")
            partial.replace(path)


def row_of(rows: Iterable[Row], **key: Any) -> Row | None:
    """The row with these columns."""
    return next((row for row in rows if all(row.get(name) == value for name, value in key.items())), None)


def kernels_digest(package: Path) -> str:
    """Of the code in `gazepatch/kernels`, the launch settings among it."""
    digest = hashlib.sha256()
    for path in sorted((package / "kernels").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def table(rows: list[Row], without: Collection[str] = ("gpu",)) -> str:
    """Plain aligned columns, without those that hold tables of their own. Rows may lack some."""
    heads = list(dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, dict)))
    if len(rows) > 1:
        heads = [head for head in heads if head not in without]
    cells = [heads, *([_cell(row.get(head)) for head in heads] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    lines = ("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
