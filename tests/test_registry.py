"""Adapters by model type: built in, from other packages, and neither."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from gazepatch.errors import GazeError, UnsupportedModelError
from gazepatch.registry import MODULES, adapter_for, known_types


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, entry: str) -> None:
    """A package with one entry point, as pip would leave it, on the import path."""
    info = folder / "eyes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: eyes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[gazepatch.adapters]\n{entry}\n")
    (folder / "eyes.py").write_text(
        "from gazepatch.adapters.base import Adapter\n"
        "class Foreign(Adapter):\n"
        "    model_types = ('foreign', 'llava')\n"
        "adapter = Foreign()\n"
    )
    (folder / "blind.py").write_text("raise RuntimeError('half of it is missing')\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "eyes", raising=False)


@pytest.mark.parametrize("model_type", MODULES)
def test_built_in(model_type: str) -> None:
    assert model_type in adapter_for(model_type).model_types


def test_no_module_knows_types_that_the_table_does_not() -> None:
    assert {model_type for known in MODULES for model_type in adapter_for(known).model_types} == set(MODULES)


def test_unknown_type_says_what_is_like_it_and_how_to_add_one() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        adapter_for("bert")
    message = str(caught.value)
    assert "'bert': `gazepatch families`" in message
    assert "gazepatch.adapters.base.Adapter" in message and "'gazepatch.adapters'" in message
    with pytest.raises(UnsupportedModelError, match=r"'qwen2_5_vl_text', only for .*qwen2_5_vl.*: `gazepatch"):
        adapter_for("qwen2_5_vl_text")


@pytest.mark.parametrize("model_type", ["foreign", "llava"], ids=["new", "instead of a built-in one"])
def test_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str) -> None:
    install(tmp_path, monkeypatch, f"{model_type} = eyes:adapter")
    assert type(adapter_for(model_type)).__module__ == "eyes"
    assert model_type in known_types()
    assert type(adapter_for("vipllava")).__module__ == "gazepatch.adapters.squares"


def test_what_is_installed_meanwhile_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    path = list(sys.path)
    assert "foreign" not in known_types()
    time.sleep(0.02)  # folders know the time of their last change to some milliseconds
    install(tmp_path, monkeypatch, "foreign = eyes:adapter")
    monkeypatch.setattr(sys, "path", path)
    assert "foreign" in known_types()


@pytest.mark.parametrize(
    ("entry", "complaints"),
    [
        ("foreign = eyes:Foreign", ["instance of gazepatch.adapters.base.Adapter", "class 'eyes.Foreign'"]),
        ("other = eyes:adapter", ["'other' among its model_types", "eyes.Foreign object"]),
        ("foreign = eyes:absent", ["cannot be loaded", "absent", "repair or uninstall"]),
        ("foreign = nowhere:adapter", ["cannot be loaded", "No module named 'nowhere'"]),
        ("foreign = blind:adapter", ["cannot be loaded", "RuntimeError: half of it is missing"]),
    ],
    ids=["a class", "another type", "no such name", "no such module", "fails on import"],
)
def test_bad_entry_point_names_itself_and_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, complaints: list[str]
) -> None:
    install(tmp_path, monkeypatch, entry)
    with pytest.raises(GazeError) as caught:
        adapter_for(entry.split(" = ")[0])
    for part in (f"entry point '{entry}' of package 'eyes'", *complaints):
        assert part in str(caught.value)


def test_a_bad_entry_point_leaves_other_types_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "foreign = nowhere:adapter")
    assert "llava" in adapter_for("llava").model_types


def test_import_and_lookup_are_light() -> None:
    code = (
        "import sys, gazepatch.registry as r; r.known_types(); [r.adapter_for(t) for t in r.MODULES];"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
