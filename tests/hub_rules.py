"""What the loopback Hub of the tests accepts: fields, paths, front matter, the operations of a commit, signatures."""

from __future__ import annotations

import base64
import hmac
import json
import re
from typing import Any

import yaml

from tests.hub_state import is_large

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SECRET = b"of the signed addresses"
MAX_REGULAR_BYTES = 10 << 20
RELATIONS = ("adapter", "merge", "quantized", "finetune")


class RefusalError(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, code: str = "", message: str = "", commit: str = "", **content: Any) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        self.content = {"error": message} | content


def require(condition: bool, what: str) -> None:
    if not condition:
        raise RefusalError(400, message=f"Bad request: {what}")


def fields(body: bytes, required: set[str], optional: set[str] | None = None) -> dict[str, Any]:
    """A JSON body that has these fields and no others."""
    try:
        content = json.loads(body)
    except ValueError:
        raise RefusalError(400, message="Bad request: no JSON") from None
    known = isinstance(content, dict) and required <= content.keys() <= required | (optional or set())
    require(known, f"fields {sorted(content) if isinstance(content, dict) else content}")
    return dict(content)


def is_inside(path: str) -> bool:
    """Whether a path stays in the repository."""
    return bool(path) and not any(part in ("", ".", "..", ".git") for part in path.split("/"))


def apply(key: str, value: dict[str, Any], files: dict[str, bytes], objects: dict[str, bytes]) -> None:
    """One operation of a commit."""
    if not is_inside(value.get("path", "").rstrip("/")):
        raise RefusalError(400, message="Bad request: path")
    if key == "file":
        require(value.keys() == {"content", "path", "encoding"} and value["encoding"] == "base64", "file")
        content = base64.b64decode(value["content"], validate=True)
        require(len(content) <= MAX_REGULAR_BYTES, "a file larger than 10 MiB must be stored by LFS")
        require(not is_large(value["path"], len(content)), f"{value['path']} must be stored by LFS")
        files[value["path"]] = content
    elif key == "lfsFile":
        require(value.keys() == {"path", "algo", "oid", "size"} and value["algo"] == "sha256", "lfsFile")
        stored = objects.get(value["oid"])
        require(stored is not None and len(stored) == value["size"], f"{value['path']} did not arrive")
        assert stored is not None
        files[value["path"]] = stored
    elif key == "deletedFile":
        if files.pop(value["path"], None) is None:
            raise RefusalError(404, "EntryNotFound", "A file with this name doesn't exist")
    else:
        raise RefusalError(400, message=f"Bad request: unknown operation {key}")


def mistakes(card: str) -> list[str]:
    """What the Hub would not accept in a card's front matter, as far as this project writes it."""
    match = re.match(r"---\n(.*?)\n---(\n|$)", card, re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        return [f"invalid YAML: {error}"]
    if not isinstance(data, dict):
        return ["the front matter is no mapping"]
    found = []
    for key in ("license", "license_name", "license_link", "library_name", "pipeline_tag", "base_model_relation"):
        if not isinstance(data.get(key, ""), str):
            found.append(f"{key} must be a string")
    if data.get("base_model_relation", "quantized") not in RELATIONS:
        found.append("base_model_relation is none of the four")
    for key in ("base_model", "datasets"):
        names = data.get(key, [])
        if not all(
            isinstance(name, str) and HUB_ID.fullmatch(name) for name in [names] * isinstance(names, str) or names
        ):
            found.append(f"{key} must name repositories")
    if not all(isinstance(tag, str) and tag for tag in data.get("tags", [])):
        found.append("tags must be strings")
    for model in data.get("model-index", []):
        for result in model["results"]:
            whole = isinstance(model.get("name"), str) and isinstance(result["task"].get("type"), str)
            whole = whole and all(isinstance(result["dataset"].get(key), str) for key in ("type", "name"))
            whole = whole and bool(result["metrics"]) and all("type" in m and "value" in m for m in result["metrics"])
            found += [] if whole else ["model-index is not as specified"]
    return found


def signature_of(what: str) -> str:
    return hmac.new(SECRET, what.encode(), "sha256").hexdigest()[:32]
