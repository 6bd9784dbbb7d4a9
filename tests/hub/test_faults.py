"""What goes wrong while `push` sends: the artefact is there whole or not at all, and a second try ends well."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import gazepatch
from gazepatch import HubError
from hub.conftest import BASE, REPO, SETTINGS, artefact_on, files_in
from hub.server import client_uses
from hub.state import Hub, Repo

AGAIN = "then push again: the artefact is there whole or not at all, and what has arrived is not sent twice"
STORAGE = "Private repository storage limit reached, please upgrade your plan"
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "401": ({"match": "POST .*/commit/", "status": 401}, "knows no valid token: log in with `hf auth login`.* 401"),
    "403": ({"match": "POST .*/preupload/", "status": 403}, "the token in use may not do that with me/tiny-gaze"),
    "403 on creation": ({"match": "POST /api/repos/create", "status": 403}, "the token in use may not do that"),
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
    [("hf_reader", "may not do that with"), ("hf_wrong", "knows no valid token"), (False, "knows no valid token")],
)
def test_tokens(hub: Hub, artefact: Path, token: Any, message: str) -> None:
    with pytest.raises(HubError, match=message):
        gazepatch.push(artefact, REPO, token=token)
    assert gazepatch.push(artefact, REPO, token="hf_writer").changed


def test_a_namespace_of_others(hub: Hub, artefact: Path) -> None:
    with pytest.raises(HubError, match="may not do that with others/x: take one with the rights for it"):
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
    with pytest.raises(HubError, match="the Hub may not be asked, as HF_HUB_OFFLINE is set"):
        gazepatch.push(artefact, REPO)


def process(hub: Hub, tmp_path: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
    """The command, as a user runs it, set up by environment variables alone."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_writer"}
    environment |= {"HF_HOME": str(tmp_path / "home"), **more}
    command = [sys.executable, "-m", "gazepatch.cli", *arguments]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


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
