"""What of a finished folder is published, and whether it may be: every file is the one that was verified.

`run` records the outcome of its five checks in `report.json`, and the hash of every file (that one too) in
`manifest.json`. Where all recorded checks passed and all hashes are the recorded ones, the folder is bit for bit what
passed, so nothing has to be loaded again. Only recorded files travel, and with them the manifest, the model card, which
its owner may edit (then this is said), and the report's page, made anew of the records; whatever else lies in the
folder stays where it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from moe_compress.checkpoint.durable import sha256_of
from moe_compress.errors import CheckpointError, PublishError, UsageError, VerificationError
from moe_compress.progress import Progress
from moe_compress.report.card import published
from moe_compress.report.markdown import CHECKS
from moe_compress.report.page import PAGE_FILE, render
from moe_compress.report.result import load_result, names_apart
from moe_compress.text import listed

MANIFEST_FILE = "manifest.json"
CARD_FILE = "README.md"
REPORT_FILE = "report.json"
MAX_LISTED = 8
GIT_ID = 40  # characters
LARGE = 1 << 27  # bytes; the Hub keeps no larger file in git


@dataclass(frozen=True)
class Bundle:
    """The files of a folder that may be published."""

    folder: Path
    recorded: dict[str, str]  # sha256 of the files that travel as they lie there, by name
    texts: dict[str, str]  # the card and the page, as they travel; absent where their owner removed them
    left_out: list[str]
    card_was_edited: bool

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file by its name in the repository."""
        here = {name: (self.folder / name).stat().st_size for name in self.recorded}
        return dict(sorted((here | {name: len(text.encode()) for name, text in self.texts.items()}).items()))

    @cached_property
    def hashes(self) -> dict[str, str]:
        """sha256 of every file."""
        return self.recorded | {name: hashlib.sha256(text.encode()).hexdigest() for name, text in self.texts.items()}

    def content(self, name: str) -> bytes | Path:
        """A file of the repository, or where it lies here."""
        return self.texts[name].encode() if name in self.texts else self.folder / name

    def is_known_by(self, name: str, identifier: str) -> bool:
        """Whether this is the file's sha256, or the id that git gives it."""
        if identifier == self.hashes[name]:
            return True
        if len(identifier) != GIT_ID or self.sizes[name] > LARGE:
            return False
        content = self.content(name)
        content = content if isinstance(content, bytes) else content.read_bytes()
        return (
            hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest() == identifier
        )

    def for_repository(self, repo_id: str, revision: str | None) -> Bundle:
        """The same with the repository's name (and a branch that is not `main`) in the card's snippets."""
        cards = {name: published(self.texts[name], repo_id, revision) for name in {CARD_FILE} & self.texts.keys()}
        return replace(self, texts=self.texts | cards)


def open_bundle(folder: Path, progress: Progress) -> Bundle:
    """The files of `folder`.

    Raises `UsageError` for a folder that no run made, `VerificationError` when a recorded check did not pass or a
    file is not the recorded one.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder.")
    if not (folder / MANIFEST_FILE).is_file():
        raise UsageError(f"{folder} has no {MANIFEST_FILE}: `push` publishes folders that `moe-compress run` made.")
    recorded, written = _recorded_hashes(folder)
    _require_same_files(folder, recorded, progress)
    _require_passed(folder, json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))["checks"])
    recorded[MANIFEST_FILE] = sha256_of(folder / MANIFEST_FILE)
    made = {CARD_FILE: _card, PAGE_FILE: _page}
    texts = {name: make(folder) for name, make in made.items() if (folder / name).is_file()}
    here = {entry.relative_to(folder).as_posix() for entry in folder.rglob("*") if entry.is_file()}
    bundle = Bundle(folder, recorded, texts, sorted(here - recorded.keys() - texts.keys()), False)
    edited = written is not None and CARD_FILE in texts and bundle.hashes[CARD_FILE] != written
    return replace(bundle, card_was_edited=edited)


def _recorded_hashes(folder: Path) -> tuple[dict[str, str], str | None]:
    """sha256 by file name as the manifest records it, and that of the card as the run wrote it."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        return {str(name): str(digest) for name, digest in manifest["files"].items()}, manifest.get("card")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{folder / MANIFEST_FILE} is damaged; run again.") from None


def _require_same_files(folder: Path, hashes: Mapping[str, str], progress: Progress) -> None:
    """Every recorded file is there, inside the folder, with the recorded hash."""
    if REPORT_FILE not in hashes:
        raise VerificationError(
            f"{folder} was not pushed: its manifest records no {REPORT_FILE}, so it was not verified."
        )
    root = folder.resolve()
    wrong = []
    with progress.stage("check", len(hashes), "file") as stage:
        for name, recorded in hashes.items():
            file = (root / name).resolve()
            if not file.is_relative_to(root) or not file.is_file():
                wrong.append(f"{name} is missing")
            elif sha256_of(file) != recorded:
                wrong.append(f"{name} is not as it was verified (its sha256 differs from the recorded one)")
            stage.advance(name)
    if wrong:
        raise VerificationError(f"{folder} was not pushed: {listed(wrong, MAX_LISTED)}; run again.")


def _require_passed(folder: Path, checks: Mapping[str, Any]) -> None:
    """All five checks were run and passed."""
    failed = [f"{name} (was not checked)" for name in CHECKS if name not in checks]
    failed += [f"{name} ({check['detail'].rstrip('.')})" for name, check in checks.items() if not check["passed"]]
    if failed:
        raise VerificationError(f"{folder} was not pushed, its verification failed: {'; '.join(failed)}.", checks)


def _card(folder: Path) -> str:
    try:
        return (folder / CARD_FILE).read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise PublishError(f"{folder / CARD_FILE} is not UTF-8 text; save it as such.") from None


def _page(folder: Path) -> str:
    """The page of the records that were just found unchanged, whatever the file there says."""
    return render([load_result(folder)], names_apart([folder]))
