"""The small Hub on 127.0.0.1, and the real client set up for it."""

from __future__ import annotations

import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import transformers.utils.hub

from hub.routes import Routes
from hub.state import Hub


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Routes)
        self.hub = Hub(f"http://127.0.0.1:{self.server_address[1]}")


@contextmanager
def running() -> Iterator[Hub]:
    """An empty Hub that answers until the context ends."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        for fault in server.hub.faults:
            if fault.held is not None:
                fault.held.set()
        server.shutdown()
        server.server_close()


def client_uses(url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the client up as HF_ENDPOINT and HF_HOME would, which it reads only when it is imported."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    # Newer transformers keep a client, whose address may be that of a Hub of another test by now.
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
    never = types.SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr(huggingface_hub.utils._http, "time", never)  # it waits 23 s in all before it gives up
