"""Writing shards: what lies on disk at every moment, and that an interrupted or damaged folder is put right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_compress.checkpoint import writer
from moe_compress.checkpoint.durable import sha256_of
from moe_compress.checkpoint.index import TensorIndex
from moe_compress.checkpoint.writer import Shard, ShardWriter, forget_parts, tensor_sha256, write_json

ORDER = ["rest", "layer-0", "layer-1"]
INDEX = "model.safetensors.index.json"


def part(seed: int, *names: str, size: int = 10) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=generator) for name in names}


PARTS = {"rest": part(0, "head", "embed"), "layer-0": part(1, "0.a", "0.b", "0.c"), "layer-1": part(2, "1.a", "1.b")}


def write_all(folder: Path, max_bytes: int = 100) -> ShardWriter:
    made = ShardWriter(folder, max_bytes)
    for name, tensors in PARTS.items():
        made.write(name, tensors)
    return made


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def finished(tmp_path: Path) -> dict[str, bytes]:
    """The files of a folder that was never interrupted."""
    write_all(tmp_path / "uninterrupted").finish(ORDER)
    forget_parts(tmp_path / "uninterrupted")
    return content(tmp_path / "uninterrupted")


def test_every_type_and_shape_arrives_as_it_was(tmp_path: Path) -> None:
    tensors = {
        str(dtype): (torch.arange(-6, 6).reshape(3, 4) if dtype.is_signed else torch.arange(12).reshape(3, 4)).to(dtype)
        for dtype in writer.SAFETENSORS_DTYPES
    }
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 7), "view": torch.arange(12.0).reshape(3, 4).T}
    made = ShardWriter(tmp_path, 10**6)
    made.write("rest", tensors)
    (shard,) = made.finish(["rest"])
    found = load_file(tmp_path / shard.file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    header = (tmp_path / shard.file).read_bytes()[8:]
    assert json.loads(header[: header.index(b"}}") + 2])["__metadata__"] == {"format": "pt"}


def test_stored_tensors_are_copied_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "CHUNK_BYTES", 7)  # so that every tensor takes several chunks
    source = {
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "f8": torch.randn(5, 3).to(torch.float8_e4m3fn),
        "u16": torch.arange(9).to(torch.uint16),
        "empty": torch.zeros(2, 0),
    }
    save_file(source, tmp_path / "model.safetensors")
    index = TensorIndex.from_folder(tmp_path)
    made = ShardWriter(tmp_path / "new", 10**6)
    made.write("rest", {name: index[name] for name in source})
    made.finish(["rest"])
    copied = TensorIndex.from_folder(tmp_path / "new")
    assert list(copied) == sorted(source)
    for name in source:
        old, new = index[name], copied[name]
        assert (new.dtype, new.shape) == (old.dtype, old.shape)
        data = [info.file.read_bytes()[info.start : info.end] for info in (old, new)]
        assert data[0] == data[1]
        assert tensor_sha256(new) == hashlib.sha256(data[0]).hexdigest()


def test_parts_are_split_at_the_largest_size(tmp_path: Path) -> None:
    sizes = {"a": 10, "b": 10, "c": 5, "d": 60, "e": 25, "f": 25, "g": 1}
    made = ShardWriter(tmp_path, 200)
    made.write("rest", {name: torch.zeros(size) for name, size in sizes.items()})
    made.finish(["rest"])
    held: dict[str, list[str]] = {}
    for name, file in json.loads((tmp_path / INDEX).read_text())["weight_map"].items():
        held.setdefault(file, []).append(name)
    # d alone is larger than a shard may be; e and f fill one to the last byte
    assert [held[file] for file in sorted(held)] == [["a", "b", "c"], ["d"], ["e", "f"], ["g"]]
    assert sorted(held) == [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]


def test_finished_folder_is_what_the_shards_say(tmp_path: Path) -> None:
    shards = write_all(tmp_path).finish(ORDER)
    forget_parts(tmp_path)
    assert sorted(content(tmp_path)) == sorted([*(shard.file for shard in shards), INDEX])
    for shard in shards:
        data = (tmp_path / shard.file).read_bytes()
        assert shard == Shard(shard.file, hashlib.sha256(data).hexdigest(), len(data))
        assert sha256_of(tmp_path / shard.file) == shard.sha256
    stored: dict[str, Tensor] = {}
    for shard in shards:
        stored |= load_file(tmp_path / shard.file)
    expected = {name: tensor for tensors in PARTS.values() for name, tensor in tensors.items()}
    assert stored.keys() == expected.keys() and all(torch.equal(stored[name], expected[name]) for name in expected)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert "embed" in load_file(tmp_path / "model-00001-of-00004.safetensors"), "parts come in the order asked for"


def test_shard_has_a_temporary_name_until_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ShardWriter(tmp_path, 10**6)
    made.write("rest", PARTS["rest"])
    before = content(tmp_path)
    seen: list[list[str]] = []

    def broken(entry: Any) -> Iterator[np.ndarray]:
        yield np.zeros(entry.nbytes, np.uint8)
        seen.append(sorted(file.name for file in tmp_path.iterdir()))
        raise OSError("pulled out")

    monkeypatch.setattr(writer.Entry, "chunks", broken)
    with pytest.raises(OSError, match="pulled out"):
        made.write("layer-0", PARTS["layer-0"])
    assert seen == [["layer-0-0.part", "parts.json", "rest-0.safetensors"]]
    assert {name: data for name, data in content(tmp_path).items() if name != "layer-0-0.part"} == before
    assert not made.has("layer-0") and not ShardWriter(tmp_path, 10**6).has("layer-0")


def test_a_part_that_was_not_entered_is_written_again(tmp_path: Path, finished: dict[str, bytes]) -> None:
    folder = tmp_path / "new"
    write_all(folder)
    entered = json.loads((folder / "parts.json").read_text())
    del entered["layer-1"]  # killed between the shard's rename and the entry
    write_json(folder / "parts.json", entered)
    made = ShardWriter(folder, 100)
    made.drop_damaged()
    assert [made.has(name) for name in ORDER] == [True, True, False]
    made.write("layer-1", PARTS["layer-1"])
    made.finish(ORDER)
    forget_parts(folder)
    assert content(folder) == finished


def test_interrupted_finish_is_undone(
    tmp_path: Path, finished: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before every single rename of `finish`, or right after it, and continued by another writer."""
    stops = 0
    for stop in range(100):
        folder = tmp_path / str(stop)
        made = write_all(folder)
        left = [stop]

        def counted(original: Any, left: list[int] = left) -> Any:
            def call(*args: Any) -> Any:
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
                return original(*args)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", counted(Path.rename))
            try:
                made.finish(ORDER)
                ended = True
            except KeyboardInterrupt:
                ended = False
                stops += 1
        again = ShardWriter(folder, 100)
        again.drop_damaged()
        assert all(again.has(name) for name in ORDER), f"stopped at {stop}: nothing is written twice"
        again.finish(ORDER)
        forget_parts(folder)
        assert content(folder) == finished, f"stopped at {stop}"
        if ended:
            break
    assert stops == 6, "the renames of 4 shards, of renames.json and of the index"


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "remove"])
def test_damaged_part_is_dropped(damage: str, tmp_path: Path) -> None:
    write_all(tmp_path)
    victim = tmp_path / "layer-0-1.safetensors"  # the second of its part's shards
    data = victim.read_bytes()
    changed = {"flip": data[:-1] + bytes([data[-1] ^ 1]), "cut": data[:-1], "grow": data + b"\0"}
    victim.write_bytes(changed[damage]) if damage in changed else victim.unlink()
    made = ShardWriter(tmp_path, 100)
    made.drop_damaged()
    assert [made.has(name) for name in ORDER] == [True, False, True]


def test_stored_tensor_as_a_source(tmp_path: Path) -> None:
    """A tensor in memory and the same one on disk make the same shard."""
    made = ShardWriter(tmp_path / "memory", 10**6)
    made.write("rest", PARTS["rest"])
    made.finish(["rest"])
    infos = dict(TensorIndex.from_folder(tmp_path / "memory"))
    made = ShardWriter(tmp_path / "disk", 10**6)
    made.write("rest", infos)
    made.finish(["rest"])
    assert content(tmp_path / "memory") == content(tmp_path / "disk")


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
