"""Files that are replaced: whole, or as they were."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gazepatch.files import replace_file


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


def _umask() -> int:
    os.umask(mask := os.umask(0))
    return mask
