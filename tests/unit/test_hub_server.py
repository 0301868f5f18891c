"""The loopback Hub is no kinder than the Hub: what `huggingface_hub` would never send, or a broken client would."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.hub_server import Hub, serve
from tests.hub_state import Repository

CONTENT = b"weights" * 100
OID = hashlib.sha256(CONTENT).hexdigest()
LFS = {"Content-Type": "application/vnd.git-lfs+json", "Accept": "application/vnd.git-lfs+json"}
NDJSON = {"Content-Type": "application/x-ndjson"}
BATCH = {
    "operation": "upload",
    "transfers": ["basic", "multipart"],
    "hash_algo": "sha256",
    "objects": [{"oid": OID, "size": len(CONTENT)}],
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as running:
        yield running


@pytest.fixture
def repository(hub: Hub) -> Repository:
    made = hub.repository("me/a")
    made.commit({"old.txt": b"old"})
    return made


def ask(
    hub: Hub, method: str, address: str, body: Any = None, token: str | None = "hf_valid", **headers: str
) -> tuple[int, Any]:
    """Status and content of the answer."""
    parts = urlsplit(address)
    connection = HTTPConnection("127.0.0.1", int(hub.url.rpartition(":")[2]), timeout=10)
    given = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    authorization = {"Authorization": f"Bearer {token}"} if token else {}
    named = {"Content-Type": "application/json"} | {key.replace("_", "-"): value for key, value in headers.items()}
    connection.request(method, parts.path, given, authorization | named)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content) if content else None


def commit(hub: Hub, *operations: tuple[str, dict[str, Any]], **header: Any) -> tuple[int, Any]:
    lines = [("header", {"summary": "s", "description": ""} | header), *operations]
    body = b"".join(json.dumps({"key": key, "value": value}).encode() + b"\n" for key, value in lines)
    return ask(hub, "POST", "/api/models/me/a/commit/main", body, **NDJSON)


def large(name: str = "model.safetensors", oid: str = OID, size: int = len(CONTENT)) -> tuple[str, dict[str, Any]]:
    return "lfsFile", {"path": name, "algo": "sha256", "oid": oid, "size": size}


def small(name: str, content: bytes) -> tuple[str, dict[str, Any]]:
    return "file", {"path": name, "content": base64.b64encode(content).decode(), "encoding": "base64"}


def upload_address(hub: Hub, **asked: Any) -> dict[str, Any]:
    status, answer = ask(hub, "POST", "/me/a.git/info/lfs/objects/batch", BATCH | asked, **LFS)
    assert status == 200
    return dict(answer["objects"][0])


def test_a_large_file_is_what_was_announced_or_it_is_not_there(hub: Hub, repository: Repository) -> None:
    address = upload_address(hub)["actions"]["upload"]["href"]
    other = b"x" * len(CONTENT)
    assert ask(hub, "PUT", address, other, token=None)[0] == 400  # another sha256
    assert ask(hub, "PUT", address, CONTENT[:-1], token=None)[0] == 400  # another size
    assert ask(hub, "PUT", address, CONTENT)[0] == 400  # a token beside the signature
    assert ask(hub, "PUT", address.replace("/storage/", "/storage/0"), CONTENT, token=None)[0] == 403
    assert commit(hub, large())[0] == 400 and not repository.objects  # it did not arrive
    assert ask(hub, "POST", "/me/a.git/info/lfs/verify", {"oid": OID, "size": len(CONTENT)})[0] == 404
    assert ask(hub, "PUT", address, CONTENT, token=None)[0] == 200
    assert ask(hub, "POST", "/me/a.git/info/lfs/verify", {"oid": OID, "size": len(CONTENT)})[0] == 200
    assert "actions" not in upload_address(hub)  # nothing is asked for twice
    assert commit(hub, large(size=1))[0] == 400
    assert list(repository.head()) == ["old.txt"]
    assert commit(hub, large())[0] == 200
    assert repository.head() == {"old.txt": b"old", "model.safetensors": CONTENT}


def test_parts_make_the_whole_or_nothing(hub: Hub, repository: Repository) -> None:
    hub.part_bytes = 300
    action = upload_address(hub)["actions"]["upload"]
    parts = {number: address for number, address in action["header"].items() if number.isdigit()}
    assert action["header"]["chunk_size"] == "300" and sorted(parts) == ["00001", "00002", "00003"]
    chunks = [CONTENT[start : start + 300] for start in range(0, len(CONTENT), 300)]
    etags = ['"' + hashlib.md5(chunk).hexdigest() + '"' for chunk in chunks]
    whole = [{"partNumber": number, "etag": etag} for number, etag in enumerate(etags, start=1)]
    for number, chunk in list(zip(sorted(parts), chunks, strict=True))[:2]:
        assert ask(hub, "PUT", parts[number], chunk, token=None)[0] == 200
    assert ask(hub, "PUT", parts["00003"], chunks[0], token=None)[0] == 400  # the last one is shorter
    assert ask(hub, "POST", action["href"], {"oid": OID, "parts": whole}, **LFS)[0] == 400
    assert ask(hub, "POST", action["href"], {"oid": OID, "parts": whole[:2]}, **LFS)[0] == 400
    assert OID not in repository.objects
    assert ask(hub, "PUT", parts["00003"], chunks[2], token=None)[0] == 200
    assert ask(hub, "POST", action["href"], {"oid": OID, "parts": whole}, **LFS)[0] == 200
    assert repository.objects == {OID: CONTENT}


def test_a_commit_is_all_or_nothing(hub: Hub, repository: Repository) -> None:
    head = repository.refs["main"]
    good = small("a.json", b"{}")
    refused = {
        "unknown operation": (good, ("link", {"path": "b"})),
        "outside": (good, small("../b", b"")),
        "git's own": (good, small(".git/config", b"")),
        "no base64": (good, ("file", {"path": "b", "content": "ä", "encoding": "base64"})),
        "large by name": (good, small("model.safetensors", b"x")),
        "large by size": (good, small("big.json", b"x" * 10_000)),
        "unknown field": (good, ("file", good[1] | {"mode": "755"})),
        "two headers": (good, ("header", {"summary": "s"})),
    }
    for what, operations in refused.items():
        assert commit(hub, *operations)[0] == 400, what
    assert commit(hub, good, ("deletedFile", {"path": "absent"}))[0] == 404
    assert commit(hub, good, summary="")[0] == 400
    assert commit(hub, good, parentCommit="0" * 40)[0] == 412
    assert repository.refs["main"] == head
    assert ask(hub, "POST", "/api/models/me/a/commit/other", b"", **NDJSON)[0] == 404
    assert ask(hub, "POST", f"/api/models/me/a/commit/{head}", b"", **NDJSON)[0] == 400  # no branch
    status, answer = commit(hub, good, ("deletedFile", {"path": "old.txt"}), parentCommit=head)
    assert status == 200 and answer["commitOid"] == repository.refs["main"]
    assert repository.head() == {"a.json": b"{}"}


def test_who_may_do_what(hub: Hub, repository: Repository) -> None:
    hub.repository("me/hidden", private=True).commit({"a": b""})
    preupload = {"files": [{"path": "a", "sample": "", "size": 0}]}
    for repo, token, expected in (
        ("me/a", "hf_valid", 200),
        ("me/a", "hf_reader", 403),
        ("me/a", "hf_stranger", 403),
        ("me/a", "hf_wrong", 401),
        ("me/a", None, 401),
        ("me/hidden", "hf_valid", 200),
        ("me/hidden", "hf_stranger", 404),
        ("me/hidden", None, 401),
        ("me/absent", "hf_valid", 404),
        ("me/absent", None, 401),
    ):
        assert ask(hub, "POST", f"/api/models/{repo}/preupload/main", preupload, token)[0] == expected, (repo, token)
    for path, body, token, expected in (
        ("/api/repos/create", {"name": "b"}, "hf_valid", 200),
        ("/api/repos/create", {"name": "b", "visibility": "private"}, "hf_valid", 409),
        ("/api/repos/create", {"name": "c", "organization": "stranger"}, "hf_valid", 403),
        ("/api/repos/create", {"name": "c"}, "hf_reader", 403),
        ("/api/repos/create", {"name": "c"}, None, 401),
        ("/api/repos/create", {"name": "c", "sdk": "static"}, "hf_valid", 400),
        ("/api/models/me/a/branch/b", {}, "hf_valid", 200),
        ("/api/models/me/a/branch/b", {}, "hf_valid", 409),
        ("/api/models/me/a/branch/c", {}, "hf_stranger", 403),
        ("/api/models/me/a/preupload/absent", preupload, "hf_valid", 404),
    ):
        assert ask(hub, "POST", path, body, token)[0] == expected, (path, body, token)
    assert hub.repositories.keys() == {"me/a", "me/b", "me/hidden"} and not hub.repositories["me/b"].private


def test_unknown_and_missing_fields_are_refused(hub: Hub, repository: Repository) -> None:
    batch = "/me/a.git/info/lfs/objects/batch"
    assert ask(hub, "POST", batch, BATCH)[0] == 400  # not the media type of LFS
    for wrong in (
        {"operation": "download"},
        {"hash_algo": "md5"},
        {"extra": 1},
        {"objects": [{"oid": "0", "size": 1}]},
    ):
        assert ask(hub, "POST", batch, BATCH | wrong, **LFS)[0] == 400, wrong
    for file in ({"path": "a"}, {"path": "a", "sample": "", "size": 5}, {"path": "/a", "sample": "", "size": 0}):
        assert ask(hub, "POST", "/api/models/me/a/preupload/main", {"files": [file]})[0] == 400, file
    assert ask(hub, "POST", "/api/models/me/a/preupload/main", b"{")[0] == 400
    assert ask(hub, "GET", "/api/models/me/a/xet-write-token/main")[0] == 404


@pytest.mark.parametrize(
    ("matter", "fragment"),
    [
        ("tags: [moe]\nbase_model: a/b\nlicense: mit", None),
        ("base_model_relation: pruned", "base_model_relation"),
        ("base_model: model", "base_model"),
        ("datasets: [texts.jsonl]", "datasets"),
        ("license: [mit]", "license"),
        ("model-index:\n- name: a\n  results: [{task: {}, dataset: {}, metrics: []}]", "model-index"),
        ("- a", "no mapping"),
        ("a: [", "invalid YAML"),
    ],
)
def test_front_matter_is_judged(hub: Hub, matter: str, fragment: str | None) -> None:
    body = {"content": f"---\n{matter}\n---\n# Model\n", "repoType": "model"}
    status, answer = ask(hub, "POST", "/api/validate-yaml", body)
    assert status == (200 if fragment is None else 400)
    assert fragment is None or fragment in answer["errors"][0]["message"]
