"""Output folders appear complete or not at all, even when a process is killed while it writes them."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import tiny

import gazepatch
from gazepatch.artefact.checkpoint import checkpoint_files, copy_files
from gazepatch.artefact.folders import complete_folder, recover
from gazepatch.errors import ArtefactError
from gazepatch.locks import locked

unix = pytest.mark.skipif(sys.platform == "win32", reason="no kill -9, no locks of folders")

# What `convert` does once it knows what to copy, without the seconds that it takes to import a model's configuration.
COPY = """
import sys, time
from pathlib import Path
from gazepatch.artefact import checkpoint
from gazepatch.artefact.folders import complete_folder
checkpoint._CHUNK_BYTES = 1 << 12
base, out = map(Path, sys.argv[1:])
def slowly(done, total):
    print("copying", flush=True)
    time.sleep(0.0005)
with complete_folder(out) as folder:
    checkpoint.copy_files(base, folder, checkpoint.checkpoint_files(base), progress=slowly)
"""

CONVERT = """
import sys, time
import gazepatch
def slowly(done, total):
    print("copying", flush=True)
    time.sleep(0.1)
gazepatch.convert(*sys.argv[1:], full=True, progress=slowly)
"""


def digest(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny("llava").model.save_pretrained(folder, max_shard_size="200KB")
    return folder


def kill(program: str, after: float, *arguments: Path) -> None:
    """Run a program, and kill it some seconds after it has begun to copy."""
    process = subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "copying\n"
    time.sleep(after)
    process.kill()
    process.wait()


@unix
def test_killed_at_random_moments(base: Path, tmp_path: Path) -> None:
    before, rng, out = digest(base), random.Random(0), tmp_path / "out"
    for _ in range(12):
        kill(COPY, 0.2 * rng.random(), base, out)
        assert digest(base) == before
        assert not out.exists() or digest(out) == before
    assert any(tmp_path.iterdir())  # some were cut off in the middle
    with complete_folder(out) as folder:
        copy_files(base, folder, checkpoint_files(base))
    assert digest(out) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


@unix
def test_convert_runs_again_after_a_kill(base: Path, tmp_path: Path) -> None:
    before, out = digest(base), tmp_path / "out"
    kill(CONVERT, 0.0, base, out)
    assert not out.exists() and any(tmp_path.iterdir())
    gazepatch.convert(base, out, full=True)
    assert digest(base) == before and [path.name for path in tmp_path.iterdir()] == ["out"]
    assert gazepatch.is_patched(gazepatch.load(out))


def test_what_was_moved_aside_comes_back(tmp_path: Path) -> None:
    out, old, new = tmp_path / "out", tmp_path / ".out.old-12345678", tmp_path / ".out.new-12345678"
    old.mkdir()
    (old / "it").write_text("old")
    new.mkdir()
    recover(out)
    assert (out / "it").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with complete_folder(out) as first:
        (first / "it").write_text("first")
        with complete_folder(out) as second:
            (second / "it").write_text("second")
        assert (out / "it").read_text() == "second" and first.exists()
    assert (out / "it").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_writer_at_the_same_moment_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, rename = tmp_path / "out", Path.rename
    out.mkdir()

    def late(self: Path, target: Path) -> Path:
        if target == out:  # moved aside by now
            out.mkdir()
            (out / "it").write_text("other")
        return rename(self, target)

    wrong = pytest.raises(ArtefactError, match="written by somebody else")
    with monkeypatch.context() as patch, wrong, complete_folder(out) as folder:
        (folder / "it").write_text("own")
        patch.setattr(Path, "rename", late)
    assert (out / "it").read_text() == "other"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- folders that are read-only


@pytest.fixture
def by_anybody() -> Iterator[Path]:
    """A folder in which modes count, as they do for everybody but root."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as name:
        if user == 0:
            os.chown(name, 65534, -1)
            os.seteuid(65534)
        try:
            yield Path(name)
        finally:
            os.seteuid(user)


@unix
def test_a_read_only_folder_is_replaced_whole(by_anybody: Path) -> None:
    out = by_anybody / "out"
    (out / "lora" / "deep").mkdir(parents=True)
    (out / "lora" / "deep" / "it").write_text("old")
    for folder in (out / "lora" / "deep", out / "lora", out):
        folder.chmod(0o555)
    with complete_folder(out) as folder:
        (folder / "it").write_text("new")
    assert [path.name for path in by_anybody.iterdir()] == ["out"] and (out / "it").read_text() == "new"


@unix
def test_what_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (out := tmp_path / "out").mkdir()
    rmtree = shutil.rmtree  # of files that somebody else may have put there
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: ".old-" in str(path) or rmtree(path, **how))
    with pytest.warns(UserWarning, match=r"\.out\.old-.* could not be removed: remove it"), complete_folder(out):
        pass


@unix
def test_a_lock_is_free_after_its_block_whoever_was_forked_in_it(tmp_path: Path) -> None:
    with locked(tmp_path) as first, locked(tmp_path) as second:
        assert (first, second) == (True, False)
        child = os.fork()
        if child == 0:  # holds what this process has open
            time.sleep(60)
            os._exit(0)
    try:
        with locked(tmp_path) as again:
            assert again
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with locked(tmp_path / "none") as free:
        assert free is None
