"""`push` and `fetch` with the real client of the Hub, against a small Hub that runs here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from click.testing import CliRunner
from hub_server import Hub, Repo, client_uses
from safetensors.torch import save_file
from tiny import tiny

import gazepatch
from gazepatch import ArtefactError, ConfigError, GazeConfig, HubError
from gazepatch.card import card_of
from gazepatch.cli import main
from gazepatch.contents import contents_of
from gazepatch.fetching import fetch
from gazepatch.lora import add_lora
from gazepatch.manifest import read

SETTINGS = GazeConfig(region=(4, 4, 1), window=(2, 2, 1), budget=0.5, min_visual_tokens=0)
BASE, REPO = "lab/tiny", "me/tiny-gaze"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny("llava").model.save_pretrained(folder)
    return folder


@pytest.fixture
def hub(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with one base model."""
    with Hub().running() as server:
        client_uses(server.url, tmp_path, monkeypatch)
        server.repos[BASE] = repo = Repo()
        repo.add("main", {path.name: path.read_bytes() for path in model_folder.iterdir()})
        repo.large.add("model.safetensors")
        yield server


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "gaze_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.fixture(scope="module")
def made(model_folder: Path) -> Path:
    """An adapter with context tokens, which names its base model by its Hub id."""
    tokens = torch.randn(4, 64, generator=torch.Generator().manual_seed(4))
    out = gazepatch.convert(model_folder, model_folder.parent / "made", config=SETTINGS, context_tokens=tokens)
    edit(base_model=BASE, key_layout=None)(out)
    (out / "README.md").write_text(card_of(read(out)), encoding="utf-8")
    return out


@pytest.fixture
def artefact(made: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of it. Whatever a test does, what it publishes must be as it was."""
    folder = tmp_path / "artefact"
    shutil.copytree(made, folder)
    yield folder
    assert {name: data for name, data in files_in(folder).items() if name in files_in(made)} == files_in(made)


@pytest.fixture
def full(made: Path, model_folder: Path, tmp_path: Path) -> Path:
    """A full artefact, with the model in several shards."""
    tiny("llava").model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    return gazepatch.convert(tmp_path / "sharded", tmp_path / "full", config=SETTINGS, context_tokens=made, full=True)


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def artefact_on(hub: Hub, ref: str = "main") -> dict[str, bytes]:
    """What a repository holds, but for what the Hub itself puts there."""
    return {path: data for path, data in hub.repos[REPO].files(ref).items() if path != ".gitattributes"}


def process(hub: Hub, tmp_path: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
    """The command, as a user runs it, set up by environment variables alone."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_writer"}
    environment |= {"HF_HOME": str(tmp_path / "home"), **more}
    command = [sys.executable, "-m", "gazepatch.cli", *arguments]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# ---- what is pushed


def test_push_an_adapter(hub: Hub, artefact: Path) -> None:
    done = gazepatch.push(artefact, REPO)
    assert artefact_on(hub) == files_in(artefact)
    commit = hub.repos[REPO].refs["main"]
    assert (done.commit, done.url) == (commit, f"{hub.url}/{REPO}/commit/{commit}")
    assert done.files == {name: len(data) for name, data in files_in(artefact).items()}
    assert (done.repo, done.revision, done.changed, done.removed, done.left_out) == (REPO, "main", True, (), ())
    assert not hub.repos[REPO].private


def test_push_again(hub: Hub, artefact: Path) -> None:
    first = gazepatch.push(artefact, REPO)
    again = gazepatch.push(artefact, REPO)
    assert (again.changed, again.commit) == (False, first.commit)
    tokens = torch.ones(4, 64)
    changed = gazepatch.convert(BASE, artefact.parent / "changed", config=SETTINGS, context_tokens=tokens)
    second = gazepatch.push(changed, REPO)
    assert second.changed and second.commit != first.commit
    assert artefact_on(hub) == files_in(changed) != files_in(artefact)


def test_push_takes_away_what_would_mislead(hub: Hub, artefact: Path) -> None:
    gazepatch.push(artefact, REPO)
    repo = hub.repos[REPO]
    repo.add("main", repo.files() | {"LICENSE": b"mine", "images/look.png": b"mine"})
    plain = gazepatch.convert(BASE, artefact.parent / "plain", config=SETTINGS)
    wanted = gazepatch.push(plain, REPO, dry_run=True).removed
    assert gazepatch.push(plain, REPO).removed == wanted == ("context_tokens.safetensors",)
    assert artefact_on(hub) == files_in(plain) | {"LICENSE": b"mine", "images/look.png": b"mine"}


