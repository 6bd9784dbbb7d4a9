"""Records of a training: conversations about images, out of JSON lines, a JSON list, or a set of `datasets`.

Two forms are read: `{"messages": [{"role", "content"}], "images": [...]}`, and LLaVA's
`{"conversations": [{"from", "value"}], "image": ...}`. Content is a string, with `<image>` where an image is, or a list
of `{"type": "text", "text": ...}` and `{"type": "image"}`; images without a place go before the first question.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gazepatch.errors import TrainingError
from gazepatch.training.images import check_image

MARK = "<image>"
SUFFIXES = (".jsonl", ".json")
ROLES = {"human": "user", "gpt": "assistant"}  # LLaVA's names for them

Message = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """One conversation.

    Attributes:
        where: Names it in errors.
        messages: Each with its role, and its content as a list of texts and images, `{"type": "image"}`.
        images: In the order of those, as they were given.
        folder: What paths are relative to.
    """

    where: str
    messages: list[Message]
    images: list[Any]
    folder: Path


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


def record(values: Any, where: str, folder: Path) -> Record:
    """A record out of its JSON.

    Raises:
        TrainingError: It is broken.
    """
    if not isinstance(values, dict):
        raise TrainingError(f"{where}: a record must be a JSON object, got {type(values).__name__}")
    given = values.get("messages", values.get("conversations"))
    if not isinstance(given, (list, tuple)) or not given:
        raise TrainingError(
            f"{where}: expected a list 'messages' (or LLaVA's 'conversations'), got the keys {', '.join(values)}"
        )
    found: list[Any] = []
    messages = [_message(message, number, where, found) for number, message in enumerate(given)]
    if not any(message["role"] == "assistant" for message in messages):
        raise TrainingError(f"{where}: expected a message of the assistant to learn from, got none")
    if messages[0]["role"] == "assistant":
        raise TrainingError(f"{where}: expected a question first, got a message of the assistant: remove it")
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and not any(part.get("text", "").strip() for part in message["content"]):
            raise TrainingError(
                f"{where}: expected text of the assistant in message {number}, got none: drop the record"
            )
    images = _images(values, where)
    if images and not found:  # no place was named: before the first question
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        first["content"][:0] = [{"type": "image"} for _ in images]
        found = [None] * len(images)
    if any(image is not None for image in found):
        if images or None in found:
            raise TrainingError(f"{where}: images must be all in 'images' or all in the messages, got both")
        images = found
    if len(images) != len(found):
        raise TrainingError(f"{where}: expected an image for each of {len(found)} places, got {len(images)}")
    for image in images:
        check_image(image, folder, where)
    return Record(where, messages, images, folder)


def _message(given: Any, number: int, where: str, found: list[Any]) -> Message:
    """A message in the form of `Record`; what its places hold is added to `found`, None for a bare place."""
    if not isinstance(given, dict):
        raise TrainingError(f"{where}: message {number} must be an object, got {type(given).__name__}")
    role = given.get("role", given.get("from"))
    role = ROLES.get(role, role) if isinstance(role, str) else role
    if not isinstance(role, str) or not role:
        raise TrainingError(f"{where}: message {number} must have a 'role', got the keys {', '.join(given)}")
    content = given.get("content", given.get("value"))
    if isinstance(content, str):
        texts = content.split(MARK)
        parts: list[dict[str, Any]] = [{"type": "text", "text": texts[0]}]
        for text in texts[1:]:
            parts += [{"type": "image"}, {"type": "text", "text": text}]
    elif isinstance(content, (list, tuple)):
        parts = list(content)
    else:
        raise TrainingError(
            f"{where}: message {number} must have 'content', a string or a list, got {type(content).__name__}"
        )
    kept = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            if part["text"]:
                kept.append({"type": "text", "text": part["text"]})
        elif kind in ("image", "image_url"):
            kept.append({"type": "image"})
            found.append(next((part[key] for key in ("image", "path", "url", "image_url") if part.get(key)), None))
        else:
            raise TrainingError(
                f"{where}: message {number} may hold {{'type': 'text', 'text': ...}} and {{'type': 'image'}}, "
                f"got {str(part)[:80]}"
            )
    return {"role": role, "content": kept or [{"type": "text", "text": ""}]}  # templates look at the first part


def _images(values: dict[str, Any], where: str) -> list[Any]:
    images = values.get("images", values.get("image"))
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return list(images)
    if isinstance(images, (int, float)):
        raise TrainingError(f"{where}: images must be a list, got {images!r}")
    return [images]


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
        if file.read(64).lstrip()[:1] == b"[":
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
