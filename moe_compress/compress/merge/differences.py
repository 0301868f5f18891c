"""Fitting what tells routed experts from the stored ones that run for them: a scale and a low-rank matrix, by matrix.

Gate and up projections are fitted on the inputs that the router sends the expert, each weighted by the square of its
gate value. The down projection is then fitted to the expert's true output on
what the fitted ones give it: with h the true and h' the fitted activations, the matrix M with the least sum of
|W h - M h'|^2, so weighted, takes the place of W. The scale of the stored matrix is the best one without the low-rank
part (in arXiv 2608.07814 it is 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from moe_compress.checkpoint.rewrite import PROBES
from moe_compress.compress.merge.low_rank import best_factors, best_scale, best_successor
from moe_compress.compress.merge.neurons import DOWN, Expert, inner_activations
from moe_compress.models.experts import routed_tokens
from moe_compress.models.lockstep import Enough, Lockstep
from moe_compress.runtime.banks import Bank, Differences, short

MOMENT_BYTES = 4 << 30  # of second moments held at a time


def empty_differences(experts: Any, bank: Bank, prefix: str, device: torch.device) -> dict[str, Tensor]:
    """Tensors of differences that say nothing, by name after `prefix`, for a module whose own may be empty ones."""
    return {
        f"{prefix}{name}": torch.full_like(tensor, 1.0 if name.endswith("_scale") else 0.0, device=device)
        for name, tensor in Differences(experts, bank).state_dict().items()
    }


class Differ:
    """The routed experts of a layer, and the experts module of the new model that is to stand for them."""

    def __init__(self, experts: Any) -> None:
        self.experts = experts
        self.differences: Differences = experts.differences
        self.members: dict[int, Expert] = {}  # by routed expert
        self.leads: dict[int, Expert] = {}  # the stored expert of each

    def add(self, expert: int, member: Expert, lead: Expert | None) -> None:
        """Enter a routed expert, aligned with the stored one that it is to differ from; None if it is that one."""
        self._write_biases(expert, member)
        if lead is not None:
            self.members[expert], self.leads[expert] = member, lead

    def fit(self, run: Lockstep, index: int) -> None:
        """Find the differences of all members, on the calibration tokens of `run` before layer `index`."""
        if not self.members:
            return
        hidden, width = next(iter(self.members.values())).parts[DOWN].shape
        for chunk in self._chunks(8 * width**2):
            self._fit_inputs(run, index, chunk, width)
        for chunk in self._chunks(2 * 8 * hidden**2):
            self._fit_down(run, index, chunk, hidden)

    def _fit_inputs(self, run: Lockstep, index: int, chunk: list[int], width: int) -> None:
        device = self.experts.down_proj.device
        moments = {expert: torch.zeros(width, width, dtype=torch.float64, device=device) for expert in chunk}

        def see(expert: int, hidden_NH: Tensor, gate_N1: Tensor) -> None:
            weighted_NH = gate_N1 * hidden_NH
            moments[expert] += (weighted_NH.T @ weighted_NH).double()

        self._observe(run, index, chunk, see)
        for expert in chunk:
            for part in self._input_parts():
                self._write(expert, part, self.members[expert].parts[part], moments[expert])

    def _fit_down(self, run: Lockstep, index: int, chunk: list[int], hidden: int) -> None:
        fitted = {expert: self._fitted(expert) for expert in chunk}
        device = self.experts.down_proj.device
        shape, kind = (hidden, hidden), {"dtype": torch.float64, "device": device}
        crosses = {expert: torch.zeros(shape, **kind) for expert in chunk}
        moments = {expert: torch.zeros(shape, **kind) for expert in chunk}

        def see(expert: int, hidden_NH: Tensor, gate_N1: Tensor) -> None:
            true_NF = gate_N1 * inner_activations(self.experts, self.members[expert], hidden_NH)
            found_NF = gate_N1 * inner_activations(self.experts, fitted[expert], hidden_NH)
            crosses[expert] += (true_NF.T @ found_NF).double()
            moments[expert] += (found_NF.T @ found_NF).double()

        self._observe(run, index, chunk, see)
        for expert in chunk:
            own = self.members[expert].parts[DOWN].T
            best = best_successor(own, crosses[expert], moments[expert])
            self._write(expert, DOWN, best, moments[expert])

    def _write(self, expert: int, part: str, matrix_OI: Tensor, moment_II: Tensor) -> None:
        """Enter the scale and the factors of one matrix; that of a down projection is given as [out, in]."""
        lead = self.leads[expert].parts[part]
        lead_OI = (lead.T if part == DOWN else lead).double()
        scales = self.differences.get_parameter(f"{short(part)}_scale")
        scales[expert] = best_scale(matrix_OI, lead_OI, moment_II)
        left, right = self.differences.factors(part, expert)
        rest_OI = matrix_OI.double() - scales[expert].double() * lead_OI
        found, other = best_factors(rest_OI, moment_II, len(left))
        left[: found.shape[1]].copy_(found.T)
        right[: len(other)].copy_(other)

    def _fitted(self, expert: int) -> Expert:
        """The member with the gate and up projections that were found for it."""
        parts = dict(self.members[expert].parts)
        for part in self._input_parts():
            left, right = (factor.float() for factor in self.differences.factors(part, expert))
            scale = self.differences.get_parameter(f"{short(part)}_scale")[expert].float()
            parts[part] = scale * self.leads[expert].parts[part] + left.T @ right
        return Expert(parts)

    def _observe(
        self, run: Lockstep, index: int, wanted: list[int], see: Callable[[int, Tensor, Tensor], None]
    ) -> None:
        """Show `see` what the router sends these experts: inputs [N, H] and gate values [N, 1]."""

        def enter(module: Any, inputs: Any) -> None:
            hidden_TH, index_TK, gate_TK = inputs
            if run.batch < PROBES:
                raise Enough
            for expert, pair_N in routed_tokens(index_TK, gate_TK, len(module.bank.slots)):
                if expert in wanted:
                    gate_N1 = gate_TK.flatten()[pair_N].to(hidden_TH.dtype)[:, None]
                    see(expert, hidden_TH.index_select(0, pair_N // index_TK.shape[1]), gate_N1)
            raise Enough

        handle = self.experts.register_forward_pre_hook(enter)
        run.rehearse(index)
        handle.remove()

    def _chunks(self, bytes_each: int) -> Iterator[list[int]]:
        members, count = sorted(self.members), max(1, MOMENT_BYTES // bytes_each)
        for start in range(0, len(members), count):
            yield members[start : start + count]

    def _input_parts(self) -> list[str]:
        return [part for part in self.differences.ranges if part != DOWN]

    def _write_biases(self, expert: int, member: Expert) -> None:
        if member.offset is None:
            return
        columns = [member.parts[f"{part}_bias"][:, 0] for part in self._input_parts()]
        alternate = torch.stack(columns, dim=-1).flatten()
        fused = torch.cat(columns) if self.experts.is_concatenated else alternate
        first = "gate_up_proj" if self.experts.has_gate else "up_proj"
        self.differences.get_parameter(f"{first}_bias")[expert] = fused
        self.differences.get_parameter(f"{DOWN}_bias")[expert] = member.offset