@pytest.mark.parametrize("part_size", [None, 30_000], ids=["basic", "multipart"])
def test_push_a_full_artefact(hub: Hub, full: Path, part_size: int | None) -> None:
    hub.part_size = part_size
    assert len(list(full.glob("model-*.safetensors"))) > 1
    done = gazepatch.push(full, REPO)
    assert artefact_on(hub) == files_in(full)
    assert done.files.keys() == files_in(full).keys() and done.left_out == ()
    assert bool(hub.asked("POST /lfs/.*/complete")) == (part_size is not None)
    here, there = gazepatch.load(full), gazepatch.load(REPO)
    inputs = tiny("llava").inputs
    assert torch.equal(there(**inputs).logits, here(**inputs).logits)
    # An adapter in its place must not have the old weights beside it.
    plain = gazepatch.convert(BASE, full.parent / "plain", config=SETTINGS)
    gazepatch.push(plain, REPO)
    assert artefact_on(hub) == files_in(plain)


def test_push_privately(hub: Hub, artefact: Path) -> None:
    gazepatch.push(artefact, REPO, private=True)
    assert hub.repos[REPO].private
    gazepatch.push(artefact, REPO)  # and it stays so
    gazepatch.push(artefact, REPO, private=True)
    assert hub.repos[REPO].private
    hub.repos[REPO].private = False
    hub.requests.clear()
    with pytest.raises(HubError, match="is public already, and private was asked for"):
        gazepatch.push(artefact, REPO, private=True)
    assert hub.writes() == []


def test_push_to_a_new_branch(hub: Hub, artefact: Path) -> None:
    done = gazepatch.push(artefact, REPO, revision="v1.0/try")
    assert done.revision == "v1.0/try"
    assert artefact_on(hub, "v1.0/try") == files_in(artefact)
    assert artefact_on(hub, "main") == {}
    assert not gazepatch.push(artefact, REPO, revision="v1.0/try").changed


def test_push_as_a_pull_request(hub: Hub, artefact: Path) -> None:
    with pytest.raises(HubError, match=r"does not exist.*a pull request needs a repository"):
        gazepatch.push(artefact, REPO, create_pr=True)
    assert hub.writes() == []
    hub.repos[REPO] = Repo()
    hub.repos[REPO].add("main", {"README.md": b"old"})
    done = gazepatch.push(artefact, REPO, create_pr=True)
    assert done.url == f"{hub.url}/{REPO}/discussions/1"
    assert artefact_on(hub, "refs/pr/1") == files_in(artefact)
    assert artefact_on(hub, "main") == {"README.md": b"old"}
    # What a reviewer asks for goes into the same pull request.
    shorter = gazepatch.convert(BASE, artefact.parent / "shorter", config=SETTINGS)
    gazepatch.push(shorter, REPO, revision="refs/pr/1")
    assert artefact_on(hub, "refs/pr/1") == files_in(shorter)


def test_nothing_is_written_over_a_model(hub: Hub, artefact: Path) -> None:
    hub.requests.clear()
    with pytest.raises(HubError, match="holds a model and no gaze artefact"):
        gazepatch.push(artefact, BASE)
    assert hub.writes() == []
    assert gazepatch.push(artefact, BASE, create_pr=True).url.endswith("/discussions/1")


def test_a_dry_run_writes_nothing(hub: Hub, artefact: Path) -> None:
    done = gazepatch.push(artefact, REPO, dry_run=True)
    assert (done.url, done.commit) == (f"{hub.url}/{REPO}", None)
    assert done.files == {name: len(data) for name, data in files_in(artefact).items()}
    assert hub.writes() == [] and REPO not in hub.repos


LITTER = {
    ".env": "HF_TOKEN=hf_secret",
    "token": "hf_secret",
    ".git/config": "[core]",
    ".cache/huggingface/x": "x",
    "README.md~": "old",
    ".README.md.swp": "old",
    "#README.md#": "old",
    ".DS_Store": "x",
    "checkpoint-5/optimizer.pt": "x",
    "optimizer.pt": "x",
    "training_args.bin": "x",
    "trained.safetensors": "x",
    "model.safetensors": "x",
    "tokenizer.json": "{}",
    "modeling_gaze.py": "import os",
    "lora.bak/adapter_config.json": "{}",
    "__pycache__/x.pyc": "x",
}


