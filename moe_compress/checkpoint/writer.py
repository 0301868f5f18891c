"""Writing a checkpoint folder part by part, so that a killed run loses the part at hand and nothing else.

A part is what is written at once: a decoder layer, or everything no step touches. Each becomes one or more shards,
written under a temporary name, hashed on the way, renamed, and only then entered in `parts.json`. At the end the shards
get the Hub's names, in the order of the parts, and `model.safetensors.index.json` is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe_compress.checkpoint.durable import replace_durably, sha256_of, sync
from moe_compress.checkpoint.index import TensorInfo, read_header

SAFETENSORS_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
CHUNK_BYTES = 16 << 20
PARTS_FILE = "parts.json"
RENAMES_FILE = "renames.json"


@dataclass(frozen=True)
class Shard:
    """One finished file."""

    file: str
    sha256: str
    nbytes: int


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its description and where its bytes come from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    source: Tensor | TensorInfo

    @classmethod
    def of(cls, name: str, source: Tensor | TensorInfo) -> Entry:
        if isinstance(source, TensorInfo):
            return cls(name, source.dtype, source.shape, source.nbytes, source)
        return cls(name, SAFETENSORS_DTYPES[source.dtype], tuple(source.shape), source.nbytes, source)

    def chunks(self) -> Iterator[np.ndarray]:
        """The tensor's bytes, a few megabytes at a time when they come from a file."""
        if isinstance(self.source, Tensor):
            yield self.source.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            return
        for start in range(self.source.start, self.source.end, CHUNK_BYTES):
            count = min(CHUNK_BYTES, self.source.end - start)
            yield np.fromfile(self.source.file, dtype=np.uint8, count=count, offset=start)


class ShardWriter:
    """The weights of one checkpoint folder under construction."""

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        self.folder, self.max_shard_bytes = folder, max_shard_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self.parts: dict[str, list[Shard]] = {}
        self._undo_renames()
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError, AttributeError):  # unreadable is absent
            entered = json.loads((folder / PARTS_FILE).read_text(encoding="utf-8"))
            self.parts = {part: [Shard(**shard) for shard in shards] for part, shards in entered.items()}

    def has(self, part: str) -> bool:
        """Whether the part was finished, by this run or an earlier one."""
        return part in self.parts

    def drop_damaged(self) -> None:
        """Forget the parts whose files are not as they were written, say after a power cut."""
        for part, shards in list(self.parts.items()):
            if not all(_is_whole(self.folder / shard.file, shard) for shard in shards):
                del self.parts[part]

    def write(self, part: str, tensors: Mapping[str, Tensor | TensorInfo]) -> None:
        """Write one part: tensors in memory, or stored ones that are copied byte for byte, by name."""
        self.begin(part, tensors)()

    def begin(self, part: str, tensors: Mapping[str, Tensor | TensorInfo]) -> Callable[[], None]:
        """Write one part under temporary names; what is returned waits for the disk and then enters the part.

        It needs the tensors no more, and may run beside other work on the same folder.
        """
        entries = [Entry.of(name, tensor) for name, tensor in sorted(tensors.items())]
        shards = [
            _write_shard(self.folder / f"{part}-{number}.safetensors", group)
            for number, group in enumerate(_groups(entries, self.max_shard_bytes))
        ]

        def commit() -> None:
            for shard in shards:
                replace_durably(_temporary(self.folder / shard.file), self.folder / shard.file)
            self.parts[part] = shards
            entered = {name: [asdict(shard) for shard in found] for name, found in self.parts.items()}
            write_json(self.folder / PARTS_FILE, entered)

        return commit

    def finish(self, order: list[str]) -> list[Shard]:
        """Give the shards of all parts, in this order, their final names and write the index.

        Until `forget_parts` it can be taken back, which the next writer in this folder does.
        """
        shards = [shard for part in order for shard in self.parts[part]]
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        write_json(self.folder / RENAMES_FILE, {shard.file: name for shard, name in zip(shards, names, strict=True)})
        weight_map: dict[str, str] = {}
        total = 0
        for shard, name in zip(shards, names, strict=True):
            (self.folder / shard.file).rename(self.folder / name)
            for info in read_header(self.folder / name):
                weight_map[info.name] = name
                total += info.nbytes
        sync(self.folder)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.folder / "model.safetensors.index.json", index)
        return [Shard(name, shard.sha256, shard.nbytes) for shard, name in zip(shards, names, strict=True)]

    def _undo_renames(self) -> None:
        """Take back a `finish` that was cut short."""
        renames = self.folder / RENAMES_FILE
        if renames.exists():
            with contextlib.suppress(ValueError, AttributeError):  # nothing was renamed before it was whole
                for before, after in json.loads(renames.read_text(encoding="utf-8")).items():
                    if (self.folder / after).exists():
                        (self.folder / after).rename(self.folder / before)
            renames.unlink()


def forget_parts(folder: Path) -> None:
    """Remove what a writer needs to go on; what it finished stays as it is."""
    for name in (PARTS_FILE, RENAMES_FILE):
        (folder / name).unlink(missing_ok=True)


def tensor_sha256(info: TensorInfo) -> str:
    """Hash of one stored tensor's bytes."""
    digest = hashlib.sha256()
    for chunk in Entry.of(info.name, info).chunks():
        digest.update(chunk.data)
    return digest.hexdigest()


def _groups(entries: list[Entry], max_bytes: int) -> Iterator[list[Entry]]:
    group: list[Entry] = []
    size = 0
    for entry in entries:
        if group and size + entry.nbytes > max_bytes:
            yield group
            group, size = [], 0
        group.append(entry)
        size += entry.nbytes
    if group:
        yield group


def _temporary(file: Path) -> Path:
    return file.with_suffix(".part")


def _write_shard(file: Path, entries: list[Entry]) -> Shard:
    """Write the file under its temporary name."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    digest = hashlib.sha256()
    with _temporary(file).open("wb", buffering=0) as stream, ThreadPoolExecutor(1) as hasher:

        def put(data: memoryview) -> None:
            hashed = hasher.submit(digest.update, data)
            while data:
                data = data[stream.write(data) :]
            hashed.result()

        put(memoryview(struct.pack("<Q", len(text)) + text))
        for entry in entries:
            for chunk in entry.chunks():
                if chunk.nbytes:
                    put(chunk.data)
    return Shard(file.name, digest.hexdigest(), 8 + len(text) + offset)


def _is_whole(file: Path, shard: Shard) -> bool:
    return file.exists() and file.stat().st_size == shard.nbytes and sha256_of(file) == shard.sha256


def write_json(file: Path, content: object) -> None:
    """Write a JSON file whole or not at all."""
    temporary = file.with_name(file.name + ".part")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    replace_durably(temporary, file)
