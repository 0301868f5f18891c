"""What of a finished folder is published, and whether it may be: every file is the one that was verified.

`run` records the outcome of its five checks in `report.json`, and the hash of every file (that one too) in
`manifest.json`. Where all recorded checks passed and all hashes are the recorded ones, the folder is bit for bit what
passed, so nothing has to be loaded again. Only recorded files travel, and with them the manifest, the model card, which
its owner may edit, and the report's page, which can be made anew; whatever else lies in the folder stays where it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_compress.checkpoint.durable import sha256_of
from moe_compress.errors import CheckpointError, PublishError, UsageError, VerificationError
from moe_compress.progress import Progress
from moe_compress.report.card import published
from moe_compress.report.markdown import CHECKS
from moe_compress.text import listed

MANIFEST_FILE = "manifest.json"
CARD_FILE = "README.md"
REPORT_FILE = "report.json"
PAGE_FILE = "report.html"
MAX_LISTED = 8


@dataclass(frozen=True)
class Bundle:
    """The files of a folder that may be published."""

    folder: Path
    sizes: dict[str, int]  # bytes of every file by its name in the repository
    hashes: dict[str, str]  # sha256 of those that the manifest records
    card: str | None  # None where its owner removed it
    left_out: list[str]

    def for_repository(self, repo_id: str, revision: str | None) -> Bundle:
        """The same with the repository's name (and a branch that is not `main`) in the card's snippets."""
        if self.card is None:
            return self
        card = published(self.card, repo_id, revision)
        return replace(self, card=card, sizes=self.sizes | {CARD_FILE: len(card.encode())})


def open_bundle(folder: Path, progress: Progress) -> Bundle:
    """The files of `folder`.

    Raises `UsageError` for a folder that no run made, `VerificationError` when a recorded check did not pass or a
    file is not the recorded one.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder.")
    if not (folder / MANIFEST_FILE).is_file():
        raise UsageError(f"{folder} has no {MANIFEST_FILE}: `push` publishes folders that `moe-compress run` made.")
    hashes = _recorded_hashes(folder)
    _require_same_files(folder, hashes, progress)
    _require_passed(folder, json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))["checks"])
    page = [PAGE_FILE] if (folder / PAGE_FILE).is_file() else []
    sizes = {name: (folder / name).stat().st_size for name in [*hashes, MANIFEST_FILE, *page]}
    card = _card(folder)
    if card is not None:
        sizes[CARD_FILE] = len(card.encode())
    here = {entry.relative_to(folder).as_posix() for entry in folder.rglob("*") if entry.is_file()}
    return Bundle(folder, dict(sorted(sizes.items())), hashes, card, sorted(here - sizes.keys()))


def _recorded_hashes(folder: Path) -> dict[str, str]:
    """sha256 by file name, as the manifest records it."""
    try:
        files = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
        return {str(name): str(digest) for name, digest in files.items()}
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


def _card(folder: Path) -> str | None:
    if not (folder / CARD_FILE).is_file():
        return None
    try:
        return (folder / CARD_FILE).read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise PublishError(f"{folder / CARD_FILE} is not UTF-8 text; save it as such.") from None
