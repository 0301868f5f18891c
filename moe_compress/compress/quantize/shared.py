"""Quantizing experts that several layers use: once, by what all of these layers send them.

Statistics of a bank's experts are those of all its layers together, and so are the second moments of their inputs,
which a sweep over the layers as they are collects before any is quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_compress.calibrate.scores import LayerScores, Scores
from moe_compress.checkpoint.durable import replace_durably
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.compress.quantize.gptq import Hessians
from moe_compress.models.experts import matrix_shape, projections, routed_experts, routed_inner
from moe_compress.models.lockstep import Lockstep
from moe_compress.progress import Stage

LARGEST = ("max_abs",)  # statistics that are no sums


def joined(scores: Scores, owners: Mapping[int, int]) -> Scores:
    """The scores of the layers that store experts, those of the layers in `owners` added to their owner's.

    Errors are added in units of their own layer's output, which is what they are judged by.
    """
    found = {layer.layer: layer for layer in scores.layers if layer.layer not in owners}
    for layer in scores.layers:
        if layer.layer in owners:
            found[owners[layer.layer]] = _sum(found[owners[layer.layer]], layer)
    return replace(scores, layers=list(found.values()))


def _sum(owner: LayerScores, user: LayerScores) -> LayerScores:
    scale = owner.stream_energy / user.stream_energy if user.stream_energy else 1.0
    statistics = {}
    for name, values in owner.statistics.items():
        other = user.statistics[name] * (scale if name.startswith("error.") else 1.0)
        statistics[name] = np.maximum(values, other) if name in LARGEST else values + other
    return replace(owner, num_tokens=owner.num_tokens + user.num_tokens, statistics=statistics)


def collect_moments(stream: LayerStream, tokens: Tensor, batch_size: int, folder: Path, stage: Stage) -> None:
    """Write the sums of second moments of every shared bank's inputs to `folder`; `stage` advances with every layer.

    Sums are over all layers that use the bank, and all tokens [N, S].
    """
    folder.mkdir(parents=True, exist_ok=True)
    stream.load_trunk()
    run = Lockstep(stream.model, stream.layers, tokens.to(stream.device).split(batch_size))
    stream.release_embeddings()
    held: dict[int, dict[str, Hessians]] = {}
    last = {owner: layer for layer, owner in sorted(stream.owners.items())}
    try:
        for index in range(len(stream.layers)):
            stream.load(index)
            owner = stream.owners.get(index, index)
            if owner in last:
                experts: Any = stream.moe_layers[index].experts
                sums = held.setdefault(owner, _empty(experts))
                hook = experts.register_forward_pre_hook(partial(_see, sums))
                run.through(index)
                hook.remove()
                if index == last[owner]:
                    _save(folder, owner, held.pop(owner))
            else:
                run.through(index)
            stream.release(index)
            stage.advance()
    finally:
        run.close()


def load_moments(folder: Path, owner: int, name: str) -> Hessians:
    """What `collect_moments` wrote for one fused matrix of a bank."""
    kept = load_file(_file(folder, owner))
    sums = Hessians(0, 0)
    sums.sums_EII, sums.tokens = kept[name], kept[f"{name}.tokens"].tolist()
    return sums


def has_moments(folder: Path, owners: Mapping[int, int]) -> bool:
    """Whether the moments of all banks are in `folder`."""
    return all(_file(folder, owner).exists() for owner in set(owners.values()))


def _empty(experts: Any) -> dict[str, Hessians]:
    fused = {name: getattr(experts, name) for name in projections(experts)}
    return {
        name: Hessians(len(tensor), matrix_shape(experts, tensor)[1], tensor.device) for name, tensor in fused.items()
    }


def _see(sums: dict[str, Hessians], experts: Any, inputs: Any) -> None:
    hidden_TH, index_TK, gate_TK = inputs
    for expert, slot_N in routed_experts(experts, index_TK, gate_TK):
        for name, hessians in sums.items():
            if name == "down_proj":
                hessians.add(expert, routed_inner(experts, expert, hidden_TH, index_TK, slot_N))
            else:
                hessians.add(expert, hidden_TH.index_select(0, slot_N // index_TK.shape[1]))


def _save(folder: Path, owner: int, sums: dict[str, Hessians]) -> None:
    kept = {name: hessians.sums_EII.cpu() for name, hessians in sums.items()}
    kept |= {f"{name}.tokens": torch.tensor(hessians.tokens) for name, hessians in sums.items()}
    file = _file(folder, owner)
    save_file(kept, file.with_suffix(".part"))
    replace_durably(file.with_suffix(".part"), file)


def _file(folder: Path, owner: int) -> Path:
    return folder / f"moments-{owner:05d}.safetensors"
