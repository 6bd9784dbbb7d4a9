"""What is in the folders is in the wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def test_every_folder_with_python_is_a_listed_package() -> None:
    found = set()
    for package, folder in SETUPTOOLS["package-dir"].items():
        for path in (ROOT / folder).rglob("*.py"):
            inner = path.parent.relative_to(ROOT / folder).parts
            found.add(".".join([package, *inner]))
    assert found == set(SETUPTOOLS["packages"])


def test_every_package_has_an_init() -> None:
    for package in SETUPTOOLS["packages"]:
        parent = max((p for p in SETUPTOOLS["package-dir"] if f"{package}.".startswith(f"{p}.")), key=len)
        folder = ROOT / SETUPTOOLS["package-dir"][parent]
        assert folder.joinpath(*package.removeprefix(parent).split("."), "__init__.py").is_file(), package


def test_types_are_shipped() -> None:
    assert SETUPTOOLS["package-data"] == {"gazepatch": ["py.typed", "viewer.html"]}
    assert (ROOT / "gazepatch" / "py.typed").is_file()


def test_type_checkers_see_names_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text("import gazepatch\ngazepatch.GazeConfig\ngazepatch.laod\n")
    # Errors of the copy itself, where much is missing, are not asked for.
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--ignore-missing-imports", "theirs.py"]
    environment = os.environ | {"MYPYPATH": str(_light_copy(tmp_path / "installed"))}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.stdout.splitlines()[:-1] == ['theirs.py:3: error: Module has no attribute "laod"  [attr-defined]'], (
        run.stdout + run.stderr
    )


def _light_copy(folder: Path) -> Path:
    """The package's door, and of what lies behind it only what needs nothing heavy: to check it all takes minutes."""
    (folder / "gazepatch").mkdir(parents=True)
    for name in ("__init__.py", "config.py", "errors.py", "py.typed"):
        shutil.copy(ROOT / "gazepatch" / name, folder / "gazepatch")
    return folder


def test_every_direct_dependency_is_pinned() -> None:
    optional = PROJECT["project"]["optional-dependencies"]
    wanted = {
        _name(line)
        for line in [*PROJECT["project"]["dependencies"], *(line for extra in optional.values() for line in extra)]
    }
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {_name(line) for line in pins if line and not line.startswith("#")}
    # triton is the affair of torch (see constraints.txt); nothing here loads a set of the Hub.
    assert wanted - {"triton", "datasets"} <= pinned


def test_the_command_exists() -> None:
    assert PROJECT["project"]["scripts"] == {"gazepatch": "gazepatch.cli:main"}


def _name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9_.-]+", requirement)
    assert match is not None
    return match[0].lower().replace("_", "-")
