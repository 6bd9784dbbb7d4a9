"""Artefacts: what is written, what is refused, and that nothing half-written is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny

import gazepatch
from gazepatch import (
    ArtefactError,
    ConfigError,
    GazeConfig,
    GazeError,
    HubError,
    PatchError,
    UnsupportedModelError,
)
from gazepatch import artefact as artefacts
from gazepatch.context import MAX_BYTES, write_context_tokens
from gazepatch.manifest import FORMAT_VERSION, read
from gazepatch.registry import MODULES
from gazepatch.verification import fingerprint

SETTINGS = GazeConfig(region=(4, 4, 1), window=(2, 2, 1), budget=0.5, min_visual_tokens=0, dense_layers=(1,))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model. Tests must leave it alone; `untouched` says whether they did."""
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny("llava").model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def untouched(base: Path) -> Any:
    before = {path: path.stat().st_mtime_ns for path in [base, *base.rglob("*")]}
    yield
    assert {path: path.stat().st_mtime_ns for path in [base, *base.rglob("*")]} == before


@pytest.fixture
def artefact(base: Path, tmp_path: Path) -> Path:
    return gazepatch.convert(base, tmp_path / "gaze", config=SETTINGS)


def test_convert_then_load(base: Path, artefact: Path) -> None:
    case = tiny("llava")
    model = gazepatch.load(artefact)
    assert gazepatch.inspect(model).settings == SETTINGS
    with gazepatch.patched(case.model, SETTINGS):
        expected = case.model.generate(**case.inputs, max_new_tokens=6, do_sample=False)
        share = gazepatch.stats(case.model).read_share
    assert torch.equal(model.generate(**case.inputs, max_new_tokens=6, do_sample=False), expected)
    assert gazepatch.stats(model).read_share == share < 1
    gazepatch.restore(model)
    dense = case.model(**case.inputs).logits
    assert torch.equal(model(**case.inputs).logits, dense)


@pytest.mark.parametrize("family", sorted(MODULES))
def test_every_family_goes_round(family: str, tmp_path: Path) -> None:
    """Converted, loaded, verified."""
    try:
        case = tiny(family)
    except KeyError:
        pytest.skip(f"no tiny {family}")
    case.model.save_pretrained(tmp_path / "base")
    gazepatch.convert(tmp_path / "base", tmp_path / "gaze")
    manifest = read(tmp_path / "gaze")
    manifest.check(case.model.config)
    assert manifest.model_type == family
    assert manifest.image_geometry
    try:
        model = gazepatch.load(tmp_path / "gaze")
    except ImportError as error:  # towers of timm, for which the tiny model has a stand-in
        pytest.skip(str(error).strip().partition("\n")[0])
    assert gazepatch.verify(model, case.inputs, steps=2).passed


def test_what_is_in_the_folder(base: Path, artefact: Path) -> None:
    assert sorted(path.name for path in artefact.iterdir()) == ["README.md", "gaze_config.json"]
    values = json.loads((artefact / "gaze_config.json").read_text(encoding="utf-8"))
    assert values == {
        "format_version": 1,
        "gazepatch_version": gazepatch.__version__,
        "transformers_version": transformers.__version__,
        "full": False,
        "base_model": str(base),
        "base_revision": None,
        "model_type": "llava",
        "hidden_size": tiny("llava").model.config.text_config.hidden_size,
        "num_hidden_layers": tiny("llava").model.config.text_config.num_hidden_layers,
        "image_geometry": values["image_geometry"],
        "processor_geometry": {},
        "key_layout": values["key_layout"],
        "gaze": SETTINGS.to_dict(),
        "provenance": None,
        "fidelity": None,
    }
    assert values["image_geometry"]["vision_config.patch_size"] == 4
    assert artefact.stat().st_mode & 0o777 == base.stat().st_mode & 0o777


def test_model_card(base: Path, artefact: Path) -> None:
    _, front, body = (artefact / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "gazepatch",
        "pipeline_tag": "image-text-to-text",
        "tags": ["gazepatch", "gaze-attention", "llava"],
    }
    assert "gazepatch.load(" in body and "| `budget` | `0.5` |" in body and "was not measured" in body


