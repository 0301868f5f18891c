"""What a power cut may leave: flushed before it gets its name, and what is unreadable counts as absent."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_compress.calibrate.scores import LayerScores, Scores
from moe_compress.checkpoint.hidden import load_hidden, save_hidden
from moe_compress.checkpoint.writer import PARTS_FILE, RENAMES_FILE, ShardWriter, write_json
from moe_compress.workspace import place


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every flush and every rename, in order, by the name of what it was done to."""
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def note_fsync(descriptor: int) -> None:
        events.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def note_rename(path: Path, target: Path) -> Path:
        events.append(("rename", path.name))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    return events


def save_scores(folder: Path) -> None:
    Scores([LayerScores(0, 2, 1, 3, 1.0, {"tokens": np.ones(2)})], {}).save(folder)


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: write_json(folder / "a.json", [1]),
        lambda folder: ShardWriter(folder, 100).write("rest", {"a": torch.ones(2)}),
        lambda folder: save_hidden(folder, 1, [torch.ones(2)]),
        save_scores,
    ],
    ids=["json", "shard", "hidden", "scores"],
)
def test_content_is_flushed_before_the_rename_and_the_name_after_it(
    write: Callable[[Path], None], flushed: list[tuple[str, str]], tmp_path: Path
) -> None:
    write(tmp_path)
    renames = [position for position, (what, _) in enumerate(flushed) if what == "rename"]
    assert renames
    for position in renames:
        assert flushed[position - 1] == ("fsync", flushed[position][1])
        assert flushed[position + 1] == ("fsync", tmp_path.name)


def test_result_is_flushed_before_it_appears(flushed: list[tuple[str, str]], tmp_path: Path) -> None:
    finished = tmp_path / "work" / "checkpoint"
    (finished / "templates").mkdir(parents=True)
    (finished / "README.md").write_text("text")
    (finished / "templates" / "tool.jinja").write_text("text")
    place(finished, tmp_path / "out")
    moment = flushed.index(("rename", "checkpoint"))
    assert {("fsync", name) for name in ("README.md", "tool.jinja", "templates")} <= set(flushed[:moment])
    assert (tmp_path / "out" / "templates" / "tool.jinja").read_text() == "text"


def test_result_with_a_folder_goes_to_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_compress.workspace.same_disk", lambda one, other: False)
    finished = tmp_path / "work" / "checkpoint"
    (finished / "templates").mkdir(parents=True)
    (finished / "templates" / "tool.jinja").write_text("text")
    place(finished, tmp_path / "out")
    assert (tmp_path / "out" / "templates" / "tool.jinja").read_text() == "text"


@pytest.mark.parametrize("damage", [b"", b"\0" * 64])
def test_unreadable_hidden_states_are_absent(damage: bytes, tmp_path: Path) -> None:
    save_hidden(tmp_path, 1, [torch.ones(2)])
    kept = (tmp_path / "hidden-00001.safetensors").read_bytes()
    save_hidden(tmp_path, 2, [torch.zeros(2)])
    (tmp_path / "hidden-00002.safetensors").write_bytes(damage)
    assert load_hidden(tmp_path) == (0, [])
    (tmp_path / "hidden-00001.safetensors").write_bytes(kept)
    done, (hidden,) = load_hidden(tmp_path)
    assert done == 1 and torch.equal(hidden, torch.ones(2))


@pytest.mark.parametrize("name", [PARTS_FILE, RENAMES_FILE])
@pytest.mark.parametrize("damage", [b"", b"\0" * 64, b"[1]"])
def test_unreadable_records_of_parts_are_absent(name: str, damage: bytes, tmp_path: Path) -> None:
    ShardWriter(tmp_path, 100).write("rest", {"a": torch.ones(2)})
    (tmp_path / name).write_bytes(damage)
    writer = ShardWriter(tmp_path, 100)
    writer.drop_damaged()
    assert writer.has("rest") == (name == RENAMES_FILE)
    writer.write("rest", {"a": torch.ones(2)})
    assert len(writer.finish(["rest"])) == 1
