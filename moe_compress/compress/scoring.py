"""Calibration for a step: the tokens, and what one sweep over the layers measures on them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_compress.calibrate.ablation import Ablation, Losses
from moe_compress.calibrate.config import CalibrationConfig
from moe_compress.calibrate.data import Calibration, load_calibration, load_held_out
from moe_compress.calibrate.scores import Scores
from moe_compress.calibrate.sweep import Measurement, collect
from moe_compress.checkpoint.source import Checkpoint, load_tokenizer
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.compress.surroundings import Surroundings
from moe_compress.manifest import describe_source
from moe_compress.models.layers import MoELayer


def read_calibration(folder: Path, config: Any, calibration: CalibrationConfig) -> Calibration:
    """The calibration tokens for the model whose tokenizer lies in `folder`."""
    tokenizer = load_tokenizer(folder)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return load_calibration(calibration, tokenizer, max_length=longest)


def read_held_out(folder: Path, config: Any, calibration: CalibrationConfig, num_sequences: int) -> Calibration:
    """Sequences of documents that the calibration tokens are not of."""
    tokenizer = load_tokenizer(folder)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return load_held_out(calibration, tokenizer, num_sequences, max_length=longest)


def calibration_data(source: Checkpoint, around: Surroundings) -> Calibration:
    """The calibration tokens, by the checkpoint's own tokenizer, unless they were read before."""
    return around.data or read_calibration(source.folder, source.config, around.calibration)


def describe_data(source: Checkpoint, data: Calibration) -> dict[str, Any]:
    """What was measured, and on which tokens."""
    return {"source": describe_source(source), "tokens": data.fingerprint, "data": data.sources}


def score(
    source: Checkpoint,
    folder: Path,
    around: Surroundings,
    title: str,
    *,
    measurement: Callable[[MoELayer], Measurement] | None = None,
    settings: dict[str, Any] | None = None,
) -> Scores:
    """Measure the experts of `source` on the calibration tokens, or read what was measured before.

    `measurement` makes what measures a layer beyond the usual statistics; `settings` are what it depends on.
    """
    if (folder / "scores.json").exists():
        return Scores.load(folder)
    data = calibration_data(source, around)
    fingerprint = describe_data(source, data) | {"seed": around.calibration.seed} | (settings or {})
    stream = LayerStream(source, around.device)
    with around.progress.stage(f"{title}: score", len(stream.layers)) as stage:
        return collect(
            stream,
            data.tokens,
            batch_size=around.calibration.batch_size,
            folder=folder,
            fingerprint=fingerprint,
            min_tokens_per_expert=around.calibration.min_tokens_per_expert,
            stage=stage,
            measurement=measurement,
        )


def ablations(
    source: Checkpoint,
    tokens: Tensor,
    experts: Mapping[int, Sequence[int]],
    folder: Path,
    around: Surroundings,
    title: str,
) -> Losses:
    """The loss on `tokens` [N, S] without each of these experts (by layer), going on with what `folder` holds."""
    stream = LayerStream(source, around.device)
    digest = hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()
    ablation = Ablation(
        stream,
        tokens,
        experts,
        batch_size=around.calibration.batch_size,
        folder=folder,
        fingerprint={"source": describe_source(source), "tokens": digest},
    )
    with around.progress.stage(f"{title}: ablate", ablation.num_layer_passes) as stage:
        return ablation.run(stage)
