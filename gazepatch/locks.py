"""Locks of folders, which keep two processes from working in one at the same time."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(folder: Path) -> Iterator[bool | None]:
    """Hold the folder's lock, which dies with the process.

    Gives False if somebody else has it, and None if there are no locks here: on Windows, on file systems that lock no
    folders (NFS), of a folder that is gone by now.
    """
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield None
        return
    free: bool | None = True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        free = False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    try:
        yield free
    finally:
        if free:
            fcntl.flock(handle, fcntl.LOCK_UN)  # processes that were forked meanwhile hold the handle open, too
        os.close(handle)
