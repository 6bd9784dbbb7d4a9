"""Files that are replaced: whole, or as they were."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from gazepatch.files import lacks_room, place_of, replace_file


def test_text_and_bytes_take_the_place(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "linked"
    replace_file(path, "ä\n")
    os.link(path, other)
    replace_file(path, b"\x00")
    assert path.read_bytes() == b"\x00" and other.read_bytes() == "ä\n".encode()
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_interrupted_it_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    replace_file(path, "old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]


def test_places_for_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to("target")
    assert place_of(tmp_path / "link") == tmp_path / "target" and place_of(tmp_path / "new") == tmp_path / "new"
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(OSError, match="is not a regular file"):
            place_of(tmp_path / name)
    with pytest.raises(OSError, match=r"no folder .*gone to write page to"):
        place_of(tmp_path / "gone" / "page")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(OSError, match="cannot be written to: give a path in another folder for new"):
        place_of(tmp_path / "new")


@pytest.mark.parametrize(
    "error, lacks",
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EFBIG, "File too large"), True),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)"), False),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 9857792 vs 9857684"), True),
        (RuntimeError("the size of tensor a (2) must match"), False),
    ],
    ids=str,
)
def test_what_lacks_room(error: Exception, lacks: bool) -> None:
    assert lacks_room(error) == lacks


def _umask() -> int:
    os.umask(mask := os.umask(0))
    return mask