def test_nothing_else_goes_up(hub: Hub, artefact: Path, tmp_path: Path) -> None:
    own = files_in(artefact)
    for name, text in LITTER.items():
        (artefact / name).parent.mkdir(parents=True, exist_ok=True)
        (artefact / name).write_text(text)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("hf_secret")
    (artefact / "elsewhere").symlink_to(tmp_path / "secret")
    (artefact / "key").symlink_to(tmp_path / "secret" / "key")
    (artefact / "dangling").symlink_to(tmp_path / "nothing")
    os.mkfifo(artefact / "pipe")
    done = gazepatch.push(artefact, REPO)
    assert artefact_on(hub) == own
    tops = {name if "/" not in name else name.split("/")[0] + "/" for name in LITTER}
    assert set(done.left_out) == tops | {"elsewhere/", "key", "dangling", "pipe"}
    assert b"hf_secret" not in b"".join(hub.blobs.values())


def test_litter_in_a_full_artefact(hub: Hub, full: Path) -> None:
    own = files_in(full)
    for name in ("optimizer.pt", "old.safetensors", "model-00009-of-00009.safetensors", "x.py", "credentials.json"):
        (full / name).write_text("x")
    (full / "LICENSE.txt").write_text("of the model")
    contents = contents_of(full)
    assert contents.files.keys() == own.keys() | {"LICENSE.txt"}
    assert len(contents.left_out) == 5


def test_a_model_beside_an_adapter_stays(artefact: Path, model_folder: Path) -> None:
    own = files_in(artefact)
    shutil.copytree(model_folder, artefact, dirs_exist_ok=True)
    contents = contents_of(artefact)
    assert contents.files.keys() == own.keys() and "model.safetensors" in contents.left_out


def test_lora_adapters_belong(model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = transformers.AutoModelForImageTextToText.from_pretrained(model_folder)
    add_lora(gazepatch.apply(model, SETTINGS), model.model.language_model, 2)
    out = gazepatch.save(model, tmp_path / "gaze", provenance={"trainable": "lora"})
    contents = contents_of(out)
    assert contents.files.keys() == files_in(out).keys() and contents.left_out == ()
    assert "lora/adapter_model.safetensors" in contents.files


def test_the_hub_leaves_nothing_out(hub: Hub, artefact: Path) -> None:
    hub.repos[REPO] = Repo()
    hub.repos[REPO].add("main", {".gitignore": b"*.safetensors\nREADME.md\n"})
    gazepatch.push(artefact, REPO)
    assert artefact_on(hub) == files_in(artefact) | {".gitignore": b"*.safetensors\nREADME.md\n"}


# ---- what is refused before anything is sent


def linked(folder: Path) -> None:
    (folder / "README.md").rename(folder.parent / "moved.md")
    (folder / "README.md").symlink_to(folder.parent / "moved.md")


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def shorter_shard(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, first_shard(folder))


def upwards(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../../secret"}}')


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "an artefact is a folder with gaze_config.json, got nothing"),
    "no settings": (lambda f: (f / "gaze_config.json").unlink(), "no gaze_config.json in"),
    "newer": (edit(format_version=2), "format version 2 is newer"),
    "no card": (lambda f: (f / "README.md").unlink(), "must hold README.md"),
    "no tokens": (lambda f: (f / "context_tokens.safetensors").unlink(), "expected a file context_tokens.safetensors"),
    "other tokens": (edit(hidden_size=65), "must have hidden_size 65"),
    "cut tokens": (lambda f: os.truncate(f / "context_tokens.safetensors", 50), "is no intact safetensors file"),
    "no lora": (edit(provenance={"trainable": "lora"}), "must hold lora/adapter_config.json, lora/adapter_model"),
    "half a lora": (lambda f: (f / "lora").mkdir(), "must hold lora/adapter_config.json"),
    "card is a link": (linked, "is a link to a file outside of the folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "must hold config.json: it is no whole"),
    "no shard": (lambda f: first_shard(f).unlink(), "lacks model-00001-of-"),
    "cut shard": (lambda f: os.truncate(first_shard(f), 2000), "is no intact safetensors file"),
    "tensors missing": (shorter_shard, "made for a model with key_layout"),
    "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), "got neither"),
    "bad index": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "must map tensors to shards"),
    "index leads elsewhere": (upwards, "must name safetensors files beside it, got ../../secret"),
}


