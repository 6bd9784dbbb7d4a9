"""Files that are there whole or as they were, whatever interrupts their writing; and what is said where none can be."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gazepatch.errors import ArtefactError

#: What the system says where there is no room: a full disk, a quota, a limit on the size of files.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file beside `path`, text as UTF-8, which then takes its place at once; hard links of the old one stay."""
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        new.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say of what the system refuses in the block that `path` cannot be written.

    Raises:
        ArtefactError: In the place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error), "choose another place") from error


@contextmanager
def given_room(path: Path, then: str) -> Iterator[None]:
    """Say what could not be written when something in the block finds no room, and what to do `then`.

    Raises:
        ArtefactError: In the place of what torch, safetensors or the system raises.
    """
    try:
        yield
    except Exception as error:
        if not lacks_room(error):
            raise
        number = error.errno if isinstance(error, OSError) else None
        raise _unwritable(path, os.strerror(number or errno.ENOSPC), then) from error


def lacks_room(error: Exception) -> bool:
    """Whether a write failed because there is no room."""
    if isinstance(error, OSError):
        return error.errno in NO_ROOM
    text = str(error)  # safetensors has the system's error in it, and torch's writer only where in its code it noticed
    return any(f"(os error {number})" in text for number in NO_ROOM) or "inline_container" in text


def _unwritable(path: Path, why: str, then: str) -> ArtefactError:
    return ArtefactError(f"{path} cannot be written: {why}; {then}")


def place_of(path: Path) -> Path:
    """Where a file that somebody names is to be written with `replace_file`: what a link leads to.

    Raises:
        OSError: It cannot be: there is a device, a pipe or a folder, or no folder that may be written to.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file, and cannot be replaced by one: give another path")
    if not path.parent.is_dir():
        raise OSError(f"no folder {path.parent} to write {path.name} to")
    if not os.access(path.parent, os.W_OK):
        raise OSError(f"{path.parent} cannot be written to: give a path in another folder for {path.name}")
    return path
