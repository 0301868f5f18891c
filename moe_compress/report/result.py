"""What a page is made of: the records in a finished folder, read once and checked for shape."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_compress.calibrate.agreement import AUDIT_FILE
from moe_compress.errors import CheckpointError, UsageError
from moe_compress.report.build import FORMAT
from moe_compress.report.experts import EXPERTS_FILE
from moe_compress.report.paths import without_local_paths

# What `build_report` always writes, by type.
PARTS_OF_A_REPORT = {
    dict: ("baseline", "compressed", "ratio", "recovery", "recovery_metric", "recovery_by_metric", "random_summary",
           "checks", "settings", "provenance"),
    list: ("random",),
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """The records of one finished folder; all but `report` are empty where there is no such file."""

    report: dict[str, Any]
    plans: list[dict[str, Any]] = field(default_factory=list)
    experts: list[Any] = field(default_factory=list)  # what `experts.json` holds of each step
    manifest: dict[str, Any] = field(default_factory=dict)
    recipe: str = ""
    audit: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """The model that was compressed."""
        return str(self.report["settings"].get("model", "the model"))


def load_result(folder: Path) -> Result:
    """The records in `folder`.

    Raises `UsageError` when it holds no report, `CheckpointError` when one of its records is damaged.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder.")
    if not (folder / "report.json").is_file():
        raise UsageError(f"{folder} holds no report.json: `report` reads what `run` or `eval --output` made.")
    report = _json(folder / "report.json")
    whole = isinstance(report, dict) and report.get("format") == FORMAT
    if not whole or not all(
        isinstance(report.get(n), kind) for kind, names in PARTS_OF_A_REPORT.items() for n in names
    ):
        raise CheckpointError(_damaged(folder / "report.json"))
    recipe = folder / "recipe.yaml"
    return Result(
        without_local_paths(report),
        _steps(folder / "plan.json"),
        _steps(folder / EXPERTS_FILE),
        without_local_paths(_object(folder / "manifest.json")),
        recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else "",
        without_local_paths(_object(folder / AUDIT_FILE)),
    )


def names_apart(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: its own, and its parent's before it where two are called the same."""
    names = [folder.absolute().name for folder in folders]
    return [
        name if names.count(name) == 1 else f"{folder.absolute().parent.name}/{name}"
        for name, folder in zip(names, folders, strict=True)
    ]


def _steps(file: Path) -> list[Any]:
    found = _object(file).get("steps", [])
    if not isinstance(found, list):
        raise CheckpointError(_damaged(file))
    return found


def _object(file: Path) -> dict[str, Any]:
    """The object in a JSON file, empty when there is no file."""
    content = _json(file) if file.is_file() else {}
    if not isinstance(content, dict):
        raise CheckpointError(_damaged(file))
    return content


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise CheckpointError(_damaged(file)) from None


def _damaged(file: Path) -> str:
    return f"{file} is damaged, or was written by another version or program; run again."


def flat(content: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every value that is no object, under its path of keys."""
    found: dict[tuple[str, ...], Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            found |= flat(value, (*path, str(key)))
        else:
            found[(*path, str(key))] = value
    return found
