"""Pushing a finished folder to the Hub: look, say, send, and show everything by one commit.

Large files travel first, one by one, and stay invisible; one commit then names all files and removes what an earlier
push left, so that nobody ever downloads half a checkpoint. A push that broke off is continued by the same command: the
Hub knows the files that arrived whole. This holds for folders of any size: a commit names a large file in a few dozen
bytes, and shards are a few hundred at most.

Not covered: pull requests, datasets, spaces.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from moe_compress import __version__
from moe_compress.checkpoint.durable import sha256_of
from moe_compress.errors import PublishError, UsageError
from moe_compress.progress import Progress, SilentProgress
from moe_compress.publish.bundle import CARD_FILE, MANIFEST_FILE, MAX_LISTED, Bundle, open_bundle
from moe_compress.publish.hub import AGAIN, MAIN, Hub, Remote, UnreachableError, require_name
from moe_compress.text import listed

TOOL = "moe-compress"
MIXED_UP = (".safetensors", ".bin", ".index.json")  # in the root of a repository


@dataclass(frozen=True)
class Push:
    """What a push will do; nothing was sent yet."""

    bundle: Bundle
    repo_id: str
    branch: str
    asked_private: bool
    remote: Remote | None  # None: there is no such repository yet, or the Hub was not asked
    removed: list[str]  # files of an earlier checkpoint
    asked: bool  # whether the Hub was asked
    unasked: str | None = None  # why it was not

    @property
    def note(self) -> str | None:
        """What else is to be known."""
        edited = (
            f"{CARD_FILE} was edited since the run wrote it: nothing checks its figures." * self.bundle.card_was_edited
        )
        return " ".join(filter(None, (self.unasked, edited))) or None

    @property
    def private(self) -> bool:
        """Whether the repository is, or will be, private."""
        return self.remote.private if self.remote else self.asked_private

    @property
    def bytes(self) -> int:
        return sum(self.bundle.sizes.values())

    def to_json(self) -> dict[str, Any]:
        """All of it for the caller: the repository, its branch and visibility, and bytes by file."""
        return {
            "repo_id": self.repo_id,
            "revision": self.branch,
            "private": self.private,
            "exists": self.remote is not None if self.asked else None,
            "files": dict(self.bundle.sizes),
            "bytes": self.bytes,
            "removed": list(self.removed),
            "left_out": list(self.bundle.left_out),
            "note": self.note,
        }


def prepare(
    out: Path,
    repo_id: str,
    hub: Hub,
    *,
    private: bool = False,
    revision: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Push:
    """Check everything that would keep the push from being made; only reads, here and on the Hub.

    `revision` is a branch, made when it is missing. Raises `VerificationError` when the folder is not the one that was
    verified, `UsageError` when the repository is not private though asked for, or holds a checkpoint that no push of
    this program made (unless `force` replaces it), `PublishError` when the Hub says no. A dry run does without a Hub
    that cannot be asked.
    """
    require_name(repo_id)
    branch = revision or MAIN
    bundle = open_bundle(out, progress or SilentProgress())
    named = None if branch == MAIN else branch
    planned = Push(bundle.for_repository(repo_id, named), repo_id, branch, private, None, [], asked=False)
    if dry_run and not hub.has_token:
        return replace(planned, unasked="there is no token here, so the Hub was not asked; log in before you push.")
    try:
        full = hub.full_name(repo_id)
        remote = hub.look(full, branch)
    except UnreachableError as error:
        if dry_run:
            return replace(planned, unasked=f"the Hub was not asked: {error}")
        raise
    bundle = bundle.for_repository(full, named)
    if remote is not None and private and not remote.private:
        raise UsageError(
            f"{full} exists and is public, so --private has no effect; make it private in its settings on the Hub, "
            "choose another name, or leave out --private."
        )
    removed = [] if remote is None else _removed(full, remote, bundle, hub, force)
    return Push(bundle, full, branch, private, remote, removed, asked=True)


def upload(planned: Push, hub: Hub, progress: Progress | None = None) -> dict[str, Any]:
    """Send what `prepare` found, make it visible, and read back what the Hub then holds.

    Returns `Push.to_json` with the `commit` and the `url`. Raises `PublishError` when the connection breaks for good
    or the Hub refuses; the repository then shows what it showed before, unless what arrived is not what was sent.
    """
    progress = progress or SilentProgress()
    bundle, repo_id, branch = planned.bundle, planned.repo_id, planned.branch
    if planned.remote is None:
        hub.create(repo_id, private=planned.asked_private)
    if branch != MAIN and (planned.remote is None or not planned.remote.has_branch):
        hub.create_branch(repo_id, branch)
    additions = {name: _addition(bundle, name) for name in bundle.sizes}
    weights = [name for name in additions if name.endswith(".safetensors")]
    with progress.stage("push", len(weights) + 1, "file") as stage:
        for name in weights:
            hub.send(repo_id, branch, additions[name])
            stage.advance(name)
        commit = hub.commit(
            repo_id,
            branch,
            [*(CommitOperationDelete(name) for name in planned.removed), *additions.values()],
            f"Upload with {TOOL} {__version__}",
            planned.remote.commit if planned.remote else None,
        )
        stage.advance("all others, in one commit")
    _require_arrived(bundle, repo_id, commit, hub)
    tree = "" if branch == MAIN else f"/tree/{branch}"
    return planned.to_json() | {"commit": commit, "url": f"{hub.url}/{repo_id}{tree}"}


def push(
    out: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`prepare`, and unless it is a dry run, `upload`."""
    hub = Hub(token)
    planned = prepare(
        out, repo_id, hub, private=private, revision=revision, force=force, dry_run=dry_run, progress=progress
    )
    return planned.to_json() if dry_run else upload(planned, hub, progress)


