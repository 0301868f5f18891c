"""What the loopback Hub of the tests holds: users, repositories, large files, and the log of what was asked.

The rules of who sees and who writes are the Hub's: without a token a private repository looks like one that is missing,
and so it does to users who do not belong to its owner.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LFS_THRESHOLD = 10_000  # bytes; the Hub takes 10 MB
LFS_SUFFIXES = (".safetensors", ".bin", ".npz", ".npy", ".gguf", ".h5")  # of the .gitattributes of a new repository
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


@dataclass(frozen=True)
class User:
    """Who a token stands for."""

    name: str
    organizations: tuple[str, ...] = ()
    writes: bool = True

    def owns(self, repository: str) -> bool:
        return repository.partition("/")[0] in (self.name, *self.organizations)


@dataclass
class Repository:
    """Branches and tags name commits; a commit is a set of files. `objects` are large files that arrived whole."""

    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Add a commit holding `files` and let `ref` name it; its sha follows from the content and what was before."""
        digest = hashlib.sha1(str(len(self.commits)).encode(), usedforsecurity=False)
        for name, content in sorted(files.items()):
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        sha = digest.hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        return sha

    def head(self, ref: str = "main") -> dict[str, bytes]:
        """The files at the head of a branch."""
        return self.commits[self.refs[ref]]


@dataclass(frozen=True)
class Request:
    """One answered request; `received` counts the bytes of its body."""

    method: str
    path: str
    range: str | None
    status: int
    received: int = 0


class Hub:
    """The state of the server, the faults it shall show, and the log.

    With a `root` all of it but the faults is kept in that folder, so that a server that died can be started again.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.users = {
            "hf_valid": User("me", ("org",)),
            "hf_reader": User("me", ("org",), writes=False),
            "hf_stranger": User("stranger"),
        }
        self.repositories: dict[str, Repository] = {}
        self.log: list[Request] = []
        self.url = ""
        self.part_bytes = 1 << 20  # larger files are uploaded in parts of this size
        self.cuts: dict[str, int] = {}  # file name -> how many more of its downloads break off half way
        self.failing: set[str] = set()  # file names whose content is answered with 500
        self.upload_cuts = 0  # how many more uploads break off half way
        self.failing_commits = 0  # how many more commits are answered with 500
        self.ignored: set[str] = set()  # file names that a .gitignore keeps out
        self.is_a_mirror = False  # whether it names no reasons for refusals and has ids that are not git's
        self.echoes_tokens = False  # whether refusals repeat the token, as a careless server may
        self.die_after: int | None = None  # bytes of large files after which the process ends
        self._root = root
        if root is not None and (root / "repositories").exists():
            self.repositories = pickle.loads((root / "repositories").read_bytes())
            self.log = [Request(**json.loads(line)) for line in (root / "log").read_text().splitlines()]

    @property
    def token(self) -> str:
        """A valid token that may write."""
        return "hf_valid"

    def repository(self, name: str, *, private: bool = False, gated: bool = False) -> Repository:
        return self.repositories.setdefault(name, Repository(private=private, gated=gated))

    def gets(self, name: str) -> list[Request]:
        """The GET requests for one file's content."""
        return [
            entry
            for entry in self.log
            if entry.method == "GET" and entry.path.endswith("/" + name) and entry.status != 302
        ]

    def uploads(self) -> list[str]:
        """What arrived of large files, in order: the sha256 of whole ones, with `#n` for part n of others."""
        return [
            "#".join(entry.path.split("/")[5:]) for entry in self.log if entry.method == "PUT" and entry.status == 200
        ]

    def writes(self) -> list[str]:
        """Every request that changes something, as `METHOD path`."""
        reads = ("/preupload/", "/validate-yaml", "/paths-info/")
        return [
            f"{entry.method} {entry.path}"
            for entry in self.log
            if entry.method not in ("GET", "HEAD") and not any(part in entry.path for part in reads)
        ]

    def record(self, request: Request) -> None:
        """Log a request, and keep what it changed."""
        self.log.append(request)
        if self._root is None:
            return
        with (self._root / "log").open("a") as file:
            file.write(json.dumps(asdict(request)) + "\n")
        if request.method not in ("GET", "HEAD"):
            temporary = self._root / "repositories.part"
            temporary.write_bytes(pickle.dumps(self.repositories))
            temporary.replace(self._root / "repositories")


def is_large(name: str, size: int) -> bool:
    """Whether a file is stored by LFS."""
    return size > 0 and (name.endswith(LFS_SUFFIXES) or size >= LFS_THRESHOLD)


def tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]] | None:
    """The entries of a folder ("" is the root): its files, and without `recursive` its direct folders."""
    prefix = f"{folder}/" if folder else ""
    inside = {name: content for name, content in sorted(files.items()) if name.startswith(prefix)}
    if folder and not inside:
        return None
    here = {name: content for name, content in inside.items() if recursive or "/" not in name[len(prefix) :]}
    folders = sorted({prefix + name[len(prefix) :].split("/")[0] for name in inside.keys() - here.keys()})
    folders = [path for path in folders if path not in here]
    if recursive:
        folders = sorted({name.rpartition("/")[0] for name in inside if "/" in name[len(prefix) :]})
    trees = [{"type": "directory", "path": path, "size": 0, "oid": blob_id(path.encode())} for path in folders]
    return trees + [tree_entry(*item) for item in here.items()]


def tree_entry(name: str, content: bytes) -> dict[str, Any]:
    """A file as the tree lists it: the git blob id, and the sha256 where it is stored by LFS."""
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content)}
    if not is_large(name, len(content)):
        return entry | {"oid": blob_id(content)}
    sha256 = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
    return entry | {
        "oid": blob_id(pointer),
        "lfs": {"oid": sha256, "size": len(content), "pointerSize": len(pointer)},
    }


def known_by(name: str, content: bytes) -> str:
    """What the Hub knows a file by: the sha256 of a large one, the git blob id of a small one."""
    return hashlib.sha256(content).hexdigest() if is_large(name, len(content)) else blob_id(content)


def blob_id(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()
