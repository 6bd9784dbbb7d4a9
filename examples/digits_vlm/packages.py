"""Packages that some programs need beside gazepatch's own: asked for before the work, not after it."""

from __future__ import annotations

import sys
from importlib.util import find_spec

NAMES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}


def require(*modules: str) -> None:
    """Leave the program with one line that names the packages to install, unless all of these can be imported."""
    if missing := [NAMES[module] for module in modules if find_spec(module) is None]:
        sys.exit(f"this needs {' and '.join(missing)}: pip install {' '.join(missing)}")
