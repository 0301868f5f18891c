"""What a distillation will do, in numbers: its updates, their sequences and learning rates, and the memory it needs.

Every update is a function of the settings and its number alone, so that a run can go on from any of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_compress.compress.distill.config import DistillConfig

FLOAT = 4  # bytes
NF4_SHARE = (4 + 32 / 64) / 32  # of a float32's bytes: 4 bits, and a float32 for every 64 weights
CURVE_POINTS = 100


@dataclass(frozen=True)
class Schedule:
    """The updates over `num_sequences` sequences of `sequence_length` tokens."""

    config: DistillConfig
    num_sequences: int
    sequence_length: int

    @property
    def num_updates(self) -> int:
        """Updates in all; the last may have fewer sequences."""
        return math.ceil(self.num_sequences * self.config.epochs / self.config.batch_size)

    @property
    def num_tokens(self) -> int:
        """Tokens learnt from, repeated ones counted again."""
        return self.num_sequences * self.config.epochs * self.sequence_length

    def sequences(self, update: int) -> list[int]:
        """The numbers of the sequences of one update: the whole set in a new order for every epoch."""
        size, count = self.config.batch_size, self.num_sequences
        wanted = range(update * size, min((update + 1) * size, count * self.config.epochs))
        orders = {epoch: self._order(epoch) for epoch in {position // count for position in wanted}}
        return [int(orders[position // count][position % count]) for position in wanted]

    def factor(self, update: int) -> float:
        """Share of the largest learning rate: linear warm-up, then half a cosine to 0 (see `cosine`), or 1."""
        if self.config.decay == "constant":
            return min(1.0, (update + 1) / max(1, math.ceil(self.config.warmup * self.num_updates)))
        return cosine(update, self.num_updates, self.config.warmup)

    def _order(self, epoch: int) -> Any:
        return np.random.default_rng([self.config.seed, epoch]).permutation(self.num_sequences)


def cosine(update: int, num_updates: int, warmup: float) -> float:
    """Linear warm-up over a share of the updates, then (1 + cos(pi t)) / 2 with t from 0 to 1 over the others."""
    rising = math.ceil(warmup * num_updates)
    if update < rising:
        return (update + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (update - rising) / max(1, num_updates - rising)))


def full_memory(
    config: DistillConfig,
    *,
    student: int,
    trained: int,
    teacher: float,
    original: int,
    vocabulary: int,
    sequence_length: int,
    gathered: int | None = None,
    devices: int = 1,
) -> int:
    """Bytes that the whole-model mode needs on each of `devices`, activations inside the layers left out.

    `student`, `trained`, `teacher` and `original` count parameters; the teacher's as many as would take its memory in
    float32 while it teaches. Each process holds weights in float32, and of what is trained the gradient and AdamW's two
    moments; logits of one pass lie in memory with their gradient and those of the teacher. Where the original writes
    responses, it does so before, on one device, and unpacked. With FSDP2 the processes hold all this together (but a
    packed teacher each), and `gathered` counts what each of them holds whole for a moment.
    """
    online = config.on_policy or (config.teacher != "cached" and config.asks_teacher)
    logits = (3 if online else 2) * config.micro_batch_size * sequence_length * vocabulary
    own, taught_by = student + 3 * trained, teacher if online else 0
    if gathered is None:
        training = config.processes * (own + taught_by + logits)
    else:
        copies = config.processes if config.teacher == "nf4" else 1
        training = own + copies * taught_by + config.processes * (gathered + logits)
    writes = config.prompt_length is not None and not config.on_policy
    return round(FLOAT * max(training / devices, original if writes else 0))


def layerwise_memory(*, layer: int, trained: int, teacher_layer: int, outside: int, tokens: int, width: int) -> int:
    """Bytes that the layerwise mode needs, activations inside a layer left out.

    Counts of the largest layer's parameters, of those trained in it, of the original's layer, and of what lies outside
    the layers; the float32 hidden states of all tokens are there three times (entering, leaving, wanted).
    """
    return FLOAT * (max(layer + 3 * trained, teacher_layer + layer) + outside + 3 * tokens * width)


def state_bytes(trained: int) -> int:
    """Bytes on disk while a training of so many parameters is saved: they and AdamW's moments, old beside new."""
    return 2 * 3 * FLOAT * trained


def plan_json(
    config: DistillConfig, schedule: Schedule, found: Mapping[str, Any], sentences: list[str]
) -> dict[str, Any]:
    """The content of `plan.json`: what was asked, what came of it, and the loss curve that `found` may have."""
    return {
        "op": "distill",
        "mode": config.mode,
        "config": config.model_dump(mode="json"),
        "updates": schedule.num_updates,
        "tokens": schedule.num_tokens,
        **found,
        "summary": sentences,
    }


def thinned(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `CURVE_POINTS` entries of a curve, evenly spread, the first and the last among them."""
    if len(curve) <= CURVE_POINTS:
        return curve
    return [curve[round(i * (len(curve) - 1) / (CURVE_POINTS - 1))] for i in range(CURVE_POINTS)]
