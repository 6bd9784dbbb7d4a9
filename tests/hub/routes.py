"""What the small Hub answers: the routes and fields that huggingface_hub 1.33 and 2.4 use without xet."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import unquote

import yaml

from hub.state import Repo, git_oid, sha256
from hub.wire import Refusal, Wire

#: Tokens and what they may do.
TOKENS = {"hf_writer": "write", "hf_reader": "read"}


class Routes(Wire):
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
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
        if path in repo.large:
            entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 127}
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
            oid = None if there is None else sha256(there) if large else git_oid(there)
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
        if sha256(data) != oid:
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
            self._download(data, headers | {"ETag": f'"{git_oid(data)}"'})
            return
        oid = sha256(data)
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
