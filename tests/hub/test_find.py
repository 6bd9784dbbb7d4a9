"""Whether a Hub id is an artefact: the Hub's answer, or the cache's, and never a guess."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from click.testing import CliRunner
from transformers import AutoConfig

import gazepatch
from gazepatch import ArtefactError, HubError
from gazepatch.artefact.finding import is_artefact
from gazepatch.cli import main
from hub.conftest import BASE, REPO, SETTINGS
from hub.server import client_uses
from hub.state import Hub


def test_an_artefact_a_model_and_nothing(hub: Hub, artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gazepatch.push(artefact, REPO, private=True)
    assert is_artefact(REPO) and is_artefact(artefact) and is_artefact(str(artefact))
    assert not is_artefact(BASE) and not is_artefact(artefact.parent)
    assert hub.asked("GET .*/resolve/") == []
    assert not is_artefact("lab/nothing")
    hub.requests.clear()
    for name in ("/no/such/folder", "./no/such", "a b", ""):
        assert not is_artefact(name)
    assert hub.requests == []
    monkeypatch.delenv("HF_TOKEN")
    assert not is_artefact(REPO)  # as the Hub answers to strangers
    with pytest.raises(HubError, match=f"{REPO} does not exist, or the token in use may not see it"):
        gazepatch.inspect(REPO)


def test_a_mistyped_folder(hub: Hub) -> None:
    for command in ("inspect", "ask"):
        result = CliRunner().invoke(main, [command, "tiny-gaez", *(("what ?",) if command == "ask" else ())])
        assert result.exit_code == 1 and "tiny-gaez does not exist, or the token" in result.stderr
        assert "There is no folder tiny-gaez here either: if one was meant, check the path" in result.stderr


def gated(hub: Hub, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    hub.repos[BASE].gated = True


def wrong_token(hub: Hub, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")


def forbidden(hub: Hub, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    hub.fault("HEAD ", status=403, times=99)


def down(hub: Hub, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    hub.fault("HEAD ", status=503, times=99)


def unreachable(hub: Hub, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    client_uses("http://127.0.0.1:9", folder, monkeypatch)


def offline(hub: Hub, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


Failing = Callable[[Hub, pytest.MonkeyPatch, Path], None]
FAILURES: dict[Failing, str] = {
    gated: "lab/tiny is gated: ask its owner for access on its page, and log in with `hf auth login`",
    wrong_token: "the Hub knows no valid token: log in with `hf auth login`, or set HF_TOKEN",
    forbidden: "the token in use may not do that with lab/tiny: take one with the rights for it",
    down: "the Hub has trouble itself: see https://status.huggingface.co",
    unreachable: "the connection to the Hub failed or broke off",
    offline: "the Hub may not be asked, as HF_HUB_OFFLINE is set: unset it",
}


@pytest.mark.parametrize(("failing", "message"), FAILURES.items(), ids=[failing.__name__ for failing in FAILURES])
def test_failures_are_no_answers(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: Failing, message: str
) -> None:
    failing(hub, monkeypatch, tmp_path)
    for asking in (is_artefact, gazepatch.inspect):
        with pytest.raises(HubError) as caught:
            asking(BASE)
        assert str(caught.value).startswith(f"looking for gaze_config.json in lab/tiny failed: {message}")
        again = "; then try again. There is no folder lab/tiny here either: if one was meant, check the path"
        assert str(caught.value).endswith(again)
    result = CliRunner().invoke(main, ["inspect", BASE])
    assert result.exit_code == 1 and message in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("failing", FAILURES, ids=[failing.__name__ for failing in FAILURES])
def test_what_the_cache_knows(
    hub: Hub, artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: Failing
) -> None:
    gazepatch.push(artefact, REPO)
    settings = [gazepatch.inspect(name).settings for name in (BASE, REPO)]
    assert settings[1].region == SETTINGS.region != settings[0].region
    failing(hub, monkeypatch, tmp_path)
    assert is_artefact(REPO) and not is_artefact(BASE)
    assert [gazepatch.inspect(name).settings for name in (BASE, REPO)] == settings


def test_the_cache_knows_too_little(hub: Hub, full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gazepatch.push(full, REPO)
    AutoConfig.from_pretrained(REPO)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"looking for gaze_config\.json in me/tiny-gaze failed"):
        is_artefact(REPO)


def test_an_artefact_on_the_hub_is_not_converted_again(hub: Hub, artefact: Path, tmp_path: Path) -> None:
    gazepatch.push(artefact, REPO, revision="v2")
    assert is_artefact(REPO, "v2") and not is_artefact(REPO)
    with pytest.raises(ArtefactError, match=f"got {REPO}, which is an artefact .* take its base model, {BASE}$"):
        gazepatch.convert(REPO, tmp_path / "again", revision="v2")
