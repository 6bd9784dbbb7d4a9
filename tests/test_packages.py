"""What is in the folders is in the wheel."""

from __future__ import annotations

import re
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
