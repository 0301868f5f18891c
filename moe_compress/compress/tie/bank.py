"""The banks of a plan, made group by group before anything is written; each is kept in a file of its own.

All layers of one group are in memory together. A bank holds, by the names of the experts' own tensors, what the
group's first layer will store.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_compress.checkpoint.durable import replace_durably
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.compress.merge import align
from moe_compress.compress.merge.neurons import Expert, Original, inner_activations, read_expert, write_expert
from moe_compress.compress.tie.config import TieConfig
from moe_compress.compress.tie.fit import fit_expert
from moe_compress.compress.tie.plan import TiedGroup, TiePlan
from moe_compress.compress.tie.samples import Sample, load_samples
from moe_compress.progress import Stage


def make_banks(plan: TiePlan, stream: LayerStream, samples: Path, folder: Path, stage: Stage) -> None:
    """Fit the banks that `folder` does not hold yet; `stage` advances with every group."""
    folder.mkdir(parents=True, exist_ok=True)
    for group in plan.groups:
        file = bank_file(folder, group.leader)
        if not file.exists():
            for tied in group.layers:
                stream.load(tied.layer)
            tensors = make_bank(plan.config, group, stream, samples)
            save_file(tensors, file.with_suffix(".part"))
            replace_durably(file.with_suffix(".part"), file)
            for tied in group.layers:
                stream.release(tied.layer)
        stage.advance(f"bank of layer {group.leader}")


@torch.no_grad()
def make_bank(config: TieConfig, group: TiedGroup, stream: LayerStream, samples: Path) -> dict[str, Tensor]:
    """The tensors of one bank [E, ...], in the stored types; the group's layers are resident."""
    modules: list[Any] = [stream.moe_layers[tied.layer].experts for tied in group.layers]
    width = stream.moe_layers[group.leader].width
    seen = [load_samples(samples, tied.layer, group.num_experts, width) for tied in group.layers]
    tensors = {name: tensor.detach().clone() for name, tensor in modules[0].named_parameters(recurse=False)}
    bank = Original(modules[0], tensors)
    for slot in range(group.num_experts):
        experts = [tied.slots.index(slot) for tied in group.layers]
        members = [read_expert(module, expert) for module, expert in zip(modules, experts, strict=True)]
        tokens = [found[expert] for found, expert in zip(seen, experts, strict=True)]
        members = align_all(config, modules[0], members, tokens)
        weights = [tied.weights[expert] for tied, expert in zip(group.layers, experts, strict=True)]
        fitted = fit_expert(modules[0], members, weights, tokens, config.fit, config.fit_steps)
        write_expert(bank, slot, fitted)
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def align_all(config: TieConfig, module: Any, members: list[Expert], tokens: list[Sample]) -> list[Expert]:
    """The members with their neurons in the order of the first one's; by activations on the tokens of both."""
    aligned = members[:1]
    for member, own in zip(members[1:], tokens[1:], strict=True):
        input_NH = torch.cat([tokens[0].input_NH, own.input_NH])
        if config.align is False:
            aligned.append(member)
        elif config.align == "weights" or not len(input_NH):
            aligned.append(member.permuted(align.by_weights(members[0].rows_FD, member.rows_FD)))
        else:
            first, second = (inner_activations(module, one, input_NH) for one in (members[0], member))
            aligned.append(member.permuted(align.by_activations(first, second)))
    return aligned


def bank_file(folder: Path, leader: int) -> Path:
    """Where the bank of a group is."""
    return folder / f"bank-{leader:05d}.safetensors"


def load_bank(folder: Path, leader: int) -> dict[str, Tensor]:
    """The tensors of a bank by the names of the experts' own."""
    return load_file(bank_file(folder, leader))