@pytest.mark.parametrize(("breaking", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_artefacts_are_not_sent(hub: Hub, full: Path, breaking: Callable[[Path], object], message: str) -> None:
    breaking(full)
    with pytest.raises(ArtefactError, match=message):
        gazepatch.push(full, REPO)
    assert hub.requests == []


def test_an_adapter_of_a_folder_here_is_not_sent(hub: Hub, model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="a folder of this machine as its base model"):
        gazepatch.push(gazepatch.convert(model_folder, tmp_path / "gaze"), REPO)
    assert hub.requests == []


@pytest.mark.parametrize("repo", ["", "tiny-gaze", "a/b/c", "me/..", "me/a--b", "me/tiny gaze", "me/x.git", "../x"])
def test_malformed_repositories(hub: Hub, artefact: Path, repo: str) -> None:
    with pytest.raises(ConfigError, match="repo_id must be owner/name"):
        gazepatch.push(artefact, repo)
    assert hub.requests == []


@pytest.mark.parametrize("revision", ["", "a b", "../up", "-x", "a..b", "a//b", "x.lock", "x/", "a~1", "0" * 40])
def test_malformed_revisions(hub: Hub, artefact: Path, revision: str) -> None:
    with pytest.raises(ConfigError, match="revision must be the name of a branch"):
        gazepatch.push(artefact, REPO, revision=revision)
    assert hub.requests == []


def test_a_pull_request_has_no_revision(hub: Hub, artefact: Path) -> None:
    with pytest.raises(ConfigError, match="opened against main"):
        gazepatch.push(artefact, REPO, revision="v1", create_pr=True)


def test_a_card_that_the_hub_refuses(hub: Hub, artefact: Path) -> None:
    path = artefact / "README.md"
    text = path.read_text()
    path.write_text(text.replace(f"base_model: {BASE}", "base_model: /home/me/model"))
    with pytest.raises(HubError, match=r'"base_model" with value "/home/me/model" is not valid.*then push again'):
        gazepatch.push(artefact, REPO)
    assert artefact_on(hub) == {}
    path.write_text(text)


# ---- what goes wrong on the way

AGAIN = "then push again: the artefact is there whole or not at all, and what has arrived is not sent twice"
STORAGE = "Private repository storage limit reached, please upgrade your plan"
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "401": ({"match": "POST .*/commit/", "status": 401}, "knows no valid token: log in with `hf auth login`.* 401"),
    "403": ({"match": "POST .*/preupload/", "status": 403}, "the token in use must not do that with me/tiny-gaze"),
    "403 on creation": ({"match": "POST /api/repos/create", "status": 403}, "the token in use must not do that"),
    "409 on creation": ({"match": "POST /api/repos/create", "status": 409}, "was changed by somebody else meanwhile"),
    "404": ({"match": "POST .*/commit/", "status": 404, "code": "RepoNotFound"}, "me/tiny-gaze does not exist, or"),
    "409": ({"match": "POST .*/commit/", "status": 409, "body": "Conflict"}, "changed by somebody else.*Conflict"),
    "412": ({"match": "POST .*/commit/", "status": 412, "body": "has happened"}, "changed by.*happened .status 412"),
    "413": ({"match": "PUT /lfs/", "status": 413}, "the Hub has no room for it: .*remove what is not needed"),
    "507": ({"match": "PUT /lfs/", "status": 507}, "the Hub has no room for it"),
    "402": ({"match": "POST .*/batch", "status": 402}, "the Hub has no room for it"),
    "quota in words": ({"match": "POST .*/commit/", "status": 403, "body": STORAGE}, f"no room for it: {STORAGE}"),
    "400": ({"match": "POST .*/commit/", "status": 400, "body": "too odd"}, "the Hub refuses: too odd .status 400"),
    "429": ({"match": "POST .*/preupload/", "status": 429, "times": 99}, "takes no more requests for now: wait"),
    "500": ({"match": "POST .*/commit/", "status": 500}, "the Hub has trouble itself"),
    "503 for long": ({"match": "PUT /lfs/", "status": 503, "times": 99}, "the Hub has trouble itself"),
    "reset at once": (
        {"match": "GET /api/models/", "cut": 0, "times": 99},
        "the connection to the Hub failed or broke",
    ),
    "reset of an upload": (
        {"match": "PUT /lfs/", "cut": 100, "times": 99},
        "the connection to the Hub failed or broke",
    ),
    "reset of the commit": ({"match": "POST .*/commit/", "cut": 100}, "the connection to the Hub failed or broke off"),
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_faults(hub: Hub, artefact: Path, fault: dict[str, Any], message: str) -> None:
    met = hub.fault(**fault)
    with pytest.raises(HubError, match=message) as caught:
        gazepatch.push(artefact, REPO)
    assert str(caught.value).startswith(f"pushing to {REPO} failed: ") and str(caught.value).endswith(AGAIN)
    assert met.met.is_set()
    assert REPO not in hub.repos or artefact_on(hub) == {}
    met.times = 0
    assert gazepatch.push(artefact, REPO).changed
    assert artefact_on(hub) == files_in(artefact)


@pytest.mark.parametrize(
    "fault",
    [
        {"match": "PUT /lfs/", "cut": 100},
        {"match": "PUT /lfs/", "status": 503, "times": 2},
        {"match": "POST .*/preupload/", "cut": 10},
        {"match": "POST .*/batch", "status": 500},
        {"match": "PUT /lfs/", "delay": 0.3},
        {"match": "POST .*/commit/", "delay": 0.3},
    ],
    ids=["reset", "busy", "reset before", "trouble", "slow storage", "slow commit"],
)
def test_short_trouble_is_overcome(hub: Hub, artefact: Path, fault: dict[str, Any]) -> None:
    met = hub.fault(**fault)
    gazepatch.push(artefact, REPO)
    assert met.met.is_set()
    assert artefact_on(hub) == files_in(artefact)


def test_what_has_arrived_is_not_sent_again(hub: Hub, full: Path) -> None:
    hub.part_size = 30_000
    hub.fault("POST .*/commit/", status=500)
    with pytest.raises(HubError):
        gazepatch.push(full, REPO)
    received = dict(hub.received)
    assert len(received) > 2
    gazepatch.push(full, REPO)
    assert hub.received == received
    assert artefact_on(hub) == files_in(full)


def test_a_full_storage(hub: Hub, artefact: Path) -> None:
    hub.full = True
    with pytest.raises(HubError, match=r"the Hub has no room for it: .*Storage quota exceeded"):
        gazepatch.push(artefact, REPO)
    hub.full = False
    assert gazepatch.push(artefact, REPO).changed


def test_an_answer_that_got_lost(hub: Hub, artefact: Path) -> None:
    hub.repos[REPO] = Repo()
    hub.repos[REPO].add("main", {})
    inner = hub.repos[REPO].add

    def lost(*arguments: Any) -> str:
        inner(*arguments)
        raise ConnectionResetError

    hub.repos[REPO].add = lost  # type: ignore[method-assign]
    with pytest.raises(HubError, match="failed or broke off"):
        gazepatch.push(artefact, REPO)
    assert not gazepatch.push(artefact, REPO).changed
    assert artefact_on(hub) == files_in(artefact)


@pytest.mark.parametrize(
    ("token", "message"),
    [("hf_reader", "must not do that with"), ("hf_wrong", "knows no valid token"), (False, "knows no valid token")],
)
def test_tokens(hub: Hub, artefact: Path, token: Any, message: str) -> None:
    with pytest.raises(HubError, match=message):
        gazepatch.push(artefact, REPO, token=token)
    assert gazepatch.push(artefact, REPO, token="hf_writer").changed


def test_a_namespace_of_others(hub: Hub, artefact: Path) -> None:
    with pytest.raises(HubError, match="must not do that with others/x: take one with the right to write"):
        gazepatch.push(artefact, "others/x")


def test_somebody_else_was_faster(hub: Hub, artefact: Path) -> None:
    gazepatch.push(gazepatch.convert(BASE, artefact.parent / "plain", config=SETTINGS), REPO)
    held = threading.Event()
    fault, errors = hub.fault("POST .*/commit/", held=held), []

    def pushing() -> None:
        try:
            gazepatch.push(artefact, REPO)
        except HubError as error:
            errors.append(str(error))

    thread = threading.Thread(target=pushing)
    thread.start()
    assert fault.met.wait(10)
    hub.repos[REPO].add("main", hub.repos[REPO].files() | {"mine.txt": b"x"})
    held.set()
    thread.join()
    assert len(errors) == 1 and "was changed by somebody else meanwhile" in errors[0]
    gazepatch.push(artefact, REPO)
    assert artefact_on(hub) == files_in(artefact) | {"mine.txt": b"x"}


def test_no_network(hub: Hub, artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client_uses("http://127.0.0.1:9", tmp_path, monkeypatch)
    with pytest.raises(HubError, match=r"the connection to the Hub failed.*ConnectError"):
        gazepatch.push(artefact, REPO)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="the Hub must not be asked: HF_HUB_OFFLINE is set"):
        gazepatch.push(artefact, REPO)


# ---- the command


def gaze(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command(hub: Hub, artefact: Path) -> None:
    (artefact / "notes.txt").write_text("x")
    dry = gaze("push", artefact, REPO, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "Nothing was written" in dry.stdout and "context_tokens.safetensors" in dry.stdout
    assert "Not sent, as not the artefact's: notes.txt" in dry.stdout
    assert hub.writes() == []
    done = gaze("push", artefact, REPO, "--private", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["commit"] == hub.repos[REPO].refs["main"] and report["left_out"] == ["notes.txt"]
    assert hub.repos[REPO].private
    assert "Nothing to do" in gaze("push", artefact, REPO).stdout
    assert gaze("push", artefact, REPO, "--revision", "v2").exit_code == 0 and "v2" in hub.repos[REPO].refs


def test_convert_and_push(hub: Hub, tmp_path: Path) -> None:
    result = gaze("convert", BASE, "-o", tmp_path / "gaze", "--push", REPO, "--json")
    assert result.exit_code == 0, result.output
    assert artefact_on(hub) == files_in(tmp_path / "gaze")
    assert json.loads(result.stdout)["url"].startswith(f"{hub.url}/{REPO}/commit/")
    assert gaze("convert", BASE, "-o", tmp_path / "other", "--push", "others/x").exit_code == 1


def test_errors_of_the_command(hub: Hub, artefact: Path, tmp_path: Path) -> None:
    for status, message, arguments in (
        (2, "repo_id must be owner/name", [artefact, "gaze"]),
        (2, "leave out the revision", [artefact, REPO, "--create-pr", "--revision", "x"]),
        (1, "an artefact is a folder with gaze_config.json", [tmp_path / "nothing", REPO]),
        (1, "must not do that", [artefact, "others/x"]),
    ):
        result = gaze("push", *arguments)
        assert result.exit_code == status and message in result.stderr and result.stdout == ""
        assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("when", ["PUT /lfs/", "POST .*/commit/"])
def test_killed_on_the_way(hub: Hub, tmp_path: Path, when: str) -> None:
    folder = gazepatch.convert(BASE, tmp_path / "gaze")
    before, hub.large_from = files_in(folder), 1000
    fault = hub.fault(when, held=threading.Event())
    killed = process(hub, tmp_path, "push", str(folder), REPO)
    assert fault.met.wait(60), killed.communicate()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert files_in(folder) == before
    assert artefact_on(hub) == {}
    again = process(hub, tmp_path, "push", str(folder), REPO)
    out, err = again.communicate(timeout=60)
    assert (again.returncode, err) == (0, "")
    assert out.startswith(f"{hub.url}/{REPO}/commit/")
    assert artefact_on(hub) == before == files_in(folder)


# ---- fetch


def test_one_file_is_fetched_alone(hub: Hub, model_folder: Path) -> None:
    path, commit = fetch(BASE, file="config.json")
    assert path.read_bytes() == (model_folder / "config.json").read_bytes()
    assert commit == hub.repos[BASE].refs["main"]
    assert hub.asked("safetensors|cdn") == []
    with pytest.raises(HubError, match=r"fetching no.json of lab/tiny failed: lab/tiny has no such file"):
        fetch(BASE, file="no.json")


def test_fetch_some_files_or_all(hub: Hub, model_folder: Path) -> None:
    some, commit = fetch(BASE, only=["*.json"])
    assert {path.name for path in some.iterdir()} == {path.name for path in model_folder.glob("*.json")}
    assert hub.asked("cdn") == []
    everything, _ = fetch(BASE)
    assert files_in(everything) == files_in(model_folder)
    assert commit == some.name == everything.name


def test_fetch_a_revision(hub: Hub, model_folder: Path) -> None:
    old = hub.repos[BASE].refs["main"]
    hub.repos[BASE].add("main", {"sub/config.json": b"{}"})
    hub.repos[BASE].refs["v1"] = old
    assert fetch(BASE, file="sub/config.json").commit == hub.repos[BASE].refs["main"]
    for revision in (old, "v1"):
        assert fetch(BASE, file="config.json", revision=revision).commit == old
        assert fetch(BASE, only=["config.json"], revision=revision).commit == old
    for how in ({"file": "config.json"}, {"only": ["config.json"]}):
        with pytest.raises(HubError, match=r"fetching .*lab/tiny at v9 failed: lab/tiny has no such revision"):
            fetch(BASE, revision="v9", **how)


def test_folders_of_this_machine(hub: Hub, model_folder: Path) -> None:
    assert fetch(model_folder) == fetch(str(model_folder)) == (model_folder, None)
    assert fetch(model_folder, file="config.json").path == model_folder / "config.json"
    with pytest.raises(ArtefactError, match=r"expected a folder with no.json"):
        fetch(model_folder, file="no.json")
    with pytest.raises(ArtefactError, match="expected a folder or a Hub id, got a file"):
        fetch(model_folder / "config.json")
    with pytest.raises(ConfigError, match="a revision goes with a Hub id"):
        fetch(model_folder, revision="v1")
    for name in ("/no/such/folder", "./no/such", "a b", ""):
        with pytest.raises(HubError, match="expected a folder or a Hub id"):
            fetch(name)
    assert hub.requests == []


HOW = pytest.mark.parametrize("how", [{"file": "config.json"}, {"only": ["config.json"]}], ids=["file", "folder"])


@HOW
def test_the_cache_is_enough(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]) -> None:
    before = fetch(BASE, **how)
    hub.requests.clear()
    assert fetch(BASE, **how, local_files_only=True) == before
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fetch(BASE, **how) == fetch(BASE, **how, revision=before.commit) == before
    assert hub.requests == []
    with pytest.raises(HubError, match=r"must not be asked \(HF_HUB_OFFLINE or local_files_only\), and the cache"):
        fetch("lab/other", **how)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    client_uses("http://127.0.0.1:9", tmp_path, monkeypatch)
    assert fetch(BASE, **how) == before


@HOW
def test_what_cannot_be_fetched(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]) -> None:
    with pytest.raises(HubError, match="lab/nothing does not exist, or the token in use must not see it"):
        fetch("lab/nothing", **how)
    with pytest.raises(HubError, match="lab/nothing does not exist"):
        fetch("lab/nothing", **how, token=False)
    with pytest.raises(HubError, match=r"must not be asked .*local_files_only"):
        fetch("lab/nothing", **how, local_files_only=True)
    with pytest.raises(HubError, match="knows no valid token"):
        fetch(BASE, **how, token="hf_wrong")
    hub.repos[BASE].gated = True
    with pytest.raises(HubError, match="lab/tiny is gated: ask its owner"):
        fetch(BASE, **how)
    hub.repos[BASE].gated = False
    hub.repos[BASE].private = True
    with pytest.raises(HubError, match="does not exist, or the token"):
        fetch(BASE, **how, token=False)
    hub.fault("(GET|HEAD) ", status=503, times=30)
    with pytest.raises(HubError, match=r"the Hub has trouble itself: .*\(status 503\); then try again"):
        fetch(BASE, **how)
    client_uses("http://127.0.0.1:9", tmp_path, monkeypatch)
    with pytest.raises(HubError, match="the connection to the Hub failed"):
        fetch(BASE, **how)


def test_a_download_that_breaks_off(hub: Hub, model_folder: Path) -> None:
    hub.fault("GET /cdn/", cut=5000)
    with pytest.raises(HubError, match=r"the connection to the Hub failed or broke off .*then try again"):
        fetch(BASE)
    assert files_in(fetch(BASE).path) == files_in(model_folder)


# ---- end to end


def test_convert_push_load(hub: Hub, tmp_path: Path) -> None:
    case = tiny("llava")
    out = gazepatch.convert(BASE, tmp_path / "gaze", config=SETTINGS)
    assert hub.asked("cdn") == []
    gazepatch.push(out, REPO)
    model = gazepatch.load(REPO)
    assert gazepatch.inspect(model).settings == SETTINGS
    with gazepatch.patched(case.model, SETTINGS):
        expected = case.model.generate(**case.inputs, max_new_tokens=6, do_sample=False)
        share = gazepatch.stats(case.model).read_share
    assert torch.equal(model.generate(**case.inputs, max_new_tokens=6, do_sample=False), expected)
    assert gazepatch.stats(model).read_share == share < 1
