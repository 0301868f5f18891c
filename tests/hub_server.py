"""A read-only Hub on the loopback interface: what `huggingface_hub` asks for when it downloads, and nothing kinder.

It serves model info, revisions, trees, and files by HEAD and GET with etags and ranges; it answers 401 to a wrong
token and to a private repository without one, 401 or 403 to a gated one's files, 404 with the Hub's error codes
otherwise. It can cut a file's connection half way, or fail a file. Every request is logged. Not covered: pushing,
datasets, Xet, redirects to a CDN, pages of long listings.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_THRESHOLD = 10_000  # bytes; the Hub decides by file type and by size (10 MB)
COMMIT = re.compile(r"[0-9a-f]{40}")
RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass
class Repository:
    """Branches and tags name commits; a commit is a set of files."""

    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Add a commit holding `files` and let `ref` name it; its sha follows from the content."""
        digest = hashlib.sha1(usedforsecurity=False)
        for name, content in sorted(files.items()):
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        sha = digest.hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        return sha


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    status: int


class Hub:
    """The state of the server: repositories, the one valid token, the faults to show, and the log."""

    def __init__(self, token: str = "hf_valid") -> None:
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.cuts: dict[str, int] = {}  # file name -> how many more of its transfers break off half way
        self.failing: set[str] = set()  # file names whose content is answered with 500
        self.log: list[Request] = []
        self.url = ""

    def repository(self, name: str, *, private: bool = False, gated: bool = False) -> Repository:
        return self.repositories.setdefault(name, Repository(private=private, gated=gated))

    def gets(self, name: str) -> list[Request]:
        """The GET requests for one file."""
        return [entry for entry in self.log if entry.method == "GET" and entry.path.endswith("/" + name)]


class RefusalError(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, code: str = "", message: str = "", commit: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, format: str, *args: object) -> None:
        """Requests go to `Hub.log`, not to stderr."""

    def _answer(self, body: bool) -> None:
        try:
            self._route(urlsplit(self.path).path, body)
        except RefusalError as refusal:
            content = json.dumps({"error": str(refusal)}).encode()
            self._send(refusal.status, content, refusal.headers | {"Content-Type": "application/json"}, body)

    def _route(self, path: str, body: bool) -> None:
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(/.+)?)?", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if api:
            repository, name = self._open(api[1]), api[1]
            commit = self._commit(repository, unquote(api[3] or "main"))
            if api[2] == "tree":
                recursive = "recursive=true" in self.path.lower()
                self._json(_tree(repository.commits[commit], unquote(api[4] or "").strip("/"), recursive), body)
            else:
                siblings = [{"rfilename": file} for file in sorted(repository.commits[commit])]
                flags = {"private": repository.private, "gated": "manual" if repository.gated else False}
                self._json({"id": name, "modelId": name, "sha": commit, "siblings": siblings, **flags}, body)
        elif resolve:
            repository = self._open(resolve[1])
            commit = self._commit(repository, unquote(resolve[2]))
            if repository.gated:
                status = 401 if self.headers.get("Authorization") is None else 403
                raise RefusalError(status, "GatedRepo", f"Access to model {resolve[1]} is restricted.", commit)
            file = unquote(resolve[3])
            if file not in repository.commits[commit]:
                raise RefusalError(404, "EntryNotFound", "Entry not found", commit)
            if body and file in self.hub.failing:
                raise RefusalError(500, message="Internal error", commit=commit)
            self._file(file, repository.commits[commit][file], commit, body)
        else:
            raise RefusalError(404, message="Not found")

    def _open(self, name: str) -> Repository:
        """The repository, if the caller may know that it exists; like the Hub, anonymous callers always get 401."""
        authorization = self.headers.get("Authorization")
        if authorization is not None and authorization != f"Bearer {self.hub.token}":
            raise RefusalError(401, message="Invalid credentials in Authorization header")
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and authorization is None):
            raise RefusalError(401 if authorization is None else 404, "RepoNotFound", "Repository not found")
        return repository

    def _commit(self, repository: Repository, revision: str) -> str:
        commit = revision if COMMIT.fullmatch(revision) else repository.refs.get(revision, "")
        if commit not in repository.commits:
            raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _file(self, name: str, content: bytes, commit: str, body: bool) -> None:
        entry = _tree_entry(name, content)
        headers = {
            "ETag": f'"{entry.get("lfs", entry)["oid"]}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        asked = self.headers.get("Range")
        status, first, last = 200, 0, len(content) - 1
        if asked is not None:
            match = RANGE.fullmatch(asked)
            first = int(match[1]) if match else len(content)
            last = min(int(match[2]), last) if match and match[2] else last
            if first > last:
                raise RefusalError(416, message="Range not satisfiable")
            status = 206
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        part = content[first : last + 1]
        sent = len(part)
        if body and self.hub.cuts.get(name, 0) > 0:
            self.hub.cuts[name] -= 1
            sent //= 2
        self._send(status, part, headers, body, sent)

    def _json(self, value: object, body: bool) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool, sent: int | None = None) -> None:
        """Answer; with `sent` below the length, the connection breaks off after that many bytes."""
        self.hub.log.append(Request(self.command, urlsplit(self.path).path, self.headers.get("Range"), status))
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content[:sent])
        if sent is not None and sent < len(content):
            self.close_connection = True


def _tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """The entries of a folder ("" is the root): its files, and without `recursive` its direct folders."""
    prefix = f"{folder}/" if folder else ""
    inside = {name: content for name, content in sorted(files.items()) if name.startswith(prefix)}
    if not inside:
        raise RefusalError(404, "EntryNotFound", f"{folder} does not exist")
    here = {name: content for name, content in inside.items() if recursive or "/" not in name[len(prefix) :]}
    folders = sorted({prefix + name[len(prefix) :].split("/")[0] for name in inside.keys() - here.keys()})
    trees = [{"type": "directory", "path": path, "size": 0, "oid": _blob_id(path.encode())} for path in folders]
    return trees + [_tree_entry(*item) for item in here.items()]


def _tree_entry(name: str, content: bytes) -> dict[str, Any]:
    """A file as the tree lists it: the git blob id, and the sha256 where it is stored by LFS."""
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content)}
    if len(content) < LFS_THRESHOLD:
        return entry | {"oid": _blob_id(content)}
    sha256 = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
    return entry | {
        "oid": _blob_id(pointer),
        "lfs": {"oid": sha256, "size": len(content), "pointerSize": len(pointer)},
    }


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


@contextmanager
def serve() -> Iterator[Hub]:
    """A running Hub; its address is `hub.url`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
