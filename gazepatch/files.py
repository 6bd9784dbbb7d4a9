"""Files that are there whole or as they were, whatever interrupts their writing."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file beside `path`, text as UTF-8, which then takes its place at once; hard links of the old one stay."""
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        new.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
