"""A small Hub on 127.0.0.1 for the real client: repositories, branches, pull requests, LFS, and faults on demand.

Routes and fields are those that huggingface_hub 1.33 and 2.4 use without xet. State is in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import huggingface_hub
import pytest
import yaml

#: Tokens and what they may do.
TOKENS = {"hf_writer": "write", "hf_reader": "read"}


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
        names = [self.refs.get(ref, ""), *(f"{path} {_sha256(data)}" for path, data in sorted(files.items()))]
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
    """The server. `url` is its endpoint, `requests` what it was asked."""

    def __init__(self) -> None:
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
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

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

    @contextmanager
    def running(self) -> Iterator[Hub]:
        thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            for fault in self.faults:
                if fault.held is not None:
                    fault.held.set()
            self.server.shutdown()
            self.server.server_close()


def client_uses(url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the client up as HF_ENDPOINT and HF_HOME would, which it reads only when it is imported."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    never = types.SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr(huggingface_hub.utils._http, "time", never)  # it waits 23 s in all before it gives up


class Refusal(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, message: str, code: str = "", **more: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.body = status, code, {"error": message, **more}


class Reset(Exception):
    """The connection goes down without an answer."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # headers and body in one packet: otherwise each answer waits 40 ms for an acknowledgement
    disable_nagle_algorithm = True

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

    # ---- routes

    def _route(self) -> None:
        hub = self.hub
        path = self.path
        with hub.lock:
            if path == "/api/whoami-v2":
                self._json({"name": "me", "type": "user", "role": self._may("read")})
            elif path == "/api/validate-yaml":
                self._validate_card()
            elif path == "/api/repos/create":
                self._create()
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w[\w-]*)(?:/(.+))?)?", path):
                repo = self._repo(found[1])
                getattr(self, f"_api_{(found[2] or 'info').replace('-', '_')}")(found[1], repo, unquote(found[3] or ""))
            elif found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
                self._batch(found[1])
            elif found := re.fullmatch(r"/lfs/(\w+)(?:/(\d+|complete|verify))?", path):
                self._lfs(found[1], found[2])
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._resolve(found[1], unquote(found[2]), unquote(found[3]))
            elif found := re.fullmatch(r"/cdn/(\w+)", path):
                self._download(hub.blobs[found[1]])
            else:
                raise Refusal(404, f"no route {path}")

    def _may(self, right: str) -> str:
        """What the token may do; refuses what it may not."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        if right == "write" and not token:
            raise Refusal(401, "Invalid username or password.")
        if right == "write" and TOKENS[token] != "write":
            raise Refusal(403, "You don't have the rights to create or write here")
        return TOKENS.get(token, "")

    def _repo(self, name: str) -> Repo:
        rights, repo = self._may("read"), self.hub.repos.get(name)
        if repo is None or (repo.private and not rights):
            raise Refusal(401 if not rights else 404, "Repository not found", "RepoNotFound")
        if repo.gated:
            raise Refusal(403, f"Access to model {name} is restricted", "GatedRepo")
        return repo

    def _commit_of(self, repo: Repo, revision: str) -> str:
        if revision in repo.commits:
            return revision
        if revision not in repo.refs:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo.refs[revision]

    def _validate_card(self) -> None:
        front = yaml.safe_load(json.loads(self.body)["content"].split("---\n")[1])
        base = front.get("base_model")
        if base is None or re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", base):
            self._json({"errors": [], "warnings": []})
        else:
            message = f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
            self._json({"errors": [{"message": message}], "warnings": []}, 400)

    def _create(self) -> None:
        self._may("write")
        asked = json.loads(self.body)
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        url = f"{self.hub.url}/{name}"
        if asked["organization"] not in (None, "me", "lab"):
            raise Refusal(
                403, f"You don't have the rights to create a model under the namespace {asked['organization']!r}"
            )
        if name in self.hub.repos:
            raise Refusal(409, "You already created this model repo", url=url)
        self.hub.repos[name] = repo = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        repo.add("main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self._json({"url": url, "name": name})

    def _api_info(self, name: str, repo: Repo, revision: str) -> None:
        commit = self._commit_of(repo, revision or "main")
        files = [{"rfilename": path} for path in repo.commits[commit]]
        self._json({"id": name, "modelId": name, "sha": commit, "private": repo.private, "siblings": files, "tags": []})

    _api_revision = _api_info

    def _api_tree(self, name: str, repo: Repo, revision: str) -> None:
        commit = self._commit_of(repo, revision)
        self._json([self._entry(repo, path, data) for path, data in repo.commits[commit].items()])

    def _entry(self, repo: Repo, path: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)}
        if path in repo.large:
            entry["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": 127}
        return entry

    def _api_branch(self, name: str, repo: Repo, branch: str) -> None:
        self._may("write")
        if branch.startswith("refs/"):
            raise Refusal(400, "Invalid reference for a branch")
        if branch in repo.refs:
            raise Refusal(409, "Reference already exists")
        repo.refs[branch] = self._commit_of(repo, json.loads(self.body).get("startingPoint") or "main")
        self._json({})

    def _api_preupload(self, name: str, repo: Repo, revision: str) -> None:
        if "create_pr" not in self.query:
            self._may("write")
        asked, held = json.loads(self.body), repo.commits[self._commit_of(repo, revision)]
        ignored = asked.get("gitIgnore", held.get(".gitignore", b"").decode()).split()
        files = []
        for file in asked["files"]:
            large = file["size"] >= self.hub.large_from or file["path"].endswith(".safetensors")
            there = held.get(file["path"])
            oid = None if there is None else _sha256(there) if large else _git_oid(there)
            skip = any(fnmatchcase(file["path"], pattern) for pattern in ignored)
            files.append(
                {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": skip, "oid": oid}
            )
        self._json({"files": files})

    def _batch(self, name: str) -> None:
        self._may("read")
        self._repo(name)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            oid, size, url = asked["oid"], asked["size"], f"{self.hub.url}/lfs/{asked['oid']}"
            header, target = {}, url
            if self.hub.part_size and size > self.hub.part_size:
                target = f"{url}/complete"
                count = -(-size // self.hub.part_size)
                header = {"chunk_size": str(self.hub.part_size)} | {
                    f"{n:05d}": f"{url}/{n}" for n in range(1, count + 1)
                }
            actions = {"upload": {"href": target, "header": header}, "verify": {"href": f"{url}/verify"}}
            more = {} if oid in self.hub.blobs else {"actions": actions}
            if self.hub.full:
                more = {"error": {"code": 507, "message": "Storage quota exceeded"}}
            objects.append({"oid": oid, "size": size} | more)
        self._json({"transfer": "multipart", "objects": objects})

    def _lfs(self, oid: str, what: str | None) -> None:
        hub = self.hub
        if what == "verify":
            if len(hub.blobs.get(oid, b"")) != json.loads(self.body)["size"]:
                raise Refusal(400, "not uploaded")
        elif what == "complete":
            numbers = [part["partNumber"] for part in json.loads(self.body)["parts"]]
            self._keep(oid, b"".join(hub.parts[oid][number] for number in sorted(numbers)))
        elif what is not None:
            hub.parts.setdefault(oid, {})[int(what)] = self.body
        else:
            self._keep(oid, self.body)
        hub.received[oid] = hub.received.get(oid, 0) + len(self.body) * (self.command == "PUT")
        self._json({}, headers={"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def _keep(self, oid: str, data: bytes) -> None:
        if _sha256(data) != oid:
            raise Refusal(400, "content does not match its name")
        self.hub.blobs[oid] = data

    def _api_commit(self, name: str, repo: Repo, revision: str) -> None:
        proposal = "create_pr" in self.query
        if not proposal:
            self._may("write")
        before = self._commit_of(repo, revision)
        files = dict(repo.commits[before])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") not in (None, before):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refusal(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = self.hub.blobs[value["oid"]]
                repo.large.add(value["path"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        number = sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1
        commit = repo.add(f"refs/pr/{number}" if proposal else revision, files)
        answer = {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"}
        self._json(answer | ({"pullRequestUrl": f"{self.hub.url}/{name}/discussions/{number}"} if proposal else {}))

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        commit = self._commit_of(repo, revision)
        headers = {"X-Repo-Commit": commit}
        if path not in repo.commits[commit]:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        data = repo.commits[commit][path]
        if path not in repo.large:
            self._download(data, headers | {"ETag": f'"{_git_oid(data)}"'})
            return
        oid = _sha256(data)
        self.hub.blobs[oid] = data
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        # Another name of this machine: the token must not go there.
        target = self.hub.url.replace("127.0.0.1", "localhost")
        self._bytes(b"", 302, headers | linked | {"Location": f"{target}/cdn/{oid}"})

    def _download(self, data: bytes, headers: dict[str, str] | None = None) -> None:
        if self.path.startswith("/cdn/") and self.headers.get("Authorization"):
            raise Refusal(400, "the token was sent to the storage")
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wanted is None:
            self._bytes(data, 200, headers)
            return
        start, end = int(wanted[1]), len(data)
        more = {"Content-Range": f"bytes {start}-{end - 1}/{end}", "Content-Length": str(end - start)}
        self._bytes(data[start:], 206, (headers or {}) | more)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
