"""Training: what is read, what is learned, how it goes on after a crash or on two processes, and what it leaves."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import IMAGE, VOCAB, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

import gazepatch
from gazepatch import (
    ArtefactError,
    CacheError,
    ConfigError,
    GazeConfig,
    HubError,
    PatchError,
    TrainConfig,
    TrainingError,
)
from gazepatch.cli import main
from gazepatch.demo.checkpoint import CHAT_TEMPLATE
from gazepatch.manifest import read
from gazepatch.patch import dense, patch_of, set_budget
from gazepatch.training.chat import Collator, supervised
from gazepatch.training.checkpoints import Work
from gazepatch.training.objectives import agreed, distill, next_token
from gazepatch.training.records import read_records
from gazepatch.training.schedule import Schedule
from gazepatch.training.trainer import GazeTrainer

SIDE_PX = 32  # 8 x 8 visual tokens
SPECIAL = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<|im_start|>": 3, "<|im_end|>": 4, "user": 5, "assistant": 6, "\n": 7}
CONFIG = GazeConfig.paper(region=(2, 2, 1), context_tokens=2)
QUICK: dict[str, Any] = {"steps": 6, "batch_size": 2, "save_every": 2, "log_every": 2, "learning_rate": 0.05}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA with a processor, whose words are w8, w9, ..."""
    folder = tmp_path_factory.mktemp("models") / "llava"
    tiny("llava").model.save_pretrained(folder)
    words = SPECIAL | {f"w{i}": i for i in range(len(SPECIAL), VOCAB) if i != IMAGE} | {"<image>": IMAGE}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.add_special_tokens({"additional_special_tokens": ["<image>", "<|im_start|>", "<|im_end|>"]})
    size = {"height": SIDE_PX, "width": SIDE_PX}
    images = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)
    LlavaProcessor(
        images,
        fast,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight conversations about pictures of noise, of one and of two turns."""
    folder, generator = tmp_path_factory.mktemp("data"), torch.Generator().manual_seed(5)

    def words(count: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(8, 900, (count,), generator=generator).tolist())

    lines = []
    for number in range(8):
        write_image(folder / f"{number}.png", number)
        turns = [("user", f"<image> {words(3)}"), ("assistant", words(8))]
        turns += [("user", words(2)), ("assistant", words(5))] * (number % 2)
        messages = [{"role": role, "content": content} for role, content in turns]
        lines.append(json.dumps({"messages": messages, "images": [f"{number}.png"]}))
    path = folder / "talk.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_image(path: Path, seed: int) -> Path:
    noise = torch.randint(0, 256, (SIDE_PX, SIDE_PX, 3), generator=torch.Generator().manual_seed(seed))
    Image.fromarray(noise.to(torch.uint8).numpy()).save(path)
    return path


@pytest.fixture
def processor(base: Path) -> Any:
    return transformers.AutoProcessor.from_pretrained(base)


def trained(base: Path, data: Path, out: Path, config: GazeConfig = CONFIG, **settings: Any) -> Path:
    return gazepatch.train(base, data, out, config=config, progress=False, **{**QUICK, **settings})


def tokens_of(folder: Path) -> torch.Tensor:
    return load_file(folder / "context_tokens.safetensors")["context_tokens"]


@torch.no_grad()
def agreement(model: Any, processor: Any, data: Path, teacher: Any = None) -> float:
    """Share of next tokens along the answers that are those of the same model read densely, or of another one."""
    collator, records = Collator(processor), read_records(data)
    batch = collator([records[number] for number in range(len(records))])
    columns, kept, tokens = supervised(batch.pop("labels"))
    student = model(**batch, use_cache=False, logits_to_keep=columns).logits[kept]
    if teacher is None:
        with dense(model):
            expected = model(**batch, use_cache=False, logits_to_keep=columns).logits[kept]
    else:
        expected = teacher(**batch, use_cache=False, logits_to_keep=columns).logits[kept]
    return int(agreed(student, expected)) / len(tokens)


# ---- reading densely, and other budgets, without taking the patch off


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
@torch.no_grad()
def test_dense_is_the_unpatched_model_bit_for_bit(family: str) -> None:
    case = tiny(family)
    before = case.model(**case.inputs).logits
    answer = case.model.generate(**case.inputs, max_new_tokens=4)
    tokens = gazepatch.initial_context_tokens(case.model, 2)
    gazepatch.apply(case.model, GazeConfig.paper(region=(2, 2, 1), context_tokens=2), context_tokens=tokens)
    gazing = case.model(**case.inputs).logits
    assert not torch.equal(gazing, before)
    with dense(case.model):
        assert torch.equal(case.model(**case.inputs).logits, before)
        with dense(case.model):
            assert torch.equal(case.model(**case.inputs).logits, before)
        assert torch.equal(case.model.generate(**case.inputs, max_new_tokens=4), answer)
    assert torch.equal(case.model(**case.inputs).logits, gazing)


@torch.no_grad()
def test_a_cache_stays_on_its_side_of_dense() -> None:
    case = tiny("llava")
    gazepatch.apply(case.model, min_visual_tokens=0)
    step = {"input_ids": torch.tensor([[9]])}
    gazed = case.model(**case.inputs, use_cache=True).past_key_values
    with dense(case.model):
        with pytest.raises(CacheError, match="filled by a patched model"):
            case.model(**step, past_key_values=gazed)
        plain = case.model(**case.inputs, use_cache=True).past_key_values
    with pytest.raises(CacheError, match="filled by a model that was not patched"):
        case.model(**step, past_key_values=plain)


def test_dense_ends_with_an_error() -> None:
    case = tiny("llava")
    with pytest.raises(PatchError, match="not patched"), dense(case.model):
        pass
    gazepatch.apply(case.model)
    with pytest.raises(KeyError), dense(case.model):
        raise KeyError
    assert not patch_of(case.model).runtime.running.dense


@torch.no_grad()
def test_the_budget_can_change_under_an_optimiser() -> None:
    case = tiny("llava")
    tokens = torch.nn.Parameter(gazepatch.initial_context_tokens(case.model, 2))
    gazepatch.apply(case.model, CONFIG, context_tokens=tokens, budget=3)
    expected = case.model(**case.inputs).logits
    set_budget(case.model, 1.0)
    assert not torch.equal(case.model(**case.inputs).logits, expected)
    assert gazepatch.context_tokens_of(case.model) is tokens
    set_budget(case.model, 3)
    assert torch.equal(case.model(**case.inputs).logits, expected)
    assert patch_of(case.model).config.budget == 3
    with pytest.raises(ConfigError, match="budget must be"):
        set_budget(case.model, 0.0)
    assert patch_of(case.model).config.budget == 3


# ---- the schedule


@pytest.mark.parametrize(
    ("final", "share", "stages"),
    [
        (0.125, 0.5, ((0, 1.0), (16, 0.5), (33, 0.25), (50, 0.125))),
        (0.1, 0.4, ((0, 1.0), (10, 0.8), (20, 0.4), (30, 0.2), (40, 0.1))),
        (2, 1.0, ((0, 1.0), (25, 16), (50, 8), (75, 4), (100, 2))),
        (0.6, 0.5, ((0, 1.0), (50, 0.6))),
        (0.1, 0.0, ((0, 0.1),)),
        (1.0, 0.5, ((0, 1.0),)),
    ],
)
def test_schedule(final: float | int, share: float, stages: tuple[tuple[int, float | int], ...]) -> None:
    schedule = Schedule.falling(final, steps=100, share=share)
    assert schedule.stages == stages
    for first, budget in stages:
        assert schedule.budget(first) == budget
        assert type(schedule.budget(first)) is type(budget)
    assert schedule.budget(1000) == stages[-1][1]


def test_a_short_training_ends_with_the_final_budget() -> None:
    assert Schedule.falling(0.1, steps=1, share=0.5).budget(0) == 0.1


# ---- records

TURNS = [{"role": "user", "content": "w8"}, {"role": "assistant", "content": "w9"}]


def one_record(folder: Path, values: Any) -> Any:
    path = folder / "one.jsonl"
    path.write_text("\n" + (values if isinstance(values, str) else json.dumps(values)) + "\n")
    return read_records(path)[0]


def test_both_forms_of_records(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 0)
    place, user, said = {"type": "image"}, {"type": "text", "text": "w8"}, {"type": "text", "text": "w9"}
    expected = [{"role": "user", "content": [place, user]}, {"role": "assistant", "content": [said]}]
    listed = [{"role": "user", "content": [place, user]}, {"role": "assistant", "content": [said]}]
    inside = [{"role": "user", "content": [{"type": "image", "image": "a.png"}, user]}, TURNS[1]]
    llava = [{"from": "human", "value": "<image>w8"}, {"from": "gpt", "value": "w9"}]
    for values in (
        {"messages": TURNS, "images": ["a.png"]},
        {"messages": listed, "images": ["a.png"]},
        {"messages": inside},
        {"conversations": llava, "image": "a.png", "id": 7},
    ):
        record = one_record(tmp_path, values)
        assert (record.messages, record.images, record.where) == (expected, ["a.png"], "one.jsonl, line 2")


def test_embedded_images(tmp_path: Path) -> None:
    from gazepatch.training.images import open_image

    path = write_image(tmp_path / "a.png", 0)
    text = base64.b64encode(path.read_bytes()).decode()
    expected = Image.open(path).convert("RGB")
    held: list[Any] = [str(path), "a.png", f"data:image/png;base64,{text}", {"bytes": text}]
    held += [{"bytes": path.read_bytes(), "path": None}, {"path": "a.png"}, expected]
    for image in held:
        assert open_image(image, tmp_path, "here").tobytes() == expected.tobytes()
    for wrong in ("data:image/png;base64,@@", {"bytes": "AAAA"}):
        with pytest.raises(TrainingError, match="here: an image cannot be read"):
            open_image(wrong, tmp_path, "here")


BROKEN: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "line 2: must be JSON"),
    "no object": ("3", "must be a JSON object, got int"),
    "no messages": ({"text": "w8"}, "expected a list 'messages'.* got the keys text"),
    "empty": ({"messages": []}, "expected a list 'messages'"),
    "no assistant": ({"messages": TURNS[:1]}, "expected a message of the assistant"),
    "no role": ({"messages": [{"content": "w8"}]}, "message 0 must have a 'role'"),
    "no content": ({"messages": [{"role": "user"}]}, "message 0 must have 'content'"),
    "text as message": ({"messages": ["w8"]}, "message 0 must be an object, got str"),
    "other part": ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "message 0 may hold"),
    "too few images": ({"conversations": [{"from": "human", "value": "<image>"}, TURNS[1]]}, "for each of 1 .* got 0"),
    "missing image": ({"messages": TURNS, "images": ["no.png"]}, "line 2: no image at .*no.png"),
    "address": ({"messages": TURNS, "images": ["https://x.org/a.png"]}, "not fetched from the network"),
    "number": ({"messages": TURNS, "images": 3}, "images must be a list, got 3"),
    "numbers": ({"messages": TURNS, "images": [3]}, "an image must be a path"),
}


@pytest.mark.parametrize(("values", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_records(values: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=message):
        one_record(tmp_path, values if isinstance(values, str) else json.dumps(values))


def test_where_records_may_be(tmp_path: Path, data: Path) -> None:
    assert len(read_records(data.parent)) == len(read_records(data)) == 8
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps([{"messages": TURNS}] * 3))
    assert [len(read_records(tmp_path)), read_records(listed)[2].where] == [3, "list.json, record 3"]
    with pytest.raises(IndexError):
        read_records(listed)[3]
    listed.write_text(json.dumps([{"messages": TURNS}, {}]))
    with pytest.raises(TrainingError, match=r"list\.json, record 2: expected a list 'messages'"):
        read_records(listed)
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(TrainingError, match="expected records, got none"):
        read_records(tmp_path)
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(TrainingError, match=r"one file of records .* got a.jsonl, b.jsonl"):
        read_records(tmp_path)
    with pytest.raises(TrainingError, match="got nothing at"):
        read_records(tmp_path / "c.jsonl")


def test_sets_of_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TrainingError, match="pip install datasets"):
        read_records("owner/talk")

    class Rows(list[Any]):
        _fingerprint = "f00"

    picture = Image.new("RGB", (SIDE_PX, SIDE_PX))
    rows = Rows([{"messages": TURNS, "images": [picture]}, {"messages": []}])
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda name, split: rows))
    records = read_records("owner/talk")
    assert (records.name, records.digest, len(records), records[0].images) == ("owner/talk", "f00", 2, [picture])
    with pytest.raises(TrainingError, match="owner/talk, record 2: expected a list"):
        records[1]


# ---- the assistant's tokens


def labelled(processor: Any, folder: Path, *records: Mapping[str, Any]) -> list[str]:
    """The text that each record is trained on."""
    path = folder / "some.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    read = read_records(path)
    batch = Collator(processor)([read[number] for number in range(len(read))])
    return [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]


def test_labels_are_what_the_assistant_says(processor: Any, tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 0)
    write_image(tmp_path / "b.png", 1)
    short = {"messages": TURNS, "images": ["a.png"]}
    turns = ["<image> w8", "w20 w21", "w10 <image> w11", "w22", "w12", "w23 w24 w25"]
    long = {
        "messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)],
        "images": ["a.png", "b.png"],
    }
    first, second = labelled(processor, tmp_path, short, long)
    assert first == "w9 <|im_end|>"
    assert second == "w20 w21 <|im_end|> w22 <|im_end|> w23 w24 w25 <|im_end|>"


def test_labels_with_a_generation_prompt_that_is_longer_than_history(processor: Any, tmp_path: Path) -> None:
    processor.chat_template = CHAT_TEMPLATE.replace("assistant\n{% endif %}", "assistant\nw900 \n{% endif %}")
    assert labelled(processor, tmp_path, {"messages": TURNS}) == ["w9 <|im_end|>"]


def test_labels_where_tokens_merge_over_the_cut(processor: Any, tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 0)
    opening = "<|im_start|>{{ message.role }}\nw8"  # and an answer 01 make the token w801
    processor.chat_template = CHAT_TEMPLATE.replace("<|im_start|>{{ message.role }}\n", opening)
    processor.chat_template = processor.chat_template.replace("assistant\n", "assistant\nw8")
    turns = [{"role": "user", "content": " w9"}, {"role": "assistant", "content": "01 w20"}]
    for record in ({"messages": turns}, {"messages": turns * 2, "images": ["a.png"]}):
        expected = " ".join(["w801 w20 <|im_end|>"] * (len(record["messages"]) // 2))
        assert labelled(processor, tmp_path, record) == [expected]


def test_templates_that_do_not_do(processor: Any, base: Path, tmp_path: Path) -> None:
    template = "{% if messages|length > 2 %}{{ messages[-1].role }}{% else %}" + CHAT_TEMPLATE + "{% endif %}"
    processor.chat_template = template
    with pytest.raises(TrainingError, match="line 1: the chat template does not keep message 1"):
        labelled(processor, tmp_path, {"messages": TURNS * 2})
    processor.chat_template = CHAT_TEMPLATE.replace("{{ part.text }}", "")
    with pytest.raises(TrainingError, match="does not keep message 1"):
        labelled(processor, tmp_path, {"messages": TURNS})
    processor.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(TrainingError, match="line 1: the chat template refuses this conversation: roles must"):
        labelled(processor, tmp_path, {"messages": TURNS})
    processor.chat_template = None
    with pytest.raises(TrainingError, match="no chat template"):
        Collator(processor)
    with pytest.raises(TrainingError, match="a processor for images and text, got "):
        Collator(processor.tokenizer)


def test_an_image_that_is_damaged_names_its_line(processor: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(TrainingError, match=r"some.jsonl, line 1: an image cannot be read"):
        labelled(processor, tmp_path, {"messages": TURNS, "images": ["a.png"]})


def test_supervised_positions() -> None:
    none = -100
    columns, kept, tokens = supervised(torch.tensor([[none, none, 7, 8], [none, none, none, 9]]))
    assert (columns.tolist(), kept.tolist(), tokens.tolist()) == ([1, 2], [[True, True], [False, True]], [7, 8, 9])


def test_objectives() -> None:
    one, other = torch.randn(2, 5, 7)
    assert distill(one, one).item() == pytest.approx(0, abs=1e-6)
    p, q = other.softmax(-1), one.softmax(-1)
    torch.testing.assert_close(distill(one, other), (p * (p / q).log()).sum())
    torch.testing.assert_close(next_token(one, torch.arange(5)), -q[range(5), range(5)].log().sum())
    assert agreed(one, one) == 5


# ---- settings

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "objective": ({"objective": "nonsense"}, "objective must be one of distill, next-token, got 'nonsense'"),
    "trainable": ({"trainable": "tower"}, "trainable must be one of context, lora, full"),
    "steps": ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
    "epochs": ({"epochs": -1.0}, "epochs must be a number above 0"),
    "rate": ({"learning_rate": float("nan")}, "learning_rate must be a number above 0"),
    "schedule": ({"schedule": 1.5}, "schedule must be a number from 0 to 1"),
    "batch": ({"batch_size": True}, "batch_size must be an integer"),
    "parts": ({"batch_size": 3, "accumulate": 2}, "batch_size must be a multiple of accumulate, got 3 and 2"),
    "unknown": ({"learning_speed": 1}, "unknown training setting learning_speed; known: objective"),
}


@pytest.mark.parametrize(("settings", "message"), WRONG.values(), ids=WRONG)
def test_wrong_settings(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        gazepatch.train("model", "data.jsonl", tmp_path / "out", **settings)


def test_settings_must_fit_each_other(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="prefill must be 'gaze'"):
        trained(base, data, out, replace(CONFIG, prefill="dense"))
    with pytest.raises(ConfigError, match="context_tokens must be at least 1"):
        trained(base, data, out, replace(CONFIG, context_tokens=0))
    with pytest.raises(ConfigError, match="max_steps cannot be among the trainer's arguments"):
        trained(base, data, out, trainer_arguments={"max_steps": 3})
    with pytest.raises(ConfigError, match=r"transformers refuses the trainer's arguments: .*nonsense"):
        trained(base, data, out, trainer_arguments={"nonsense": 3})
    with pytest.raises(ConfigError, match="batch_size must be a multiple of processes x accumulate = 2 x 2, got 6"):
        TrainConfig(batch_size=6, accumulate=2).per_device(2)
    assert not out.exists() and not (tmp_path / "out.work").exists()


def test_outputs_that_are_refused_before_the_training(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="exists already"):
        trained(base, data, tmp_path)
    with pytest.raises(ArtefactError, match="outside the base model"):
        trained(base, data, base / "out")
    with pytest.raises(HubError, match="expected a folder or a Hub id"):
        trained(tmp_path / "none", data, tmp_path / "out")


def test_steps() -> None:
    assert TrainConfig(batch_size=4).steps_for(9) == 3
    assert TrainConfig(batch_size=4, epochs=0.1).steps_for(9) == 1
    assert TrainConfig(batch_size=4, epochs=1.5).steps_for(9) == 5
    assert TrainConfig(steps=7).steps_for(9) == 7


# ---- training


def test_training_raises_agreement_with_dense(base: Path, data: Path, tmp_path: Path, processor: Any) -> None:
    config = replace(CONFIG, context_tokens=8)
    settings: dict[str, Any] = {"steps": 40, "batch_size": 4, "learning_rate": 0.1, "save_every": 100}
    out = trained(base, data, tmp_path / "out", config, **settings)
    assert not (tmp_path / "out.work").exists()
    model = gazepatch.load(out)
    after = agreement(model, processor, data)
    tokens = gazepatch.initial_context_tokens(gazepatch.restore(model), 8)
    with gazepatch.patched(model, config, context_tokens=tokens):
        untrained = agreement(model, processor, data)
    with gazepatch.patched(model, replace(config, context_tokens=0)):
        without = agreement(model, processor, data)
    assert after >= max(untrained, without) + 0.1


def test_the_artefact_says_how_it_came_about(base: Path, data: Path, tmp_path: Path) -> None:
    out = trained(base, data, tmp_path / "out", seed=3)
    manifest = read(out)
    assert manifest.gaze == CONFIG and manifest.base_model == str(base)
    provenance = dict(manifest.provenance or {})
    assert provenance["versions"]["transformers"] == transformers.__version__
    expected = {"objective": "distill", "trainable": "context", "steps": 6, "epochs": 1.5, "batch_size": 2, "seed": 3}
    expected |= {"data": "talk.jsonl", "records": 8, "processes": 1, "learning_rate": 0.05}
    expected |= {"budgets": [[0, 1.0], [1, 0.5], [2, 0.25], [3, 0.125]], "data_digest": read_records(data).digest}
    assert expected.items() <= provenance.items()
    assert provenance["final_loss"] > 0 and 0 <= provenance["final_agreement_in_training"] <= 1
    assert '"objective": "distill"' in (out / "README.md").read_text()
    assert {path.name for path in out.iterdir()} == {"README.md", "context_tokens.safetensors", "gaze_config.json"}
    first = gazepatch.initial_context_tokens(gazepatch.restore(gazepatch.load(out)), 2, seed=3)
    assert not torch.allclose(tokens_of(out), first, atol=1e-3)


def test_next_token_lowers_the_loss_and_logs(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs: list[dict[str, Any]] = []
    log = GazeTrainer.log
    monkeypatch.setattr(GazeTrainer, "log", lambda self, entry, t=None: (log(self, entry, t), logs.append(entry)))
    trained(base, data, tmp_path / "out", objective="next-token", steps=20, batch_size=8, learning_rate=0.1)
    logs = [entry for entry in logs if "agreement" in entry]
    assert len(logs) == 10
    assert logs[-1]["loss"] < logs[0]["loss"] - 0.1
    assert [entry["budget"] for entry in logs] == [1.0, 0.5, 0.5, 0.25, 0.25, *[0.125] * 5]
    assert logs[0]["agreement"] > 0


def test_accumulation_changes_nothing(base: Path, data: Path, tmp_path: Path) -> None:
    whole = trained(base, data, tmp_path / "whole", batch_size=4)
    parts = trained(base, data, tmp_path / "parts", batch_size=4, accumulate=2)
    torch.testing.assert_close(tokens_of(parts), tokens_of(whole), rtol=1e-3, atol=1e-3)


def test_records_without_images(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "plain.jsonl"
    path.write_text(json.dumps({"messages": TURNS}) + "\n")
    out = trained(base, path, tmp_path / "out", steps=2, batch_size=1)
    torch.testing.assert_close(
        tokens_of(out), gazepatch.initial_context_tokens(gazepatch.restore(gazepatch.load(out)), 2)
    )


def test_a_loss_that_is_not_finite_ends_the_training(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gazepatch.training.trainer.distill", lambda student, teacher: student.sum() * float("nan"))
    with pytest.raises(TrainingError, match="the loss is nan at step 2: lower the learning rate"):
        trained(base, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lora(base: Path, data: Path, tmp_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    settings: dict[str, Any] = {"trainable": "lora", "steps": 30, "batch_size": 4, "learning_rate": 0.01}
    out = trained(base, data, tmp_path / "out", **settings, save_every=100)
    dense_model = transformers.AutoModelForImageTextToText.from_pretrained(base)
    model = gazepatch.load(out)
    after = agreement(model, processor, data, dense_model)
    with gazepatch.patched(dense_model, CONFIG, context_tokens=tokens_of(out)):
        before = agreement(dense_model, processor, data)
    assert after >= before + 0.1
    again = gazepatch.save(model, tmp_path / "again")
    saved, first = (load_file(folder / "lora" / "adapter_model.safetensors") for folder in (again, out))
    assert all(torch.equal(saved[name], first[name]) for name in first | saved)
    key = min(first)
    for keys, what in (
        ({k: v for k, v in first.items() if k != key}, "got 1 missing keys"),
        (first | {key.replace("layers.0", "layers.9"): first[key].clone()}, "got 1 unexpected keys"),
        (first | {key: torch.zeros(3, 3)}, "lora must"),
    ):
        save_file(keys, again / "lora" / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ArtefactError, match=what):
            gazepatch.load(again)
    monkeypatch.setattr("gazepatch.lora.find_spec", lambda name: None)
    with pytest.raises(ArtefactError, match="need the package peft"):
        gazepatch.load(out)
    (out / "lora").rename(tmp_path / "elsewhere")
    with pytest.raises(ArtefactError, match="must hold the folder lora"):
        gazepatch.load(out)


def test_lora_needs_peft(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gazepatch.lora.find_spec", lambda name: None if name == "peft" else object())
    with pytest.raises(TrainingError, match="pip install peft"):
        trained(base, data, tmp_path / "out", trainable="lora")


def test_full(base: Path, data: Path, tmp_path: Path, processor: Any) -> None:
    out = trained(base, data, tmp_path / "first", trainable="full", steps=30, batch_size=4, learning_rate=0.003)
    out = out.rename(tmp_path / "moved")  # it brings its base model, wherever it is
    assert read(out).full
    dense_model = transformers.AutoModelForImageTextToText.from_pretrained(base)
    after = agreement(gazepatch.load(out), processor, data, dense_model)
    with gazepatch.patched(dense_model, CONFIG, context_tokens=tokens_of(out)):
        before = agreement(dense_model, processor, data)
    assert after >= before + 0.1
    assert transformers.AutoProcessor.from_pretrained(out).chat_template == CHAT_TEMPLATE


# ---- going on


def killed_at(step: int, base: Path, data: Path, out: Path, settings: dict[str, Any]) -> None:
    """Train in another process, which is killed at the end of a step."""
    code = f"""
import os, signal, torch
from gazepatch.training import trainer
import gazepatch
torch.set_num_threads(1)
def kill(self, args, state, control, **kwargs):
    if state.global_step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
trainer.Lowering.on_step_end = kill
config = gazepatch.GazeConfig.from_dict({CONFIG.to_dict()!r})
gazepatch.train({str(base)!r}, {str(data)!r}, {str(out)!r}, config=config, progress=False, **{settings!r})
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr


def test_killed_it_goes_on_from_the_last_checkpoint(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out, work = trained(base, data, tmp_path / "whole"), tmp_path / "out", tmp_path / "out.work"
    killed_at(5, base, data, out, QUICK)
    assert not out.exists()
    assert [path.name for path in work.glob("checkpoint-*")] == ["checkpoint-4"]
    held = {path.name: path.stat().st_size for path in (work / "checkpoint-4").iterdir()}
    assert set(load_file(work / "checkpoint-4" / "trained.safetensors")) == {"model.language_model.gaze_context_tokens"}
    assert "model.safetensors" not in held and sum(held.values()) < 100_000, held
    # What a process leaves that was killed while it wrote a checkpoint.
    (work / "checkpoint-6").mkdir()
    with pytest.raises(TrainingError, match=r"out.work holds a training that was interrupted, with seed 0, .* has 1"):
        trained(base, data, out, seed=1)
    steps: list[int] = []
    step = GazeTrainer.training_step
    monkeypatch.setattr(
        GazeTrainer,
        "training_step",
        lambda self, *a, **k: (steps.append(self.state.global_step), step(self, *a, **k))[1],
    )
    trained(base, data, out)
    assert steps == [4, 5]
    assert not work.exists()
    torch.testing.assert_close(tokens_of(out), tokens_of(whole), rtol=0, atol=0)
    assert read(out).provenance == read(whole).provenance


def test_killed_before_the_artefact_is_written(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constant: dict[str, Any] = {"trainer_arguments": {"lr_scheduler_type": "constant"}}
    whole = trained(base, data, tmp_path / "whole", **constant)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gazepatch.training.run.save", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(base, data, tmp_path / "out", **constant)
    out = trained(base, data, tmp_path / "out", **constant)
    assert torch.equal(tokens_of(out), tokens_of(whole))
    assert read(out).provenance == read(whole).provenance


def test_what_is_in_the_way_of_the_working_folder(tmp_path: Path) -> None:
    work = tmp_path / "out.work"
    work.write_text("")
    with pytest.raises(TrainingError, match=r"out.work is in the way"):
        Work(tmp_path / "out", {}).open()
    work.unlink()
    work.mkdir()
    assert Work(tmp_path / "out", {"a": 1}).open() is None
    (work / "run.json").write_text("[")
    with pytest.raises(TrainingError, match=r"run.json is damaged"):
        Work(tmp_path / "out", {"a": 1}).open()


def test_two_processes_train_as_one(base: Path, data: Path, tmp_path: Path) -> None:
    talk = data.with_name("mixed.json")  # some records have no image, so that one process may have none
    talk.write_text(json.dumps([*map(json.loads, data.read_text().splitlines()), *[{"messages": TURNS}] * 4]))
    options = ["--region", "2,2,1", "--context-tokens", "2", *arguments(QUICK)]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    run = subprocess.run(
        [*command, "gazepatch.cli", "train", str(base), str(talk), "-o", str(tmp_path / "two"), *options],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    one, two = trained(base, talk, tmp_path / "one"), tmp_path / "two"
    assert (read(two).provenance or {})["processes"] == 2
    torch.testing.assert_close(tokens_of(two), tokens_of(one), rtol=1e-3, atol=1e-3)
    one_loss, two_loss = ((read(folder).provenance or {})["final_loss"] for folder in (one, two))
    assert two_loss == pytest.approx(one_loss, rel=1e-3)
    assert run.stdout.count("Last loss") == 1


# ---- the command


def arguments(settings: Mapping[str, Any]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def gaze_train(*args: object) -> Any:
    return CliRunner().invoke(main, ["train", *map(str, args)])


def test_the_command(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = gaze_train(base, data, "-o", out, "--region", "2,2,1", "--budget", "0.25", *arguments(QUICK), "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["training"] == read(out).provenance
    assert printed["gaze"] == GazeConfig.paper(region=(2, 2, 1), budget=0.25).to_dict()
    for figure in ("loss", "budget 0.25", "agreement", "6/6"):
        assert figure in result.stderr
    again = gaze_train(base, data, "-o", out)
    assert (again.exit_code, again.stderr.count("\n")) == (1, 1) and "exists already" in again.stderr


USAGE: dict[str, tuple[list[str], str]] = {
    "objective": (["--objective", "x"], "objective must be one of"),
    "budget": (["--budget", "0.0"], "budget must be a share"),
    "steps": (["--steps", "many"], "expected N, got 'many'"),
    "trainer": (["--trainer", "bf16"], "--trainer takes NAME=VALUE, got 'bf16'"),
}


@pytest.mark.parametrize(("options", "message"), USAGE.values(), ids=USAGE)
def test_bad_usage(options: list[str], message: str, tmp_path: Path) -> None:
    result = gaze_train("model", "data.jsonl", "-o", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_arguments_of_the_trainer_reach_it(base: Path, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    seen: list[Any] = []
    train: Callable[..., Any] = GazeTrainer.train
    monkeypatch.setattr(GazeTrainer, "train", lambda self, **k: (seen.append(self.args), train(self, **k)))
    options = ["--region", "2,2,1", *arguments(QUICK | {"steps": 1})]
    result = gaze_train(base, data, "-o", tmp_path / "out", *options, "--trainer", "max_grad_norm=0.5")
    assert result.exit_code == 0, result.output
    assert seen[0].max_grad_norm == 0.5
    refused = gaze_train(base, data, "-o", tmp_path / "b", "--trainer", "output_dir=x")
    assert refused.exit_code == 1 and "output_dir cannot be among" in refused.stderr
