"""What a run was made from and with: source, versions, hardware. It decides whether a run can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moe_compress import __version__
from moe_compress.checkpoint.durable import sha256_of
from moe_compress.checkpoint.rewrite import Ledger
from moe_compress.checkpoint.source import Checkpoint
from moe_compress.recipe import Recipe

FORMAT = 1  # of manifest.json
NOT_HASHED = ("manifest.json", "README.md", "report.html")
LIBRARIES = ("torch", "transformers", "safetensors", "numpy", "datasets", "lm_eval", "accelerate")


def describe_source(source: Checkpoint) -> dict[str, Any]:
    """Where the source came from, and a fingerprint that changes when one of its files does."""
    digest = hashlib.sha256((source.folder / "config.json").read_bytes())
    for file in source.index.files:
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {'' if source.revision else status.st_mtime_ns}".encode())
    for name, info in sorted(source.index.items()):
        digest.update(f"{name} {info.dtype} {info.shape} {info.start}".encode())
    return {
        "model": source.model_id,
        "revision": source.revision,
        "fingerprint": digest.hexdigest(),
        "tensors": len(source.index),
        "bytes": source.index.nbytes,
    }


def identity_of(recipe: Recipe, source: Checkpoint) -> dict[str, Any]:
    """What a run is made of."""
    return {"version": __version__, "source": describe_source(source), "recipe": recipe.model_dump(mode="json")}


def identity_digest(identity: Mapping[str, Any]) -> str:
    """A hash of what decides a run's result: it recognizes the result without naming where the source lies."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def file_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file of a finished folder by its name there, without the manifest that holds them.

    The model card is left out too, since it is its owner's to edit (the manifest says by itself what it was), and so is
    the page, which is made of the other files and can be made again.
    """
    names = [entry.relative_to(folder).as_posix() for entry in folder.rglob("*") if entry.is_file()]
    known = {shard.file: shard.sha256 for shard in Ledger.load(folder).shards}
    return {name: known.get(name) or sha256_of(folder / name) for name in sorted(names) if name not in NOT_HASHED}


def library_versions() -> dict[str, str]:
    """Versions of Python and the libraries that compute or read."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def made_by(device: str) -> dict[str, Any]:
    """What else decides the bits of a result: it is not continued on another device or with other libraries."""
    versions = library_versions()
    return {"device": device, "versions": {name: versions[name] for name in ("torch", "transformers")}}


def hardware(device: str) -> dict[str, Any]:
    """Processor, cores, memory and accelerator."""
    import psutil
    import torch

    found: dict[str, Any] = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": device,
    }
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name()
    return found
