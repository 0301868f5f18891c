"""What the student learns from: the original model in memory, or the largest of its logits on disk.

The cache is written by sweeps over the streamed layers, some sequences at a time, so the original may be far larger
than memory; each portion is a file, whole or not there, and an interrupted writing goes on with the next one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_compress.checkpoint.durable import replace_durably
from moe_compress.checkpoint.source import Checkpoint
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.checkpoint.writer import write_json
from moe_compress.compress.distill.config import DistillConfig
from moe_compress.compress.distill.losses import TopLogits
from moe_compress.errors import ResumeError
from moe_compress.models.lockstep import Lockstep
from moe_compress.progress import Progress

PORTION_BYTES = 1 << 28  # float32 hidden states that are in memory at once
CACHE_FILE = "cache.json"
BYTES_PER_LOGIT = 8  # int32 index, float32 log-probability


@dataclass(frozen=True)
class Lesson:
    """What the teacher says about some sequences: logits [T, V] or the largest, and what left each layer if wanted."""

    logits: Tensor | TopLogits | None
    hidden: tuple[Tensor, ...] = ()


class OnlineTeacher:
    """The original model itself."""

    def __init__(self, model: Any, *, logits: bool, hidden: bool) -> None:
        self.model, self.logits, self.hidden = model, logits, hidden

    def __call__(self, sequences: Sequence[int], tokens_BS: Tensor) -> Lesson:
        with torch.no_grad():
            output = self.model(input_ids=tokens_BS, use_cache=False, output_hidden_states=self.hidden)
        return Lesson(
            output.logits.flatten(0, 1) if self.logits else None,
            tuple(output.hidden_states[1:]) if self.hidden else (),
        )


class CachedTeacher:
    """Reads what `write_cache` wrote."""

    def __init__(self, folder: Path, device: torch.device | str) -> None:
        self.folder, self.device = folder, device
        self.portion: int = json.loads((folder / CACHE_FILE).read_text(encoding="utf-8"))["portion"]

    def __call__(self, sequences: Sequence[int], tokens_BS: Tensor) -> Lesson:
        found: dict[str, list[Tensor]] = {"index": [], "log": [], "rest": []}
        for sequence in sequences:
            portion, row = divmod(sequence, self.portion)
            with safe_open(_part(self.folder, portion), "pt") as stored:
                for name, rows in found.items():
                    rows.append(stored.get_slice(name)[row : row + 1][0])
        index, log, rest = (torch.cat(rows).to(self.device) for rows in found.values())
        return Lesson(TopLogits(index.long(), log, rest))


def cache_bytes(config: DistillConfig, num_tokens: int, vocabulary: int) -> int:
    """Bytes that the cache of the largest logits takes."""
    return num_tokens * (min(config.top_logits, vocabulary) * BYTES_PER_LOGIT + 4)


def write_cache(
    teacher: Checkpoint,
    tokens_NS: Tensor,
    folder: Path,
    config: DistillConfig,
    fingerprint: str,
    device: torch.device | str,
    progress: Progress,
    title: str,
) -> None:
    """Write the teacher's largest logits for all sequences, or what an earlier writing left out.

    Raises `ResumeError` when `folder` holds the cache of something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    width = teacher.config.get_text_config().hidden_size
    portion = max(config.micro_batch_size, PORTION_BYTES // (4 * width * tokens_NS.shape[1]))
    kept = {"top_logits": config.top_logits, "temperature": config.temperature, "portion": portion}
    kept["fingerprint"] = fingerprint
    file = folder / CACHE_FILE
    if file.exists() and json.loads(file.read_text(encoding="utf-8")) != kept:
        raise ResumeError(f"{folder} holds the logits of another teacher or other texts; start over with --force.")
    write_json(file, kept)
    missing = [
        (number, rows) for number, rows in enumerate(tokens_NS.split(portion)) if not _part(folder, number).exists()
    ]
    if not missing:
        return
    stream = LayerStream(teacher, device)
    with progress.stage(f"{title}: teacher's logits", len(missing) * len(stream.layers)) as stage:
        for number, rows in missing:
            stream.load_trunk()
            run = Lockstep(
                stream.model, stream.layers, [part.to(device) for part in rows.split(config.micro_batch_size)]
            )
            stream.release_embeddings()
            try:
                for index in range(len(stream.layers)):
                    stream.load(index)
                    run.through(index)
                    stream.release(index)
                    stage.advance()
                stream.load_head()
                tops = [
                    TopLogits.of(logits_BSV.flatten(0, 1), config.top_logits, config.temperature)
                    for logits_BSV in run.finish_each()
                ]
            finally:
                run.close()
            _save(_part(folder, number), tops, rows.shape)


def _save(file: Path, tops: Sequence[TopLogits], shape: Sequence[int]) -> None:
    stored = {
        "index": torch.cat([top.index_TK for top in tops]).int().unflatten(0, list(shape)),
        "log": torch.cat([top.log_TK for top in tops]).unflatten(0, list(shape)),
        "rest": torch.cat([top.rest_T for top in tops]).unflatten(0, list(shape)),
    }
    temporary = file.with_suffix(".part")
    save_file({name: tensor.cpu().contiguous() for name, tensor in stored.items()}, temporary)
    replace_durably(temporary, file)


def _part(folder: Path, number: int) -> Path:
    return folder / f"logits-{number:05d}.safetensors"
