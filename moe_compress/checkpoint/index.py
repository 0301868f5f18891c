"""The tensors of a safetensors folder: names, types, shapes and where their bytes lie. Nothing is read but headers."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_compress.errors import CheckpointError

# Bits per element of every dtype the format knows.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor; its bytes are `file[start:end]`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class TensorIndex(Mapping[str, TensorInfo]):
    """All tensors of a checkpoint folder by name."""

    def __init__(self, tensors: dict[str, TensorInfo]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(info.nbytes for info in self._tensors.values())

    @property
    def files(self) -> list[Path]:
        return sorted({info.file for info in self._tensors.values()})

    @classmethod
    def from_folder(cls, folder: Path) -> TensorIndex:
        """Read the headers of the shards that `model.safetensors.index.json` names, or of `model.safetensors`.

        Raises `CheckpointError` for a missing, truncated or damaged shard, and for a tensor the index promises but
        no shard holds.
        """
        promised = weight_map(folder)
        files = [folder / name for name in shard_names(folder)]
        if not files or (not promised and not files[0].exists()):
            raise CheckpointError(f"{folder} holds no safetensors weights.")
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            for info in read_header(file):
                if info.name in tensors:
                    raise CheckpointError(f"{file.name} and {tensors[info.name].file.name} both hold `{info.name}`.")
                tensors[info.name] = info
        missing = sorted(set(promised) - set(tensors))
        if missing:
            raise CheckpointError(f"No shard in {folder} holds `{missing[0]}` ({len(missing)} tensors are missing).")
        return cls(tensors)


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name as the folder's index has it; empty without an index."""
    index_file = folder / INDEX_FILE
    if not index_file.exists():
        return {}
    try:
        promised: dict[str, str] = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(name, str) for name in promised.values()):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index_file} is damaged; download it again.") from None
    return promised


def shard_names(folder: Path) -> list[str]:
    """The weight files: those the index names, or `model.safetensors`; adapters and other copies are none."""
    if (folder / INDEX_FILE).exists():
        return sorted(set(weight_map(folder).values()))
    return [SINGLE_FILE]


def read_header(file: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file, checked against the file's size."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        infos = [_tensor(name, file, entry, 8 + length) for name, entry in header.items()]
        end = 8 + length
        # The format leaves no holes: tensors follow each other, which also rules out overlaps.
        for info in sorted(infos, key=lambda info: (info.start, info.end)):
            if info.start != end or info.nbytes * 8 != info.numel * DTYPE_BITS[info.dtype]:
                raise ValueError
            end = info.end
        if size > end:
            raise ValueError
    except FileNotFoundError:
        raise CheckpointError(f"The shard {file} is missing; download it again.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error):
        raise CheckpointError(f"The shard {file} is damaged; download it again.") from None
    if size < end:
        raise CheckpointError(f"The shard {file} is cut short ({size:,} of {end:,} bytes); download it again.")
    return infos


def _tensor(name: str, file: Path, entry: dict[str, Any], data: int) -> TensorInfo:
    """A header's entry; `data` is where the tensors' bytes begin in the file."""
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(number) is int and number >= 0 for number in (start, end, *shape)):
        raise ValueError
    return TensorInfo(name, file, entry["dtype"], shape, data + start, data + end)
