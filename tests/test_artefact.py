"""Artefacts: what is written, what is refused, and that nothing half-written is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from tiny import tiny

import gazepatch
from gazepatch import ArtefactError, ConfigError, GazeConfig, PatchError, UnsupportedModelError
from gazepatch import artefact as artefacts
from gazepatch.manifest import read
from gazepatch.registry import MODULES

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
def test_every_family_converts(family: str, tmp_path: Path) -> None:
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


def test_what_is_in_the_folder(base: Path, artefact: Path) -> None:
    assert sorted(path.name for path in artefact.iterdir()) == ["README.md", "gaze_config.json"]
    values = json.loads((artefact / "gaze_config.json").read_text(encoding="utf-8"))
    assert values == {
        "format_version": 1,
        "gazepatch_version": gazepatch.__version__,
        "transformers_version": transformers.__version__,
        "base_model": str(base),
        "base_revision": None,
        "model_type": "llava",
        "hidden_size": tiny("llava").model.config.text_config.hidden_size,
        "num_hidden_layers": tiny("llava").model.config.text_config.num_hidden_layers,
        "image_geometry": values["image_geometry"],
        "gaze": SETTINGS.to_dict(),
        "provenance": None,
        "fidelity": None,
    }
    assert values["image_geometry"]["vision_config.patch_size"] == 4
    assert artefact.stat().st_mode & 0o777 == base.stat().st_mode & 0o777


def test_model_card(base: Path, artefact: Path) -> None:
    _, front, body = (artefact / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": str(base),
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


# ---- refusals of convert


@pytest.mark.parametrize("model_type", ["llama", "blip", "never_heard_of"])
def test_other_architectures_are_refused(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UnsupportedModelError, match=f"no adapter for model type '{model_type}'; known: "):
        gazepatch.convert(tmp_path, tmp_path.parent / f"out-{model_type}")
    assert not (tmp_path.parent / f"out-{model_type}").exists()


def test_a_source_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", tmp_path / "nothing here"):
        with pytest.raises(ArtefactError, match="expected the folder or the Hub id of a model"):
            gazepatch.convert(source, tmp_path / "gaze")
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(ArtefactError, match="expected the folder or the Hub id of a model"):
        gazepatch.convert(tmp_path / "empty", tmp_path / "gaze")


def test_context_tokens_need_weights(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="context tokens are trained weights"):
        gazepatch.convert(base, tmp_path / "gaze", config=GazeConfig.paper())


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

    def interrupted(manifest: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(artefacts, "model_card", interrupted)
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
    "context tokens": (lambda v: v["gaze"].update(context_tokens=4), "context tokens are trained weights"),
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
        tmp_path / "nothing": "expected the folder or the Hub id of an artefact",
    }.items():
        with pytest.raises(ArtefactError, match=message):
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
        "allow_patterns": ["gaze_config.json", "README.md"],
        "token": "secret",
    }


def test_hub_errors_become_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(repo: str, **kwargs: Any) -> str:
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ArtefactError, match=r"'somebody/gaze', .*: no network at all"):
        gazepatch.load("somebody/gaze")
