"""How the small Hub answers any request, and how it goes wrong on demand."""

from __future__ import annotations

import json
import re
import socket
import struct
import time
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs

from hub.state import Fault, Hub


class Refusal(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, message: str, code: str = "", **more: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.body = status, code, {"error": message, **more}


class Reset(Exception):
    """The connection goes down without an answer."""


class Wire(BaseHTTPRequestHandler):
    """One connection. A subclass has the routes; what they raise becomes an answer here."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # headers and body in one packet: otherwise each answer waits 40 ms for an acknowledgement
    disable_nagle_algorithm = True

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def log_message(self, *_: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _serve(self) -> None:
        self.answered, self.reset_after = False, None
        self.path, _, query = self.path.partition("?")
        self.query = parse_qs(query)
        name = f"{self.command} {self.path}"
        with self.hub.lock:
            self.hub.requests.append(name)
            fault = next((f for f in self.hub.faults if f.times > 0 and re.search(f.match, name)), None)
            if fault is not None:
                fault.times -= 1
        try:
            if fault is not None:
                self._go_wrong(fault)
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self._route()
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            self.rfile_drain()
            self._json(refusal.body, refusal.status, {**headers, "X-Error-Message": str(refusal)})
        except Reset:
            self._reset()

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def rfile_drain(self) -> None:
        """What of the body was not read must not be taken for the next request."""
        if not hasattr(self, "body"):
            self.close_connection = True

    def _route(self) -> None:
        raise NotImplementedError

    def _go_wrong(self, fault: Fault) -> None:
        fault.met.set()
        if fault.held is not None:
            fault.held.wait(30)
        time.sleep(fault.delay)
        if fault.status:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            raise Refusal(fault.status, fault.body or "injected", fault.code)
        if fault.cut is not None and self.command in ("POST", "PUT"):
            self.rfile.read(fault.cut)
            raise Reset
        self.reset_after = fault.cut

    def _reset(self) -> None:
        """A packet that says reset, as a router sends it, and not an orderly end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    # ---- answers

    def _bytes(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.reset_after is not None:
            self.wfile.write(data[: self.reset_after])
            self.wfile.flush()
            time.sleep(0.05)  # a reset overtakes what was sent just before it
            raise Reset
        self.wfile.write(data)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._bytes(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})
