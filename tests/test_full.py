"""Full artefacts: checkpoints with their weights, which plain transformers loads as well."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import tiny
from tiny_reader import write_reader
from transformers import AutoProcessor

import gazepatch
from gazepatch import ArtefactError, GazeConfig
from gazepatch.artefact import checkpoint as checkpoints
from gazepatch.artefact.manifest import read

SETTINGS = GazeConfig(region=(4, 4, 1), window=None, budget=0.5, min_visual_tokens=0, prefill="gaze")


def tokens() -> torch.Tensor:
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(1))


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of several shards with what else lies in such folders."""
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny("llava").model.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    for name in ("tokenizer.json", "processor_config.json", "additional_chat_templates/tools.jinja", "LICENSE"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    for name in ("pytorch_model.bin", "optimizer.pt", "modeling.py", "consolidated.safetensors", ".secret"):
        (folder / name).write_text("not for you")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Base\n")
    (folder / "checkpoint-7").mkdir()
    (folder / "checkpoint-7" / "trainer_state.json").write_text("{}")
    before = digest(folder)
    yield folder
    assert digest(folder) == before


@pytest.fixture
def full(base: Path, tmp_path: Path) -> Path:
    return gazepatch.convert(base, tmp_path / "full", config=SETTINGS, context_tokens=tokens(), full=True)


def test_it_holds_the_models_own_files(base: Path, full: Path) -> None:
    ours = {"gaze_config.json", "README.md", "context_tokens.safetensors"}
    kept = {path.name for path in base.glob("model-*.safetensors")} | {"model.safetensors.index.json", "LICENSE"}
    kept |= {"generation_config.json", "tokenizer.json", "processor_config.json"}
    kept.add("additional_chat_templates/tools.jinja")
    found, source = digest(full), digest(base)
    assert found.keys() == ours | kept | {"config.json"}
    assert all(found[name] == source[name] for name in kept)
    own, theirs = (json.loads((folder / "config.json").read_text()) for folder in (full, base))
    assert own == theirs | {"gaze": read(full).gaze.to_dict()}
    assert read(full).full and read(full).base_model is None and str(base) not in (full / "README.md").read_text()


def test_plain_transformers_loads_it(full: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = tiny("llava")
    transformers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING, "transformers"):
        model, info = transformers.AutoModelForImageTextToText.from_pretrained(full, output_loading_info=True)
    transformers.utils.logging.disable_propagation()
    assert not caplog.records
    assert not any(info.values()), info
    assert torch.equal(model.eval()(**case.inputs).logits, case.model(**case.inputs).logits)


def test_it_gazes_as_the_adapter_does(base: Path, full: Path, tmp_path: Path) -> None:
    case = tiny("llava")
    adapter = gazepatch.convert(base, tmp_path / "adapter", config=SETTINGS, context_tokens=tokens())
    said = []
    for path in (full, adapter):
        model = gazepatch.load(path)
        assert gazepatch.inspect(model).settings == read(full).gaze
        said.append(model.generate(**case.inputs, max_new_tokens=6, do_sample=False))
    assert torch.equal(*said)
    assert gazepatch.stats(model).context_entries > 0


def test_it_can_move(full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = full.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert gazepatch.is_patched(gazepatch.load("elsewhere"))
    with pytest.raises(ArtefactError, match="brings its own weights, so base must not be given"):
        gazepatch.load(moved, base=tmp_path)


def test_links_share_the_weights_alone(base: Path, tmp_path: Path) -> None:
    linked = gazepatch.convert(base, tmp_path / "linked", config=SETTINGS, full=True, link=True)
    for path in linked.rglob("*.*"):
        same = (other := base / path.relative_to(linked)).exists() and path.samefile(other)
        assert same == (path.suffix == ".safetensors"), path
    assert gazepatch.is_patched(gazepatch.load(linked))


def test_copies_where_links_or_the_kernels_help_are_missing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(checkpoints._NOT_IN_KERNEL[0], "another file system")

    monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr(os, "copy_file_range", refused, raising=False)
    monkeypatch.setattr(checkpoints, "_CHUNK_BYTES", 1000)
    seen: list[tuple[int, int]] = []
    out = gazepatch.convert(base, tmp_path / "out", full=True, link=True, progress=lambda *at: seen.append(at))
    assert all((out / path.name).read_bytes() == path.read_bytes() for path in base.glob("model-*"))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert {total for _, total in seen} == {seen[-1][0]}


def test_a_full_disk_leaves_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full_disk, raising=False)
    monkeypatch.setattr(os, "write", full_disk)
    with pytest.raises(ArtefactError, match=r"out cannot be written: No space left on device; make room there, or ch"):
        gazepatch.convert(base, tmp_path / "out", full=True)
    assert list(tmp_path.iterdir()) == []


def test_one_file_of_weights(tmp_path: Path) -> None:
    write_reader(tmp_path / "reader")
    full = gazepatch.convert(tmp_path / "reader", tmp_path / "full", full=True)
    assert (full / "model.safetensors").is_file()
    transformers.AutoProcessor.from_pretrained(full)
    assert gazepatch.is_patched(gazepatch.load(full))


def test_an_artefact_is_not_converted_again(full: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="artefact of gazepatch already: take a copy of its folder without gaze_co"):
        gazepatch.convert(full, tmp_path / "again", full=True)
    plain = shutil.copytree(full, tmp_path / "plain", ignore=shutil.ignore_patterns("gaze_config.json"))
    again = gazepatch.convert(plain, tmp_path / "again", full=True, config=GazeConfig(budget=3))
    assert read(again).gaze.budget == 3 and gazepatch.is_patched(gazepatch.load(again))


def test_a_trained_model_is_saved_whole(base: Path, tmp_path: Path) -> None:
    case = tiny("llava")
    model = gazepatch.load(gazepatch.convert(base, tmp_path / "adapter", config=SETTINGS, context_tokens=tokens()))
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    out = gazepatch.save(model, tmp_path / "full", full=True, provenance={"trainable": "full"})
    assert "trained with gaze" in (out / "README.md").read_text()
    assert (
        len({path.stat().st_mode for path in out.iterdir() if path.is_file()}) == 1
    )  # whoever may read one file may read all
    again = gazepatch.load(out)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert torch.equal(again(**case.inputs).logits, model(**case.inputs).logits)


def test_the_type_is_that_of_the_weights(tmp_path: Path) -> None:
    case = tiny("emu3")  # whose text decoder comes first
    model = case.model.bfloat16()
    context = torch.nn.Parameter(torch.randn(3, model.config.text_config.hidden_size))
    gazepatch.apply(model, SETTINGS, context_tokens=context)
    assert model.dtype == torch.float32  # that of what learns
    out = gazepatch.save(model, tmp_path / "full", full=True)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = gazepatch.load(out)
    assert {held.dtype for held in loaded.parameters()} == {torch.bfloat16}


def test_what_belongs_beside_the_weights_is_saved_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = write_reader(tmp_path / "base")
    (base / "LICENSE").write_text("free")
    model = gazepatch.load(gazepatch.convert(base, tmp_path / "adapter", config=SETTINGS))
    out = gazepatch.save(model, tmp_path / "full", full=True)
    own = {"config.json", "gaze_config.json", "README.md"}
    assert digest(out).keys() == digest(base).keys() | own
    assert {name: of for name, of in digest(out).items() if name not in own} == {
        name: of for name, of in digest(base).items() if name not in own
    }
    assert type(AutoProcessor.from_pretrained(out)) is type(AutoProcessor.from_pretrained(base))
    assert caplog.messages == []


def test_a_given_processor_is_saved_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = write_reader(tmp_path / "base")
    model = gazepatch.load(gazepatch.convert(base, tmp_path / "adapter", config=SETTINGS))
    processor = AutoProcessor.from_pretrained(base)
    processor.tokenizer.model_max_length = 77
    (base / "vocab.txt").write_text("not for you")
    out = gazepatch.save(model, tmp_path / "full", full=True, processor=processor)
    assert AutoProcessor.from_pretrained(out).tokenizer.model_max_length == 77 and not (out / "vocab.txt").exists()
    assert caplog.messages == []


def test_weights_are_saved_without_a_processor_but_not_in_silence(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone = tmp_path / "gone"
    shutil.copytree(base, gone)
    model = gazepatch.load(gazepatch.convert(gone, tmp_path / "adapter", config=SETTINGS))
    shutil.rmtree(gone)
    assert gazepatch.is_patched(gazepatch.load(gazepatch.save(model, tmp_path / "full", full=True)))
    assert f"the processor of {gone} cannot be had: expected a folder or a Hub id" in caplog.text
    assert "full has no processor: put it there with processor.save_pretrained(" in caplog.text


def test_a_model_from_nowhere_is_saved_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = gazepatch.apply(tiny("llava").model, SETTINGS)
    out = gazepatch.save(model, tmp_path / "full", full=True)
    assert "full has no processor" in caplog.text
    gazepatch.restore(model)
    assert read(out).base_model is None
    assert gazepatch.is_patched(gazepatch.load(out))


# ---- damage

Damage = Callable[[Path], object]


def change(name: str, edit: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        edit(values)
        (folder / name).write_text(json.dumps(values))

    return damage


def a_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


SOURCE_DAMAGE: dict[str, tuple[Damage, str]] = {
    "no weights": (
        lambda f: [path.unlink() for path in f.glob("model*")],
        "expected model.safetensors or model.safetensors.index.json in .*, got neither",
    ),
    "missing shard": (lambda f: a_shard(f).unlink(), "lacks model-00001-of-.*, which its index names"),
    "cut shard": (lambda f: a_shard(f).write_bytes(a_shard(f).read_bytes()[:-1]), "is not a valid safetensors file"),
    "index of nothing": (change("model.safetensors.index.json", lambda v: v.clear()), "must map tensors to shards"),
    "index no JSON": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "must map tensors to shards"),
    "index nested without end": (
        lambda f: (f / "model.safetensors.index.json").write_text("[" * 200_000),
        "must map tensors to shards",
    ),
    "index empty": (change("model.safetensors.index.json", lambda v: v["weight_map"].clear()), "at least one shard"),
    "index leads outside": (
        change("model.safetensors.index.json", lambda v: v["weight_map"].update(x="../../etc/passwd")),
        "must name safetensors files beside it, got ../../etc/passwd",
    ),
    "index names a pickle": (
        change("model.safetensors.index.json", lambda v: v["weight_map"].update(x="pytorch_model.bin")),
        "must name safetensors files beside it, got pytorch_model.bin",
    ),
}


@pytest.mark.parametrize(("damage", "message"), SOURCE_DAMAGE.values(), ids=SOURCE_DAMAGE)
def test_damaged_sources(base: Path, tmp_path: Path, damage: Damage, message: str) -> None:
    damage(shutil.copytree(base, tmp_path / "source") and tmp_path / "source")
    with pytest.raises(ArtefactError, match=message):
        gazepatch.convert(tmp_path / "source", tmp_path / "out", full=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


DAMAGE: dict[str, tuple[Damage, str]] = {
    "missing shard": SOURCE_DAMAGE["missing shard"],
    "cut shard": SOURCE_DAMAGE["cut shard"],
    "other settings": (change("config.json", lambda v: v["gaze"].update(budget=0.1)), "settings in .* differ"),
    "no settings": (change("config.json", lambda v: v.pop("gaze")), "settings in .*config.json differ"),
    "no config": (lambda f: (f / "config.json").unlink(), "expected a folder with config.json"),
    "other weights": (
        lambda f: tiny("llava_next").model.save_pretrained(f / "x") or (f / "x/model.safetensors").rename(a_shard(f)),
        "made for a model with key_layout",
    ),
    "other patches": (
        change("processor_config.json", lambda v: v.update(image_processor={"patch_size": 99})),
        "made for a model with processor_geometry patch_size = 4, got 99",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_checkpoints(
    base: Path, tmp_path: Path, damage: Damage, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_weights(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    source = shutil.copytree(base, tmp_path / "source")
    (source / "processor_config.json").write_text(json.dumps({"image_processor": {"patch_size": 4}}))
    out = gazepatch.convert(source, tmp_path / "out", full=True)
    assert read(out).processor_geometry == {"patch_size": 4}
    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", no_weights)
    damage(out)
    with pytest.raises(ArtefactError, match=message):
        gazepatch.load(out)


def test_a_base_with_other_weights_is_refused(base: Path, tmp_path: Path) -> None:
    source = shutil.copytree(base, tmp_path / "source")
    out = gazepatch.convert(source, tmp_path / "gaze")
    tiny("llava").model.save_pretrained(source, max_shard_size="1MB")  # the same in fewer shards
    (source / "model.safetensors.index.json").unlink(missing_ok=True)
    assert gazepatch.is_patched(gazepatch.load(out))
    other = tiny("llava").model
    other.lm_head = torch.nn.Linear(64, 1001, bias=False)
    other.save_pretrained(source)
    with pytest.raises(ArtefactError, match="made for a model with key_layout"):
        gazepatch.load(out)


# ---- the card


def test_the_licence_is_inherited(base: Path, full: Path) -> None:
    card = (full / "README.md").read_text()
    assert "license: apache-2.0" in card and "language" not in card
    assert "Plain transformers loads the same folder" in card


def test_a_base_on_the_hub_is_named_in_the_metadata() -> None:
    from dataclasses import replace

    from huggingface_hub import ModelCard

    from gazepatch.artefact.card import card_of
    from gazepatch.artefact.manifest import Manifest

    manifest = Manifest.of(tiny("llava").model.config, SETTINGS, "some-org/model")
    for full, relation in ((False, "adapter"), (True, "finetune")):
        data = ModelCard(card_of(replace(manifest, full=full), {"license": "mit"})).data.to_dict()
        assert data["base_model"] == "some-org/model" and data["base_model_relation"] == relation
        assert data["license"] == "mit" and data["library_name"] == "gazepatch"
    assert "base_model" not in ModelCard(card_of(replace(manifest, base_model="/home/me/model"))).data.to_dict()


def test_the_card_of_a_model_that_was_changed(base: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForImageTextToText.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    for provenance, said, unsaid in (
        (None, "as they were when it was made", "trained with gaze"),
        ({"trainable": "full"}, "those of the model, trained with gaze", "as they were"),
    ):
        with gazepatch.patched(model, SETTINGS):
            out = gazepatch.save(model, tmp_path / "full", full=True, provenance=provenance, force=True)
        card = (out / "README.md").read_text()
        assert said in card and unsaid not in card.partition("## Settings")[0]
        assert not any(word in card for word in ("unchanged", "nobody"))