def _addition(bundle: Bundle, name: str) -> CommitOperationAdd:
    """A file to upload; a hash that was just computed is not computed again."""
    addition = CommitOperationAdd(name, bundle.content(name))
    addition.upload_info.sha256 = bytes.fromhex(bundle.hashes[name])
    return addition


def _removed(repo_id: str, remote: Remote, bundle: Bundle, hub: Hub, force: bool) -> list[str]:
    """The files in the repository that belong to another checkpoint and would be mixed up with this one."""
    others = [name for name in remote.files if name not in bundle.sizes]
    before = _files_of_ours(repo_id, remote, hub)
    stale = [name for name in others if name in before]
    foreign = [name for name in others if name not in before and _is_weight(name)]
    if foreign and not force:
        raise UsageError(
            f"{repo_id} holds weights of another origin ({listed(foreign, MAX_LISTED)}), with which these would be "
            "mixed up; choose another name, or remove them with --force (they stay in the repository's history)."
        )
    return sorted(stale + foreign)


def _files_of_ours(repo_id: str, remote: Remote, hub: Hub) -> set[str]:
    """What an earlier push put there, as its manifest says."""
    if MANIFEST_FILE not in remote.files or remote.commit is None:
        return set()
    try:
        manifest = json.loads(hub.fetch(repo_id, MANIFEST_FILE, remote.commit).read_bytes())
        return set(manifest["files"]) if str(manifest["tool"]).startswith(f"{TOOL} ") else set()
    except (ValueError, KeyError, TypeError):
        return set()


def _is_weight(name: str) -> bool:
    """Whether loaders may take this for a part of the checkpoint."""
    return "/" not in name and name.endswith(MIXED_UP)


def _require_arrived(bundle: Bundle, repo_id: str, commit: str, hub: Hub) -> None:
    """The commit holds every file as it was sent; a rule of the repository may have kept one out.

    A file of which the Hub names another id than the two known kinds is fetched, and its hash compared.
    """
    found = hub.contents(repo_id, commit)
    wrong = [
        name
        for name in bundle.sizes
        if not bundle.is_known_by(name, found.get(name, ""))
        and (name not in found or sha256_of(hub.fetch(repo_id, name, commit)) != bundle.hashes[name])
    ]
    if wrong:
        raise PublishError(
            f"{repo_id} does not hold {listed(wrong, MAX_LISTED)} as it was sent; if it has a .gitignore, remove that, "
            f"then {AGAIN}."
        )
