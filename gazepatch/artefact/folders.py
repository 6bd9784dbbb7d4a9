"""Output folders that appear complete or not at all, whatever interrupts their making."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gazepatch.artefact.manifest import FILE_NAME
from gazepatch.errors import ArtefactError
from gazepatch.files import given_room, writing
from gazepatch.locks import locked


def check_output(out: Path, source: Path | None, force: bool) -> None:
    """Refuse to write over anything but an artefact or an empty folder, and into or over the base model at all.

    Args:
        out: Folder to write.
        source: Folder of the base model, if it is a local one.
        force: Whether an artefact may be replaced.

    Raises:
        ArtefactError: Says which of these it is.
    """
    if source is not None and (source == (real := out.resolve()) or source in real.parents or real in source.parents):
        raise ArtefactError(f"out must lie outside the base model, which is never touched; got {out} and {source}")
    if not os.path.lexists(out):
        return
    own = out.is_dir() and not out.is_symlink()
    if own and not any(out.iterdir()):
        return
    if not (own and (out / FILE_NAME).is_file()):
        raise ArtefactError(
            f"{out} exists already and is no artefact folder, so it is not replaced, even by force: choose another "
            "name, or remove it yourself"
        )
    if not force:
        raise ArtefactError(f"{out} exists already: choose another name, or force=True (--force) to replace it")


@contextmanager
def complete_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place when the block ends well, and vanishes when it does not.

    What a killed process left behind is cleared away by the next one that writes the same folder.

    Raises:
        ArtefactError: There can be no folder beside `out`, or no room for what belongs in it, or somebody else wrote
            `out` at the same moment.
    """
    recover(out)
    name = uuid.uuid4().hex[:8]
    new, old = (_beside(out, kind, name) for kind in ("new", "old"))
    with writing(out):
        new.mkdir(parents=True)
    try:
        with locked(new), given_room(out, "make room there, or choose another place"):
            yield new
            _replace(out, new, old)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if out.exists():
            _remove(old)


def _replace(out: Path, new: Path, old: Path) -> None:
    with suppress(FileNotFoundError):
        out.rename(old)
    try:
        new.rename(out)
    except BaseException as error:
        if old.exists() and not out.exists():
            old.rename(out)
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise ArtefactError(f"{out} was written by somebody else at the same moment: run this again") from error
        raise


def recover(out: Path) -> None:
    """Clear away what killed processes left beside `out`; what they had moved aside comes back."""
    for new in out.parent.glob(glob.escape(f".{out.name}.new-") + "*"):
        with locked(new) as free:
            if free:
                shutil.rmtree(new, ignore_errors=True)
    for old in out.parent.glob(glob.escape(f".{out.name}.old-") + "*"):
        if _beside(out, "new", old.name.rpartition("-")[2]).exists():
            continue  # somebody is just replacing it
        if out.exists():
            _remove(old)
        else:
            old.rename(out)


def _remove(old: Path) -> None:
    """Remove what was moved aside, folders that are read-only as well, or warn that it stays."""
    shutil.rmtree(old, ignore_errors=True)
    if not old.exists():
        return
    with suppress(OSError):  # of somebody else
        old.chmod(0o700)
        for parent, folders, _ in os.walk(old):  # which looks into those folders only after this block
            for inner in (Path(parent, name) for name in folders):
                if not inner.is_symlink():
                    inner.chmod(0o700)
    shutil.rmtree(old, ignore_errors=True)
    if old.exists():
        warnings.warn(f"{old} is what was replaced, and could not be removed: remove it yourself", stacklevel=2)


def _beside(out: Path, kind: str, name: str) -> Path:
    return out.with_name(f".{out.name}.{kind}-{name}")
