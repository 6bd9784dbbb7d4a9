"""What the small Hub holds: repositories, branches, pull requests, LFS objects, and faults on demand. All in memory."""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Repo:
    """Commits are maps of paths to contents; branches and pull requests point to them."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)

    def add(self, ref: str, files: dict[str, bytes]) -> str:
        """A commit with just these files on top of `ref`. Its name follows from them, as in git."""
        names = [self.refs.get(ref, ""), *(f"{path} {sha256(data)}" for path, data in sorted(files.items()))]
        commit = hashlib.sha1("\n".join(names).encode()).hexdigest()
        self.commits[commit] = files
        self.refs[ref] = commit
        return commit

    def files(self, ref: str = "main") -> dict[str, bytes]:
        return self.commits[self.refs[ref]]


@dataclass
class Fault:
    """What goes wrong with requests that match; `times` of them, then no more.

    Attributes:
        match: Regular expression for `METHOD /path`.
        status, body, code: The answer in place of the real one.
        cut: Reset the connection after so many bytes of the request's body, or of the answer's.
        delay: Seconds to wait before anything else.
        held: Wait until it is set.
    """

    match: str
    status: int = 0
    body: str = ""
    code: str = ""
    cut: int | None = None
    delay: float = 0.0
    held: threading.Event | None = None
    times: int = 1
    met: threading.Event = field(default_factory=threading.Event)


class Hub:
    """What is there. `url` is the endpoint, `requests` what was asked."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.received: dict[str, int] = {}
        self.large_from = 5000
        self.part_size: int | None = None
        self.full = False
        self.lock = threading.RLock()

    def fault(self, match: str, **how: Any) -> Fault:
        """Let the next requests that match go wrong."""
        self.faults.append(Fault(match, **how))
        return self.faults[-1]

    def writes(self) -> list[str]:
        """Requests that change something, or would."""
        harmless = ("/api/validate-yaml", "/preupload/")
        return [r for r in self.requests if not r.startswith(("GET", "HEAD")) and not any(h in r for h in harmless)]

    def asked(self, match: str) -> list[str]:
        return [request for request in self.requests if re.search(match, request)]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
