"""Whatever stands in an artefact's files: it loads, or the error is ours and the model is as it was."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis")

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny

import gazepatch
from gazepatch import GazeConfig, GazeError
from gazepatch.artefact.contents import read_artefact
from gazepatch.artefact.manifest import Manifest
from gazepatch.context import read_context_tokens
from gazepatch.verification import fingerprint

SETTINGS = GazeConfig(region=(4, 4, 1), window=None, budget=0.5, min_visual_tokens=0)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
quick = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llava").model


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    model.save_pretrained(folder / "base")
    return gazepatch.convert(folder / "base", folder / "gaze", config=SETTINGS, context_tokens=torch.ones(2, 64))


def attempt(folder: Path, config: Any) -> Manifest | None:
    """Read an artefact and compare it with the model; None if it was refused."""
    try:
        manifest, _ = read_artefact(folder)
        manifest.check(config)
    except GazeError as error:
        assert str(error)
        return None
    return manifest


@quick
@given(data=st.data())
def test_settings(artefact: Path, model: Any, data: st.DataObject) -> None:
    path = artefact / "gaze_config.json"
    good = path.read_text(encoding="utf-8")
    values = json.loads(good)
    part = data.draw(st.sampled_from([values, values["gaze"], values["image_geometry"]]))
    key = data.draw(st.sampled_from(sorted(part)) | st.text(max_size=8))
    if data.draw(st.booleans()):
        part[key] = data.draw(JSON)
    else:
        part.pop(key, None)
    try:
        path.write_text(json.dumps(values), encoding="utf-8")
        manifest = attempt(artefact, model.config)
    finally:
        path.write_text(good, encoding="utf-8")
    if manifest is not None:
        apply_or_leave(model, manifest.gaze)


@quick
@given(edits=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=4))
def test_bytes_of_the_settings(artefact: Path, model: Any, edits: list[tuple[int, int]]) -> None:
    path = artefact / "gaze_config.json"
    good = path.read_bytes()
    try:
        path.write_bytes(edited(good, edits))
        manifest = attempt(artefact, model.config)
    finally:
        path.write_bytes(good)
    if manifest is not None:
        apply_or_leave(model, manifest.gaze)


@quick
@given(data=st.data())
def test_headers_of_context_tokens(artefact: Path, data: st.DataObject) -> None:
    path = artefact / "context_tokens.safetensors"
    good = path.read_bytes()
    size = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + size])
    part = data.draw(st.sampled_from([header, header["__metadata__"], header["context_tokens"]]))
    part[data.draw(st.sampled_from(sorted(part)) | st.text(max_size=8))] = data.draw(JSON)
    text = json.dumps(header).encode()
    length = data.draw(st.just(len(text)) | st.integers(0, 2**64 - 1))
    read_or_refuse(path, good, struct.pack("<Q", length) + text + good[8 + size :])


@quick
@given(
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4), cut=st.none() | st.integers(0, 900)
)
def test_bytes_of_context_tokens(artefact: Path, edits: list[tuple[int, int]], cut: int | None) -> None:
    path = artefact / "context_tokens.safetensors"
    good = path.read_bytes()
    read_or_refuse(path, good, edited(good, edits)[:cut])


def edited(text: bytes, edits: list[tuple[int, int]]) -> bytes:
    new = bytearray(text)
    for at, value in edits:
        new[at % len(new)] = value
    return bytes(new)


def read_or_refuse(path: Path, good: bytes, bad: bytes) -> None:
    try:
        path.write_bytes(bad)
        tokens = read_context_tokens(path, "llava", 64)
    except GazeError as error:
        assert str(error)
    else:
        assert tokens.shape[1] == 64 and bool(torch.isfinite(tokens).all())
    finally:
        path.write_bytes(good)


def apply_or_leave(model: Any, config: GazeConfig) -> None:
    before = fingerprint(model)
    try:
        gazepatch.apply(model, config, context_tokens=torch.ones(2, 64))
    except GazeError:
        pass
    else:
        gazepatch.restore(model)
    assert fingerprint(model) == before
