"""Records of a training: conversations about images, out of JSON lines, a JSON list, or a set of `datasets`.

Two forms are read: `{"messages": [{"role", "content"}], "images": [...]}`, and LLaVA's
`{"conversations": [{"from", "value"}], "image": ...}`. Content is a string, with `<image>` where an image is, or a list
of `{"type": "text", "text": ...}` and `{"type": "image"}`; images without a place go before the first question.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gazepatch.errors import TrainingError
from gazepatch.training.conversation import Record, record

SUFFIXES = (".jsonl", ".json")
Check = Callable[[Record], object]


@dataclass(frozen=True)
class Records:
    """All records, each read when it is asked for.

    Attributes:
        name: Of the data.
        digest: Changes when they do.
        count: How many there are.
        get: Makes one, by its number.
    """

    name: str
    digest: str
    count: int
    get: Callable[[int], Record]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Record:
        if not 0 <= number < self.count:
            raise IndexError(number)
        return self.get(number)


def read_records(data: str | Path, check: Check = lambda record: None) -> Records:
    """The records of a file, of a folder with one file, or of a set on the Hub.

    `check` is called with every record of a file, and with the first of a set on the Hub: it may refuse them.

    Raises:
        TrainingError: There are none, or one is broken; the message names its line.
    """
    path = Path(data)
    if path.is_dir():
        path = _only_file(path)
    if path.is_file():
        records = _of_file(path, check)
    elif path.suffix in SUFFIXES or path.is_absolute():
        raise TrainingError(f"expected a file of records, got nothing at {path}")
    else:
        records = _of_hub(str(data), check)
    if not len(records):
        raise TrainingError(f"expected records, got none in {data}")
    return records


def lack_of_images(records: Records) -> str | None:
    """What to say of records of which none has an image, so that nothing gazes; None if one has."""
    if any(records[number].images for number in range(len(records))):
        return None
    first = records[0]
    return (
        f"no record of {records.name} has an image: expected the key 'images' or 'image' "
        f"beside the messages, or images in their content, got the keys {', '.join(first.keys)} in {first.where}"
    )


def _only_file(folder: Path) -> Path:
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    lines = [path for path in files if path.suffix == ".jsonl"] or files
    if len(lines) != 1:
        found = ", ".join(path.name for path in lines[:4]) or "none"
        raise TrainingError(f"expected one file of records (.jsonl) in {folder}, got {found}: name the file itself")
    return lines[0]


def _of_file(path: Path, check: Check) -> Records:
    folder = path.parent
    digest, lines, start = hashlib.sha256(), [], 0
    with path.open("rb") as file:
        if file.read(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
            return _of_list(path, check)
        file.seek(0)
        for number, line in enumerate(file, 1):
            digest.update(line)
            if line.strip():
                where = f"{path.name}, line {number}"
                check(record(_parsed(line, where), where, folder))
                lines.append((start, where))
            start += len(line)

    return Records(str(path), digest.hexdigest(), len(lines), partial(_of_line, path, lines))


def _of_line(path: Path, lines: Sequence[tuple[int, str]], number: int) -> Record:
    """One record of a file, of whose lines the starts and names are known."""
    start, where = lines[number]
    with path.open("rb") as file:
        file.seek(start)
        return record(_parsed(file.readline(), where), where, path.parent)


def _of_list(path: Path, check: Check) -> Records:
    text = path.read_bytes()
    values = _parsed(text, path.name, "a list in JSON")
    records = [record(value, f"{path.name}, record {number}", path.parent) for number, value in enumerate(values, 1)]
    for one in records:
        check(one)
    return Records(str(path), hashlib.sha256(text).hexdigest(), len(records), records.__getitem__)


def _parsed(text: bytes, where: str, wanted: str = "JSON, one record a line or all of them in one list") -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # bad JSON and bad UTF-8 alike
        raise TrainingError(f"{where}: must be {wanted}: {error}") from None


def _of_hub(name: str, check: Check) -> Records:
    try:
        import datasets  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise TrainingError(
            f"expected a file of records, got nothing at {name}; if that is the name of a set on the Hub: "
            "pip install datasets"
        ) from None
    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # whatever the network and the set's files can raise
        raise TrainingError(
            f"expected a file of records or the name of a set with a split 'train', got {name!r}: "
            f"{' '.join(str(error).split())}"
        ) from error

    if len(rows):
        check(_of_row(name, rows, 0))  # no more: to get one is to decode its images
    return Records(name, str(rows._fingerprint), len(rows), partial(_of_row, name, rows))


def _of_row(name: str, rows: Any, number: int) -> Record:
    return record(rows[number], f"{name}, record {number + 1}", Path())