def test_save_writes_what_convert_writes(base: Path, artefact: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForImageTextToText.from_pretrained(base)
    with pytest.raises(PatchError, match="not patched"):
        gazepatch.save(model, tmp_path / "saved")
    gazepatch.apply(model, SETTINGS)
    saved = gazepatch.save(model, tmp_path / "saved")
    assert (saved / "gaze_config.json").read_text() == (artefact / "gaze_config.json").read_text()


def test_save_needs_a_base_model(tmp_path: Path) -> None:
    model = gazepatch.apply(tiny("llava").model)
    with pytest.raises(ArtefactError, match=r"save_pretrained\(folder\)"):
        gazepatch.save(model, tmp_path / "saved")


def test_relative_paths_become_absolute(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.parent)
    out = gazepatch.convert("base", tmp_path / "gaze")
    monkeypatch.chdir(tmp_path)
    assert read(out).base_model == str(base)
    assert gazepatch.is_patched(gazepatch.load("gaze"))


# ---- context tokens


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
    "empty": (lambda path: path.write_bytes(b""), "is no intact safetensors file"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is no intact safetensors file"),
    "header cut off": (lambda path: path.write_bytes(path.read_bytes()[:40]), "is no intact safetensors file"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"0"), "is no intact safetensors file"),
    "a pickle": (pickled, "is no intact safetensors file"),
    "a header of 2 GB": (claims_two_gigabytes, "is no intact safetensors file"),
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


# ---- one artefact of every format version, loaded for ever

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("version", [f"v{number + 1}" for number in range(FORMAT_VERSION)])
def test_golden(base: Path, version: str) -> None:
    case = tiny("llava")
    model = gazepatch.load(GOLDEN / version, base=base)
    settings = gazepatch.inspect(model).settings
    assert (settings.budget, settings.head_reduce, settings.dense_layers) == (0.5, "max", (1,))
    assert gazepatch.context_tokens_of(model)[:, 0].tolist() == pytest.approx([-0.8203, 0.1328], abs=1e-4)
    model.generate(**case.inputs, max_new_tokens=3, do_sample=False)
    assert 0.4 < gazepatch.stats(model).read_share < 0.7


# ---- refusals of convert


@pytest.mark.parametrize("model_type", ["llama", "bert", "never_heard_of"])
def test_other_architectures_are_refused(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UnsupportedModelError, match=f"no adapter for model type '{model_type}'; known: "):
        gazepatch.convert(tmp_path, tmp_path.parent / f"out-{model_type}")
    assert not (tmp_path.parent / f"out-{model_type}").exists()


def test_a_source_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(HubError, match="expected a folder or a Hub id, owner/name, got"):
        gazepatch.convert(tmp_path / "nothing here", tmp_path / "gaze")
    with pytest.raises(ArtefactError, match=r"expected a folder with config.json, got .* without it"):
        gazepatch.convert(tmp_path / "empty", tmp_path / "gaze")
    for text, message in {
        "{": "must be a JSON object",
        "[]": "must be a JSON object",
        '{"model_type": "llava", "text_config": 3}': "must be the configuration of a llava model",
    }.items():
        (tmp_path / "empty" / "config.json").write_text(text)
        with pytest.raises(ArtefactError, match=message):
            gazepatch.convert(tmp_path / "empty", tmp_path / "gaze")
    assert not (tmp_path / "gaze").exists()


def test_context_tokens_need_weights(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ask for 4 context tokens, which are trained weights, and none were given"):
        gazepatch.convert(base, tmp_path / "gaze", config=GazeConfig.paper())
    assert not (tmp_path / "gaze").exists()


def test_settings_that_do_not_fit(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dense_layers"):
        gazepatch.convert(base, tmp_path / "gaze", config=GazeConfig(dense_layers=(99,)))
    layers = tuple(range(read(gazepatch.convert(base, tmp_path / "other")).num_hidden_layers))
    with pytest.raises(UnsupportedModelError, match="dense_layers names them all"):
        gazepatch.convert(base, tmp_path / "gaze", config=GazeConfig(dense_layers=layers))
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_existing_output(base: Path, artefact: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="exists already"):
        gazepatch.convert(base, artefact)
    assert read(artefact).gaze == SETTINGS
    gazepatch.convert(base, artefact, force=True)
    assert read(artefact).gaze == GazeConfig()
    assert [path.name for path in tmp_path.iterdir()] == ["gaze"]


def test_force_replaces_nothing_but_artefacts(base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("more of it")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for name in ("mine", "file", "link"):
        with pytest.raises(ArtefactError, match="remove it yourself"):
            gazepatch.convert(base, tmp_path / name, force=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("where", [".", "gaze", ".."])
def test_the_base_model_is_never_written_to(base: Path, where: str) -> None:
    with pytest.raises(ArtefactError, match="outside the base model"):
        gazepatch.convert(base, base / where, force=True)


@pytest.mark.parametrize("force", [False, True])
def test_interrupted_writing_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    out = tmp_path / "gaze"
    if force:
        gazepatch.convert(base, out, config=SETTINGS)

    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(artefacts, "card_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gazepatch.convert(base, out, force=force)
    assert [path.name for path in tmp_path.iterdir()] == (["gaze"] if force else [])
    if force:
        assert read(out).gaze == SETTINGS


def test_a_failing_rename_brings_the_old_one_back(
    base: Path, artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if ".new-" in self.name:
            raise OSError("disk on fire")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="disk on fire"):
        gazepatch.convert(base, artefact, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["gaze"]
    assert read(artefact).gaze == SETTINGS


# ---- refusals of load

Change = Callable[[dict[str, Any]], object]
BAD: dict[str, tuple[Change, str]] = {
    "missing key": (lambda v: v.pop("hidden_size"), "missing key: hidden_size"),
    "unknown key": (lambda v: v.update(extra=1), "unknown key: extra"),
    "missing setting": (lambda v: v["gaze"].pop("budget"), "missing key in gaze: budget"),
    "unknown setting": (lambda v: v["gaze"].update(zoom=2), "unknown key in gaze: zoom"),
    "newer format": (lambda v: v.update(format_version=2, new="field"), "format version 2 is newer.*upgrade"),
    "older format": (lambda v: v.update(format_version=0), "format_version must be 1, got 0"),
    "format of wrong type": (lambda v: v.update(format_version="1"), "format_version must be int, got '1'"),
    "format true": (lambda v: v.update(format_version=True), "format_version must be int, got True"),
    "wrong type": (lambda v: v.update(hidden_size="64"), "hidden_size must be int, got '64'"),
    "settings of wrong type": (lambda v: v.update(gaze=[]), "gaze must be dict"),
    "geometry of wrong type": (lambda v: v.update(image_geometry=None), "image_geometry must be dict, got None"),
    "revision of wrong type": (lambda v: v.update(base_revision=7), "base_revision must be str or null"),
    "NaN": (lambda v: v["gaze"].update(budget=float("nan")), "budget must be a share"),
    "infinite": (lambda v: v["gaze"].update(budget=float("inf")), "budget must be a share"),
    "window": (lambda v: v["gaze"].update(window=[3, 3, 1]), "window must divide region"),
    "context tokens": (
        lambda v: v["gaze"].update(context_tokens=4),
        "expected a file context_tokens.safetensors, got nothing at",
    ),
    "other model type": (lambda v: v.update(model_type="qwen2_vl"), "model_type 'qwen2_vl', got 'llava'"),
    "other hidden size": (lambda v: v.update(hidden_size=12345), "hidden_size 12345, got "),
    "other layers": (lambda v: v.update(num_hidden_layers=99), "num_hidden_layers 99, got "),
    "other patches": (
        lambda v: v["image_geometry"].update({"vision_config.patch_size": 14}),
        r"image_geometry vision_config.patch_size = 14, got 4",
    ),
    "base moved": (lambda v: v.update(base_model="/no/such/folder"), "base model folder /no/such/folder not found"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_values(artefact: Path, change: Change, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_weights(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", no_weights)
    path = artefact / "gaze_config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ArtefactError, match=message):
        gazepatch.load(artefact)


TEXTS = {
    "not JSON": ("{", "must be JSON"),
    "empty": ("", "must be JSON"),
    "cut off": ('{"format_version": 1, "gaze": {"bud', "must be JSON"),
    "a list": ("[]", "must be a JSON object, got list"),
    "twice": ('{"format_version": 1, "format_version": 1}', "'format_version' stands there twice"),
    "not UTF-8": ("\udcff", "must be JSON"),
}


@pytest.mark.parametrize(("text", "message"), TEXTS.values(), ids=TEXTS)
def test_bad_files(artefact: Path, text: str, message: str) -> None:
    (artefact / "gaze_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ArtefactError, match=message):
        gazepatch.load(artefact)


def test_things_that_are_no_artefact(base: Path, artefact: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, message in {
        tmp_path / "empty": "no gaze_config.json",
        base: "gazepatch.apply to a plain model",
        artefact / "gaze_config.json": "got a file",
        tmp_path / "nothing": "expected a folder or a Hub id",
    }.items():
        with pytest.raises(GazeError, match=message):
            gazepatch.load(path)


def test_a_base_that_moved_is_named_by_hand(base: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(base, first)
    out = gazepatch.convert(first, tmp_path / "gaze")
    first.rename(second)
    with pytest.raises(ArtefactError, match=r"gazepatch.load\(..., base=...\)"):
        gazepatch.load(out)
    assert gazepatch.is_patched(gazepatch.load(out, base=second))


def test_load_passes_arguments_on(artefact: Path) -> None:
    assert gazepatch.load(artefact, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_hub_ids(base: Path, artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def download(repo: str, **kwargs: Any) -> str:
        asked.update(kwargs, repo=repo)
        return str(artefact)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert gazepatch.is_patched(gazepatch.load("somebody/gaze", revision="v1", token="secret"))
    assert asked == {
        "repo": "somebody/gaze",
        "revision": "v1",
        "allow_patterns": ["gaze_config.json", "README.md", "context_tokens.safetensors", "lora/*"],
        "token": "secret",
    }


def test_hub_errors_become_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(repo: str, **kwargs: Any) -> str:
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(HubError, match=r"fetching somebody/gaze failed: .*: no network at all; then try again"):
        gazepatch.load("somebody/gaze")
