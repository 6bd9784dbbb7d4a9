"""What `push` sends, and what it leaves where it is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from adapting import needs_peft
from tiny import tiny

import gazepatch
from gazepatch import HubError
from gazepatch.artefact.contents import contents_of
from gazepatch.lora import add_lora
from hub.conftest import BASE, REPO, SETTINGS, artefact_on, files_in
from hub.state import Hub, Repo


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


@needs_peft
def test_lora_adapters_belong(model_folder: Path, tmp_path: Path) -> None:
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
