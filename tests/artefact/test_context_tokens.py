"""The file of context tokens: bit for bit, and refused when damaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny

import gazepatch
from artefact.conftest import SETTINGS
from gazepatch import ArtefactError, ConfigError, GazeConfig
from gazepatch.artefact.manifest import read
from gazepatch.context import MAX_BYTES, write_context_tokens
from gazepatch.verification import fingerprint


def tokens(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(count))


@pytest.fixture
def with_tokens(base: Path, tmp_path: Path) -> Path:
    return gazepatch.convert(base, tmp_path / "gaze", config=SETTINGS, context_tokens=tokens())


def test_context_tokens_come_back_bit_for_bit(base: Path, with_tokens: Path, tmp_path: Path) -> None:
    case = tiny("llava")
    assert sorted(path.name for path in with_tokens.iterdir()) == [
        "README.md",
        "context_tokens.safetensors",
        "gaze_config.json",
    ]
    assert read(with_tokens).gaze == replace(SETTINGS, context_tokens=4)
    modes = {path.stat().st_mode & 0o777 for path in with_tokens.iterdir()}
    assert len(modes) == 1, "whoever may read the settings may read the tokens"
    model = gazepatch.load(with_tokens)
    assert torch.equal(gazepatch.context_tokens_of(model), tokens())
    with gazepatch.patched(case.model, SETTINGS, context_tokens=with_tokens), torch.no_grad():
        assert torch.equal(model(**case.inputs).logits, case.model(**case.inputs).logits)
    saved = gazepatch.save(model, tmp_path / "saved")
    assert (saved / "gaze_config.json").read_bytes() == (with_tokens / "gaze_config.json").read_bytes()
    for folder in (with_tokens, saved):  # safetensors writes metadata in any order
        with safe_open(folder / "context_tokens.safetensors", "pt") as file:
            assert file.metadata() == {"format": "1", "model_type": "llava", "hidden_size": "64"}
            assert torch.equal(file.get_tensor("context_tokens"), tokens())
    # Untrained ones changed in memory are saved as they are now.
    with torch.no_grad():
        gazepatch.context_tokens_of(model).add_(1)
    again = gazepatch.load(gazepatch.save(model, tmp_path / "saved", force=True))
    assert torch.equal(gazepatch.context_tokens_of(again), tokens() + 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_context_tokens_keep_their_precision(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    out = gazepatch.convert(base, tmp_path / "gaze", context_tokens=tokens().to(dtype))
    held = load_file(out / "context_tokens.safetensors")["context_tokens"]
    assert held.dtype == dtype and torch.equal(held, tokens().to(dtype))
    assert torch.equal(gazepatch.context_tokens_of(gazepatch.load(out, dtype=dtype)), held)


def test_context_tokens_from_a_file_or_its_folder(base: Path, with_tokens: Path, tmp_path: Path) -> None:
    for number, given in enumerate((with_tokens, with_tokens / "context_tokens.safetensors", str(with_tokens))):
        out = gazepatch.convert(base, tmp_path / f"other-{number}", context_tokens=given)
        assert torch.equal(load_file(out / "context_tokens.safetensors")["context_tokens"], tokens())
        assert read(out).gaze.context_tokens == 4


def test_settings_and_context_tokens_agree(base: Path, with_tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ask for 3 context tokens, got 4"):
        gazepatch.convert(base, tmp_path / "other", config=GazeConfig(context_tokens=3), context_tokens=tokens())
    path = with_tokens / "context_tokens.safetensors"
    write_context_tokens(path, tokens(3), "llava")
    with pytest.raises(ArtefactError, match=r"must hold 4 context tokens, as gaze_config.json says, got 3"):
        gazepatch.load(with_tokens)
    path.unlink()
    with pytest.raises(ArtefactError, match=r"expected a file context_tokens.safetensors, got nothing at"):
        gazepatch.load(with_tokens)
    plain = gazepatch.convert(base, tmp_path / "plain", config=SETTINGS)
    write_context_tokens(plain / path.name, tokens(), "llava")
    with pytest.raises(ArtefactError, match=r"is there, but gaze_config.json says context_tokens 0"):
        gazepatch.load(plain)
    assert not (tmp_path / "other").exists()


def good_file(**changes: str) -> dict[str, Any]:
    return {"metadata": {"format": "1", "model_type": "llava", "hidden_size": "64"} | changes}


def pickled(path: Path) -> None:
    torch.save({"context_tokens": tokens()}, path)


def claims_two_gigabytes(path: Path) -> None:
    path.write_bytes((2 << 30).to_bytes(8, "little") + path.read_bytes()[8:])


def huge(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(MAX_BYTES + 1)  # sparse: it takes no room


Damage = Callable[[Path], object]
DAMAGE: dict[str, tuple[Damage, str]] = {
    "empty": (lambda path: path.write_bytes(b""), "is not a valid safetensors file"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is not a valid safetensors file"),
    "header cut off": (lambda path: path.write_bytes(path.read_bytes()[:40]), "is not a valid safetensors file"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"0"), "is not a valid safetensors file"),
    "a pickle": (pickled, "is not a valid safetensors file"),
    "a header of 2 GB": (claims_two_gigabytes, "is not a valid safetensors file"),
    "a huge file": (huge, "context tokens have at most"),
    "one dimension": (
        lambda path: save_file({"context_tokens": tokens().view(-1)}, path, **good_file()),
        r"must have the shape \[M, 64\] with M >= 1, got \[256\]",
    ),
    "no tokens": (
        lambda path: save_file({"context_tokens": tokens()[:0]}, path, **good_file()),
        r"must have the shape .*, got \[0, 64\]",
    ),
    "other hidden size": (
        lambda path: save_file({"context_tokens": torch.zeros(4, 32)}, path, **good_file()),
        r"must have the shape .*, got \[4, 32\]",
    ),
    "NaN": (
        lambda path: save_file({"context_tokens": tokens() / 0 * 0}, path, **good_file()),
        "must be finite, got NaN or infinity",
    ),
    "integers": (
        lambda path: save_file({"context_tokens": tokens().long()}, path, **good_file()),
        "must be floating-point numbers, got torch.int64",
    ),
    "8 bits": (
        lambda path: save_file({"context_tokens": tokens().to(torch.float8_e4m3fn)}, path, **good_file()),
        "must be floating-point numbers, got torch.float8_e4m3fn: give float32",
    ),
    "8 other bits": (
        lambda path: save_file({"context_tokens": tokens().to(torch.float8_e5m2)}, path, **good_file()),
        "must be floating-point numbers, got torch.float8_e5m2: give float32",
    ),
    "no metadata": (lambda path: save_file({"context_tokens": tokens()}, path), "must have format 1 .* got None"),
    "other format": (
        lambda path: save_file({"context_tokens": tokens()}, path, **good_file(format="2")),
        "must have format 1 in its metadata.*, got 2",
    ),
    "other model type": (
        lambda path: save_file({"context_tokens": tokens()}, path, **good_file(model_type="gemma3")),
        "must have model_type llava .*, got gemma3",
    ),
    "other model's hidden size": (
        lambda path: save_file({"context_tokens": tokens()}, path, **good_file(hidden_size="65")),
        "must have hidden_size 64 .*, got 65",
    ),
    "another tensor": (
        lambda path: save_file({"context_tokens": tokens(), "extra": tokens(1)}, path, **good_file()),
        "must hold one tensor, context_tokens, got context_tokens, extra",
    ),
    "a model": (
        lambda path: save_file({f"weight{i}": tokens(1) for i in range(6)}, path, **good_file()),
        "got weight0, weight1, weight2 and 3 more$",
    ),
    "another name": (lambda path: save_file({"tokens": tokens()}, path, **good_file()), "got tokens"),
    "no tensor": (lambda path: save_file({}, path, **good_file()), "got none"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_context_tokens(
    with_tokens: Path, damage: Damage, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_weights(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    damage(with_tokens / "context_tokens.safetensors")
    model = tiny("llava").model
    before = fingerprint(model)
    with pytest.raises(ArtefactError, match=message):
        gazepatch.apply(model, SETTINGS, context_tokens=with_tokens)
    assert fingerprint(model) == before
    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", no_weights)
    with pytest.raises(ArtefactError, match=message):
        gazepatch.load(with_tokens)
