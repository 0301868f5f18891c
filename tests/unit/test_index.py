"""Headers of safetensors files: what is read from good ones, and that every damaged or hostile one is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from moe_compress.checkpoint.index import TensorIndex, read_header
from moe_compress.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def entry(start: Any, end: Any, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def raw(file: Path, header: Any, data: int = 16) -> Path:
    """A file with this header (JSON-able, or bytes as they are) and `data` bytes behind it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return file


def refusal(file: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    message = str(caught.value)
    assert file.name in message and "\n" not in message and message.endswith("download it again.")
    return message


def folder_refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        TensorIndex.from_folder(folder)
    return str(caught.value)


def shards(folder: Path, content: dict[str, list[str]], promised: dict[str, str] | None = None) -> Path:
    """Shards that each hold float32 [2, 3] tensors of these names, and the index that says so."""
    for shard, names in content.items():
        save_file({name: np.full((2, 3), position, np.float32) for position, name in enumerate(names)}, folder / shard)
    weight_map = {name: shard for shard, names in content.items() for name in names} if promised is None else promised
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_names_types_shapes_and_places(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "scalar": np.array(7, np.int64),
        "empty": np.zeros((0, 5), np.float16),
        "b": np.arange(3, dtype=np.uint8),
    }
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    index = TensorIndex.from_folder(tmp_path)
    assert set(index) == set(arrays) and index.nbytes == sum(array.nbytes for array in arrays.values())
    content = (tmp_path / "model.safetensors").read_bytes()
    for name, array in arrays.items():
        info = index[name]
        assert info.shape == array.shape and info.numel == array.size and info.nbytes == array.nbytes
        assert content[info.start : info.end] == array.tobytes()
    assert [index[name].dtype for name in arrays] == ["F32", "I64", "F16", "U8"]


def test_types_of_less_than_a_byte(tmp_path: Path) -> None:
    file = raw(tmp_path / "x.safetensors", {"a": entry(0, 3, (6,), "F4"), "b": entry(3, 6, (4,), "F6_E2M3")}, 6)
    assert [info.nbytes for info in read_header(file)] == [3, 3]
    assert "damaged" in refusal(raw(file, {"a": entry(0, 3, (5,), "F4")}, 3))


def test_the_index_decides_which_files_count(tmp_path: Path) -> None:
    shards(tmp_path, {"one.safetensors": ["a"], "two.safetensors": ["b", "c"]})
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "copy.safetensors")
    index = TensorIndex.from_folder(tmp_path)
    assert sorted(index) == ["a", "b", "c"]
    assert [file.name for file in index.files] == ["one.safetensors", "two.safetensors"]


def test_without_an_index_only_the_model_counts(tmp_path: Path) -> None:
    save_file({"adapter": np.zeros(1, np.float32)}, tmp_path / "adapter_model.safetensors")
    assert folder_refusal(tmp_path) == f"{tmp_path} holds no safetensors weights."
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "consolidated.safetensors")
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    index = TensorIndex.from_folder(tmp_path)
    assert list(index) == ["a"] and index["a"].file.name == "model.safetensors"


HOSTILE: dict[str, Any] = {
    "no header": b"",
    "not JSON": b"{'a'",
    "not text": b"\xff\xfe{}",
    "a list": [],
    "a number": 5,
    "nested without end": b"[" * 100_000,
    "an entry that is no mapping": {"a": [1, 2]},
    "no dtype": {"a": {"shape": [4], "data_offsets": [0, 16]}},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 16]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [4]}},
    "an unknown dtype": {"a": entry(0, 16, dtype="F33")},
    "a dtype that is no name": {"a": entry(0, 16, dtype=["F32"])},
    "a dtype of another size": {"a": entry(0, 16, dtype="F64")},
    "a shape of another size": {"a": entry(0, 16, (5,))},
    "a negative dimension": {"a": entry(0, 16, (-2, -2))},
    "a dimension that is no whole number": {"a": entry(0, 16, (4.0,))},
    "a shape that is text": {"a": entry(0, 16, "4")},
    "a negative offset": {"a": entry(-16, 0)},
    "offsets the wrong way round": {"a": entry(16, 0, (-4,))},
    "an offset that is no whole number": {"a": entry(0.0, 16.0)},
    "one offset": {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0]}},
    "three offsets": {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16, 16]}},
    "two tensors in the same place": {"a": entry(0, 16), "b": entry(0, 16)},
    "two tensors that overlap": {"a": entry(0, 8, (2,)), "b": entry(4, 16, (3,))},
    "a hole between tensors": {"a": entry(0, 4, (1,)), "b": entry(8, 16, (2,))},
    "a hole before the first": {"a": entry(4, 16, (3,))},
    "bytes that belong to nothing": {"a": entry(0, 12, (3,))},
    "the same name twice": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_header_is_refused(kind: str, tmp_path: Path) -> None:
    assert "is damaged" in refusal(raw(tmp_path / "x.safetensors", HOSTILE[kind]))


def test_header_that_is_cut_short(tmp_path: Path) -> None:
    file = raw(tmp_path / "x.safetensors", {"a": entry(0, 16)})
    whole = file.read_bytes()
    assert len(read_header(file)) == 1
    header_end = len(whole) - 16
    for size in (0, 3, 7, 8, 9, header_end - 1):
        file.write_bytes(whole[:size])
        assert "is damaged" in refusal(file)
    for size in (header_end, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert f"is cut short ({size:,} of {len(whole):,} bytes)" in refusal(file)


def test_header_length_beyond_the_file_reads_nothing(tmp_path: Path) -> None:
    for length in (1000, 2**40, 2**64 - 1):
        file = tmp_path / "x.safetensors"
        file.write_bytes(struct.pack("<Q", length) + b"{}" + bytes(16))
        assert "is damaged" in refusal(file)


def test_offset_beyond_the_file(tmp_path: Path) -> None:
    assert "cut short" in refusal(raw(tmp_path / "x.safetensors", {"a": entry(0, 2**43, (2**41,))}))


def test_missing_and_doubled_tensors(tmp_path: Path) -> None:
    shards(tmp_path, {"one.safetensors": ["a"], "two.safetensors": ["b"]})
    (tmp_path / "two.safetensors").rename(tmp_path / "away")
    message = folder_refusal(tmp_path)
    assert "two.safetensors is missing" in message and message.endswith("download it again.")

    shards(tmp_path, {"one.safetensors": ["c", "a"], "two.safetensors": ["b", "a"]})
    assert folder_refusal(tmp_path) == "two.safetensors and one.safetensors both hold `a`."

    promised = {"a": "one.safetensors", "b": "two.safetensors", "d": "two.safetensors", "c": "one.safetensors"}
    shards(tmp_path, {"one.safetensors": ["a"], "two.safetensors": ["b"]}, promised)
    assert folder_refusal(tmp_path) == f"No shard in {tmp_path} holds `c` (2 tensors are missing)."


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ["x"]}}']
)
def test_damaged_index(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    assert folder_refusal(tmp_path) == f"{tmp_path / INDEX} is damaged; download it again."


def test_folder_without_weights(tmp_path: Path) -> None:
    assert folder_refusal(tmp_path) == f"{tmp_path} holds no safetensors weights."
    (tmp_path / INDEX).write_text('{"weight_map": {}}')
    assert folder_refusal(tmp_path) == f"{tmp_path} holds no safetensors weights."
