"""What a group would lose when it is tied, for every rank of its differences, on the sampled tokens.

The bank is fitted as the step would fit it; differences are fitted to the samples as they later are to all tokens
(`merge.differences`). The loss of a layer is the sum of g^2 |f(x) - f'(x)|^2 over its experts' tokens, f' what takes
the place of an expert, scaled up from the sample to all tokens, over the squared norm of the hidden states that leave
the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_compress.calibrate.scores import LayerScores
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.compress.merge import align
from moe_compress.compress.merge.low_rank import best_factors, best_scale, best_successor
from moe_compress.compress.merge.neurons import DOWN, Expert, Original, inner_activations, read_expert
from moe_compress.compress.tie.bank import make_bank
from moe_compress.compress.tie.config import TieConfig
from moe_compress.compress.tie.plan import TiedGroup, loss_name
from moe_compress.compress.tie.samples import Sample, load_samples


@torch.no_grad()
def group_losses(
    config: TieConfig, group: TiedGroup, stream: LayerStream, samples: Path, measured: dict[int, LayerScores]
) -> dict[str, NDArray[np.float64]]:
    """The statistics `tie_loss.<rank>` [E] of a group's leader; the group's layers are resident."""
    leader = stream.moe_layers[group.leader]
    bank = Original(leader.experts, make_bank(config, group, stream, samples))
    leads = [read_expert(bank, slot) for slot in range(group.num_experts)]
    found = {loss_name(rank): np.zeros(group.num_experts) for rank in config.rank_options}
    for tied in group.layers:
        moe, scores = stream.moe_layers[tied.layer], measured[tied.layer]
        tokens = load_samples(samples, tied.layer, group.num_experts, leader.width)
        for expert, slot in enumerate(tied.slots):
            member = read_expert(moe.experts, expert)
            member = member.permuted(align.by_weights(leads[slot].rows_FD, member.rows_FD))
            if not len(tokens[expert].gate_N):
                continue
            errors = rank_errors(moe.experts, leads[slot], member, tokens[expert], config.rank_options)
            seen = scores.statistics["tokens"][expert] / len(tokens[expert].gate_N)
            for rank, error in zip(config.rank_options, errors, strict=True):
                scaled = error * moe.output_scale**2 * seen / max(scores.stream_energy, np.finfo(np.float64).tiny)
                found[loss_name(rank)][slot] += scaled
    return found


def rank_errors(experts: Any, lead: Expert, member: Expert, sample: Sample, ranks: Sequence[int]) -> list[float]:
    """Sum of g^2 |f(x) - f'(x)|^2 over a sample, for each rank of the differences of f' from the stored expert.

    Without differences (rank 0) the stored expert itself takes the member's place.
    """
    gate_N1, input_NH = sample.gate_N[:, None], sample.input_NH
    weighted_NH = gate_N1 * input_NH
    moment = weighted_NH.T @ weighted_NH
    inputs = {part: _factors(member.parts[part], lead.parts[part], moment, max(ranks)) for part in _inputs(member)}
    true_NF = gate_N1 * inner_activations(experts, member, input_NH)
    true_NH = true_NF @ member.parts[DOWN]
    offset = 0.0 if member.offset is None or lead.offset is None else gate_N1 * (member.offset - lead.offset)
    errors = []
    for rank in ranks:
        if not rank:
            found_NH = gate_N1 * inner_activations(experts, lead, input_NH) @ lead.parts[DOWN]
            errors.append(float((true_NH - found_NH + offset).double().square().sum()))
            continue
        fitted = dict(member.parts)
        for part, (scale, left, right) in inputs.items():
            fitted[part] = (scale * lead.parts[part].double() + left[:, :rank] @ right[:rank]).float()
        found_NF = gate_N1 * inner_activations(experts, Expert(fitted), input_NH)
        inner_moment = found_NF.T @ found_NF
        best = best_successor(member.parts[DOWN].T, true_NF.T @ found_NF, inner_moment)
        scale, left, right = _factors(best, lead.parts[DOWN].T, inner_moment, rank)
        down_OF = scale * lead.parts[DOWN].T.double() + left @ right
        errors.append(float((true_NH - found_NF @ down_OF.float().T).double().square().sum()))
    return errors


def _inputs(expert: Expert) -> list[str]:
    return [part for part in ("gate_proj", "up_proj") if part in expert.parts]


def _factors(matrix: Tensor, lead: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    scale = best_scale(matrix, lead, moment)
    return scale, *best_factors(matrix.double() - scale * lead.double(), moment, rank)
