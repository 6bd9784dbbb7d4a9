"""Import gazepatch from this checkout, installed or not: its folders `adapters` and `cli` are parts of the package.

A script imports this module before the package; pytest takes it as a plugin (`-p checkout`).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def use() -> None:
    """Make `gazepatch` and all parts of it importable."""
    sys.path.insert(0, str(ROOT))
    try:
        package = importlib.import_module("gazepatch")
    finally:
        sys.path.remove(str(ROOT))  # nobody else's `tests` or `adapters` must be found here
    if importlib.util.find_spec("gazepatch.adapters") is None:
        package.__path__.append(str(ROOT))


use()
