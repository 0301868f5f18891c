"""A Hub on the loopback interface: what `huggingface_hub` asks for when it downloads and pushes, and nothing kinder.

Downloads: model info, revisions, trees, and files by HEAD and GET with etags and ranges; large files are redirected to
another host with a signed address. Pushes: who-am-I, repositories, branches, front matter, pre-upload, large files by
the LFS batch (in parts where they are long) with their size and sha256 verified, and commits as ndjson. It answers 401
to a wrong token and to whoever may not know of a repository without one, 403 to who may not write, 404 with the Hub's
error codes, 409 to what exists, 412 to a parent that is no longer the head; 400 to every field it does not know. Every
request is logged. It can cut a transfer half way, fail a file or a commit, or die.

Run as `python -m tests.hub_server ROOT [--port N] [--die-after BYTES]` it keeps its state in the folder ROOT, prints
its address, and ends its process in the middle of an upload when told to. Not covered: datasets, Xet (its routes are
missing, as on a server without it), pull requests, pages of long listings.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import hmac
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.hub_rules import RefusalError, apply, fields, is_inside, mistakes, require, signature_of
from tests.hub_state import GITATTRIBUTES, Hub, Repository, Request, User, is_large, known_by, tree

__all__ = ["Hub", "Repository", "serve"]

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
RANGE = re.compile(r"bytes=(\d+)-(\d*)")
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
CHUNK_BYTES = 1 << 14
LFS_TYPE = "application/vnd.git-lfs+json"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    lock: threading.Lock
    received = 0

    def do_GET(self) -> None:
        self._answer(self._read_route)

    def do_HEAD(self) -> None:
        self._answer(self._read_route)

    def do_POST(self) -> None:
        self._answer(self._post_route)

    def do_PUT(self) -> None:
        self._answer(self._put)

    def log_message(self, format: str, *args: object) -> None:
        """Requests go to `Hub.log`, not to stderr."""

    def _answer(self, route: Any) -> None:
        self.received = 0
        try:
            try:
                route(urlsplit(self.path).path)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise RefusalError(400, message=f"Bad request: {error!r}") from error
        except RefusalError as refusal:
            if self.hub.echoes_tokens:
                refusal.content["error"] += f" ({self.headers.get('Authorization', '').removeprefix('Bearer ')})"
            if self.hub.is_a_mirror:
                refusal.headers = {}
            self.close_connection = self.close_connection or self.command == "PUT"
            self._send(
                refusal.status,
                json.dumps(refusal.content).encode(),
                refusal.headers | {"Content-Type": "application/json"},
            )
        except ConnectionError:
            self.close_connection = True

    # ------------------------------------------------------------------------------------------------------- reading

    def _read_route(self, path: str) -> None:
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(/.+)?)?", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        stored = re.fullmatch(r"/cdn/([0-9a-f]+)/([^/]+)/([0-9a-f]{64})/(.+)", path)
        if path == "/api/whoami-v2":
            user = self._user(required=True)
            assert user is not None
            organizations = [{"type": "org", "name": name} for name in user.organizations]
            role = {"accessToken": {"displayName": "test", "role": "write" if user.writes else "read"}}
            self._json({"type": "user", "name": user.name, "orgs": organizations, "auth": role})
        elif api:
            repository, name = self._open(api[1]), api[1]
            commit = self._commit(repository, unquote(api[3] or "main"))
            files = repository.commits[commit]
            if api[2] == "tree":
                recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
                entries = tree(files, unquote(api[4] or "").strip("/"), recursive)
                if entries is None:
                    raise RefusalError(404, "EntryNotFound", f"{api[4]} does not exist")
                if self.hub.is_a_mirror:
                    entries = [entry | {"oid": entry["oid"][::-1]} for entry in entries]
                self._json(entries)
            else:
                siblings = [{"rfilename": file} for file in sorted(files)]
                flags = {"private": repository.private, "gated": "manual" if repository.gated else False}
                self._json({"id": name, "modelId": name, "sha": commit, "siblings": siblings, **flags})
        elif resolve:
            self._resolve(resolve[1], unquote(resolve[2]), unquote(resolve[3]))
        elif stored:
            self._require_signed(stored[1], f"GET {stored[2]} {stored[3]}")
            name = unquote(stored[4])
            repository = self.hub.repositories[unquote(stored[2])]
            content = next(
                files[name]
                for files in repository.commits.values()
                if name in files and known_by(name, files[name]) == stored[3]
            )
            self._content(name, content, {"ETag": f'"{stored[3]}"'})
        else:
            raise RefusalError(404, message="Not found")

    def _resolve(self, repo: str, revision: str, file: str) -> None:
        """A small file itself; the address of a large one on another host, with what is known of it."""
        repository = self._open(repo)
        commit = self._commit(repository, revision)
        if repository.gated:
            status = 401 if self.headers.get("Authorization") is None else 403
            raise RefusalError(status, "GatedRepo", f"Access to model {repo} is restricted.", commit)
        if file not in repository.commits[commit]:
            raise RefusalError(404, "EntryNotFound", "Entry not found", commit)
        content = repository.commits[commit][file]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{known_by(file, content)}"'}
        if not is_large(file, len(content)):
            self._content(file, content, headers)
            return
        oid, place = known_by(file, content), quote(repo, safe="")
        location = f"{self._other_host()}/cdn/{signature_of(f'GET {place} {oid}')}/{place}/{oid}/{quote(file)}"
        linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{oid}"', "Location": location}
        self._send(302, b"", headers | linked)

    def _content(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        """A file, or the asked range of it."""
        if self.command == "GET" and name in self.hub.failing:
            raise RefusalError(500, message="Internal error")
        headers = headers | {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
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
        if self.command == "GET" and self.hub.cuts.get(name, 0) > 0:
            self.hub.cuts[name] -= 1
            sent //= 2
        self._send(status, part, headers, sent)

    # ------------------------------------------------------------------------------------------------------- pushing

    def _post_route(self, path: str) -> None:
        body = self._body()
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/([^/]+)", path)
        lfs = re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/(objects/batch|verify)", path)
        parts = re.fullmatch(r"/complete/([0-9a-f]+)/([^/]+)/([0-9a-f]{64})", path)
        with self.lock:
            if path == "/api/repos/create":
                self._create(fields(body, {"name"}, {"organization", "type", "visibility"}))
            elif path == "/api/validate-yaml":
                self._validate(fields(body, {"content", "repoType"}))
            elif api and api[2] == "branch":
                self._branch(self._open(api[1], write=True), unquote(api[3]), fields(body, set(), {"startingPoint"}))
            elif api:
                repository, branch = self._open(api[1], write=True), unquote(api[3])
                commit = self._commit(repository, branch)
                if api[2] == "preupload":
                    self._preupload(repository.commits[commit], fields(body, {"files"}, {"gitIgnore"}))
                elif branch not in repository.refs:
                    raise RefusalError(400, message=f"{branch} is no branch")
                else:
                    self._commit_files(api[1], repository, branch, body)
            elif lfs:
                self._require_type(LFS_TYPE if lfs[2] == "objects/batch" else "application/json")
                repository = self._open(lfs[1], write=True)
                if lfs[2] == "verify":
                    asked = fields(body, {"oid", "size"})
                    if len(repository.objects.get(asked["oid"], b"")) != asked["size"]:
                        raise RefusalError(404, message="This object did not arrive")
                    self._json({})
                else:
                    self._batch(
                        lfs[1], repository, fields(body, {"operation", "transfers", "objects", "hash_algo"}, {"ref"})
                    )
            elif parts:
                self._complete(parts[1], parts[2], parts[3], fields(body, {"oid", "parts"}))
            else:
                raise RefusalError(404, message="Not found")

    def _create(self, asked: dict[str, Any]) -> None:
        user = self._user(required=True)
        assert user is not None
        require(asked.get("type", "model") == "model", "only models are kept here")
        require(asked.get("visibility", "public") in ("public", "private"), "visibility is public or private")
        require(NAME.fullmatch(asked["name"]) is not None, "invalid name")
        name = f"{asked.get('organization') or user.name}/{asked['name']}"
        if not user.writes or not user.owns(name):
            raise RefusalError(403, message=f"You don't have the rights to create a model under {name.split('/')[0]}")
        place = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.repositories:
            raise RefusalError(409, message="You already created this model repo", **place)
        repository = self.hub.repository(name, private=asked.get("visibility") == "private")
        repository.commit({".gitattributes": GITATTRIBUTES})
        self._json(place)

    def _branch(self, repository: Repository, name: str, asked: dict[str, Any]) -> None:
        require(NAME.fullmatch(name.replace("/", "-")) is not None, "Invalid reference for a branch")
        if name in repository.refs:
            raise RefusalError(409, message="Reference already exists")
        repository.refs[name] = self._commit(repository, asked.get("startingPoint", "main"))
        self._json({})

    def _validate(self, asked: dict[str, Any]) -> None:
        """The front matter of a card; what is wrong with it is listed as the Hub does."""
        require(asked["repoType"] == "model", "repoType")
        wrong = mistakes(asked["content"])
        if wrong:
            raise RefusalError(400, message="Invalid metadata", errors=[{"message": text} for text in wrong])
        self._json({"errors": [], "warnings": []})

    def _preupload(self, files: dict[str, bytes], asked: dict[str, Any]) -> None:
        require(0 < len(asked["files"]) <= 256, "1 to 256 files")
        answers = []
        for file in asked["files"]:
            require(file.keys() == {"path", "sample", "size"}, "a file has path, sample and size")
            require(is_inside(file["path"]) and isinstance(file["size"], int), "invalid path or size")
            require(len(base64.b64decode(file["sample"], validate=True)) == min(file["size"], 512), "sample")
            known = files.get(file["path"])
            answers.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large(file["path"], file["size"]) else "regular",
                    "shouldIgnore": file["path"] in self.hub.ignored,
                    **({} if known is None else {"oid": known_by(file["path"], known)}),
                }
            )
        self._json({"files": answers})

    def _batch(self, name: str, repository: Repository, asked: dict[str, Any]) -> None:
        """Where each object is to be sent, and in parts of which size; nothing for those that are here."""
        require(asked["operation"] == "upload" and asked["hash_algo"] == "sha256", "operation, hash_algo")
        require("basic" in asked["transfers"] and "multipart" in asked["transfers"], "transfers")
        require(self.headers.get("Accept") == LFS_TYPE, "Accept")
        place, objects = quote(name, safe=""), []
        for item in asked["objects"]:
            require(item.keys() == {"oid", "size"} and SHA256.fullmatch(item["oid"]) is not None, "oid and size")
            require(isinstance(item["size"], int) and item["size"] > 0, "size")
            answer = dict(item)
            if item["oid"] not in repository.objects:
                answer["actions"] = {
                    "upload": self._upload_action(place, item["oid"], item["size"]),
                    "verify": {"href": f"{self.hub.url}/{name}.git/info/lfs/verify"},
                }
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects}, LFS_TYPE)

    def _upload_action(self, place: str, oid: str, size: int) -> dict[str, Any]:
        def address(part: int, nbytes: int) -> str:
            signature = signature_of(f"PUT {place} {oid} {part} {nbytes}")
            return f"{self._other_host()}/storage/{signature}/{place}/{nbytes}/{oid}" + (f"/{part}" if part else "")

        length = self.hub.part_bytes
        if size <= length:
            return {"href": address(0, size)}
        numbers = range(1, -(-size // length) + 1)
        sizes = {part: min(length, size - (part - 1) * length) for part in numbers}
        return {
            "href": f"{self.hub.url}/complete/{signature_of(f'POST {place} {oid}')}/{place}/{oid}",
            "header": {"chunk_size": str(length)} | {f"{part:05d}": address(part, sizes[part]) for part in numbers},
        }

    def _put(self, path: str) -> None:
        """An object or a part of one, by its signed address alone: storage refuses a second way to log in."""
        match = re.fullmatch(r"/storage/([0-9a-f]+)/([^/]+)/(\d+)/([0-9a-f]{64})(?:/(\d+))?", path)
        require(match is not None, "invalid address")
        assert match is not None
        place, size, oid, part = match[2], int(match[3]), match[4], int(match[5] or 0)
        self._require_signed(match[1], f"PUT {place} {oid} {part} {size}")
        require(self.headers.get("Authorization") is None, "Only one auth mechanism allowed")
        if self.headers.get("Content-Length") is None:
            raise RefusalError(411, message="Content-Length is required")
        require(int(self.headers["Content-Length"]) == size, "the signature is for another size")
        content = self._receive(size)
        with self.lock:
            repository = self.hub.repositories[unquote(place)]
            etag = hashlib.md5(content, usedforsecurity=False).hexdigest()
            if part:
                repository.objects[f"{oid}#{part}"] = content
            else:
                require(hashlib.sha256(content).hexdigest() == oid, "the content has another sha256")
                repository.objects[oid] = content
            self._send(200, b"", {"ETag": f'"{etag}"'})

    def _complete(self, signature: str, place: str, oid: str, asked: dict[str, Any]) -> None:
        """Put the parts of an object together."""
        self._require_signed(signature, f"POST {place} {oid}")
        repository = self.hub.repositories[unquote(place)]
        require(asked["oid"] == oid, "oid")
        parts = []
        for number, item in enumerate(asked["parts"], start=1):
            part = repository.objects.get(f"{oid}#{number}", b"")
            etag = hashlib.md5(part, usedforsecurity=False).hexdigest()
            require(item == {"partNumber": number, "etag": f'"{etag}"'}, f"part {number} did not arrive")
            parts.append(part)
        content = b"".join(parts)
        require(hashlib.sha256(content).hexdigest() == oid, "the parts have another sha256")
        repository.objects = {key: value for key, value in repository.objects.items() if not key.startswith(f"{oid}#")}
        repository.objects[oid] = content
        self._json({})

    def _commit_files(self, name: str, repository: Repository, branch: str, body: bytes) -> None:
        """All operations or none of them."""
        self._require_type("application/x-ndjson")
        if self.hub.failing_commits:
            self.hub.failing_commits -= 1
            raise RefusalError(500, message="Internal error")
        lines = [json.loads(line) for line in body.splitlines()]
        require(bool(lines) and all(line.keys() == {"key", "value"} for line in lines), "lines of key and value")
        require([line["key"] == "header" for line in lines] == [True] + [False] * (len(lines) - 1), "one header, first")
        header = lines[0]["value"]
        require(bool(header.get("summary")) and header.keys() <= {"summary", "description", "parentCommit"}, "header")
        if header.get("parentCommit", repository.refs[branch]) != repository.refs[branch]:
            raise RefusalError(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(repository.head(branch))
        for line in lines[1:]:
            apply(line["key"], line["value"], files, repository.objects)
        sha = repository.commit(files, branch)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    # -------------------------------------------------------------------------------------------------------- shared

    def _user(self, required: bool = False) -> User | None:
        """Whose token this is; a wrong one is refused even where none is needed."""
        authorization = self.headers.get("Authorization")
        if authorization is None:
            if required:
                raise RefusalError(401, message="Invalid username or password.")
            return None
        user = self.hub.users.get(authorization.removeprefix("Bearer "))
        if user is None or not authorization.startswith("Bearer "):
            raise RefusalError(401, message="Invalid credentials in Authorization header")
        return user

    def _open(self, name: str, *, write: bool = False) -> Repository:
        """The repository, if the caller may know that it exists; like the Hub, anonymous callers always get 401."""
        user = self._user()
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and (user is None or not user.owns(name))):
            raise RefusalError(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if write and user is None:
            raise RefusalError(401, message="Invalid username or password.")
        if write and user is not None and not (user.writes and user.owns(name)):
            raise RefusalError(403, message=f"You need write access to {name}")
        return repository

    def _commit(self, repository: Repository, revision: str) -> str:
        commit = revision if COMMIT.fullmatch(revision) else repository.refs.get(revision, "")
        if commit not in repository.commits:
            raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _require_signed(self, signature: str, what: str) -> None:
        if not hmac.compare_digest(signature, signature_of(what)):
            raise RefusalError(403, message="SignatureDoesNotMatch")

    def _require_type(self, expected: str) -> None:
        require(self.headers.get("Content-Type") == expected, f"Content-Type is not {expected}")

    def _other_host(self) -> str:
        """Where content lies: another name of this machine, so that clients treat it as another host."""
        return self.hub.url.replace("127.0.0.1", "localhost")

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length")
        if length is None:
            self.close_connection = True
            raise RefusalError(411, message="Content-Length is required")
        self.received = int(length)
        return self.rfile.read(int(length))

    def _receive(self, size: int) -> bytes:
        """The body of an upload, unless this is where the connection, or the server, is to break."""
        cut = self.hub.upload_cuts > 0
        self.hub.upload_cuts -= cut
        content = b""
        while len(content) < size:
            if cut and len(content) >= size // 2:
                raise ConnectionAbortedError
            chunk = self.rfile.read1(min(CHUNK_BYTES, size - len(content)))  # type: ignore[attr-defined]
            if not chunk:
                raise ConnectionAbortedError
            content += chunk
            if self.hub.die_after is not None:
                self.hub.die_after -= len(chunk)
                if self.hub.die_after <= 0:
                    os._exit(9)
        self.received = size
        return content

    def _json(self, value: object, kind: str = "application/json") -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": kind})

    def _send(self, status: int, content: bytes, headers: dict[str, str], sent: int | None = None) -> None:
        """Answer; with `sent` below the length, the connection breaks off after that many bytes."""
        path, asked = urlsplit(self.path).path, self.headers.get("Range")
        self.hub.record(Request(self.command, path, asked, status, self.received))
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:sent])
        if sent is not None and sent < len(content):
            self.close_connection = True


def _server(hub: Hub, port: int = 0) -> ThreadingHTTPServer:
    bound = {"hub": hub, "lock": threading.Lock()}
    server = ThreadingHTTPServer(("127.0.0.1", port), type("BoundHandler", (Handler,), bound))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    return server


@contextmanager
def serve() -> Iterator[Hub]:
    """A running Hub; its address is `hub.url`."""
    hub = Hub()
    server = _server(hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main() -> None:
    """Serve until the process ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--die-after", type=int, metavar="BYTES")
    parser.add_argument("--part-bytes", type=int, default=1 << 20)
    arguments = parser.parse_args()
    arguments.root.mkdir(parents=True, exist_ok=True)
    hub = Hub(arguments.root)
    hub.die_after, hub.part_bytes = arguments.die_after, arguments.part_bytes
    server = _server(hub, arguments.port)
    print(hub.url, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
