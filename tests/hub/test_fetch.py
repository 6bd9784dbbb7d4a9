"""What `fetch` brings here, and the whole way: converted, pushed, loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from loaded import assert_gazes_like
from tiny import tiny

import gazepatch
from gazepatch import ArtefactError, ConfigError, HubError
from gazepatch.hub.fetching import fetch
from hub.conftest import BASE, REPO, SETTINGS, files_in
from hub.server import client_uses
from hub.state import Hub


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
    with pytest.raises(HubError, match=r"may not be asked \(HF_HUB_OFFLINE or local_files_only\), and the cache"):
        fetch("lab/other", **how)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    client_uses("http://127.0.0.1:9", tmp_path, monkeypatch)
    assert fetch(BASE, **how) == before


@HOW
def test_what_cannot_be_fetched(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]) -> None:
    with pytest.raises(HubError, match="lab/nothing does not exist, or the token in use may not see it"):
        fetch("lab/nothing", **how)
    with pytest.raises(HubError, match="lab/nothing does not exist"):
        fetch("lab/nothing", **how, token=False)
    with pytest.raises(HubError, match=r"may not be asked .*local_files_only"):
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


def test_convert_push_load(hub: Hub, tmp_path: Path) -> None:
    out = gazepatch.convert(BASE, tmp_path / "gaze", config=SETTINGS)
    assert hub.asked("cdn") == []
    gazepatch.push(out, REPO)
    assert_gazes_like(tiny("llava"), gazepatch.load(REPO), SETTINGS)
