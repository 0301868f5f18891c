"""The measured costs against float64, token by token: each expert quantized or dropped alone in a rebuilt block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_compress.calibrate.scores import Scores
from moe_compress.calibrate.sweep import collect
from moe_compress.checkpoint.source import open_checkpoint
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.compress.quantize.config import QuantizeConfig
from moe_compress.compress.quantize.rtn import rtn
from moe_compress.compress.quantize.sensitivity import ReducedRouters, Sensitivity
from moe_compress.models.layers import MoELayer
from moe_compress.progress import SilentProgress
from moe_compress.runtime.grid import Grid
from tests.tiny_checkpoint import VOCABULARY, tiny_checkpoint

EXPERTS, TOP_K, LAYERS = 5, 2, 2
TOKENS = torch.randint(VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(1))
CONFIG = QuantizeConfig.model_validate({
    "op": "quantize", "method": "rtn", "average_bits": 3, "options": [1, 2, 4], "allow_drop": True, "group_size": 8,
    "granularity": "projection", "symmetric": False, "scale_search": 3,
})  # fmt: skip
Matrices = dict[str, Tensor]


@pytest.fixture(scope="module", params=["qwen3_moe", "olmoe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gates that are shares of the chosen experts', and gates that are not."""
    return tiny_checkpoint(
        tmp_path_factory.mktemp("model") / request.param, request.param, dtype=torch.float32, num_experts=EXPERTS,
        num_experts_per_tok=TOP_K, num_hidden_layers=LAYERS,
    )  # fmt: skip


def measured(folder: Path, work: Path, config: QuantizeConfig, channel_weights: Tensor | None = None) -> Scores:
    stream = LayerStream(open_checkpoint(str(folder)))
    routers = ReducedRouters(stream.checkpoint.config)

    def measurement(moe: MoELayer) -> Sensitivity:
        return Sensitivity(config, moe, torch.float32, routers=routers, channel_weights=channel_weights)

    with SilentProgress().stage("score", LAYERS) as stage:
        return collect(
            stream, TOKENS, batch_size=2, folder=work, fingerprint={}, min_tokens_per_expert=1, stage=stage,
            measurement=measurement,
        )  # fmt: skip


class Block:
    """One layer's MoE block in float64, from the stored tensors; `inputs` [T, H] are what enters it."""

    def __init__(self, folder: Path, layer: int) -> None:
        model: Any = LayerStream(open_checkpoint(str(folder)))
        self.norm_topk = bool(getattr(model.checkpoint.config, "norm_topk_prob", False))
        mlp = model.load(layer).mlp
        self.router = mlp.gate.weight.detach().double()
        self.experts: list[Matrices] = []
        for fused, down in zip(mlp.experts.gate_up_proj.detach(), mlp.experts.down_proj.detach(), strict=True):
            gate, up = fused.chunk(2)
            self.experts.append({"gate_proj": gate, "up_proj": up, "down_proj": down})

    def output(self, expert: Matrices, x: Tensor) -> Tensor:
        gate, up, down = (expert[name].double() for name in ("gate_proj", "up_proj", "down_proj"))
        inner = gate @ x
        return down @ (inner * torch.sigmoid(inner) * (up @ x))

    def route(self, x: Tensor, lost: int | None = None) -> list[tuple[int, float]]:
        """Chosen experts and gate values; without the expert `lost`, as if there had never been one."""
        left = [expert for expert in range(EXPERTS) if expert != lost]
        shares = torch.softmax(self.router[left] @ x, dim=0)
        values, order = shares.topk(TOP_K)
        values = values / values.sum() if self.norm_topk else values
        return [(left[int(number)], float(value)) for number, value in zip(order, values, strict=True)]

    def routed(self, x: Tensor, lost: int | None = None) -> Tensor:
        return sum((g * self.output(self.experts[e], x) for e, g in self.route(x, lost)), torch.zeros(len(x)).double())


def rounded(expert: Matrices, bits: int, part: str) -> Matrices:
    grid = Grid(bits, 8, bits == 1)
    return {
        name: rtn(matrix, grid, scale_dtype=torch.float32, search_steps=3).dequantize()
        if part in ("expert", name)
        else matrix
        for name, matrix in expert.items()
    }


def entering(folder: Path) -> tuple[list[Tensor], list[Tensor]]:
    """The MoE blocks' inputs [T, H] and the squared norms [T] of what leaves the layer, in plain transformers."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    found: list[Tensor] = []
    leaving: list[Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0].reshape(-1, 32)))
        layer.register_forward_hook(lambda module, inputs, out: leaving.append(out.reshape(-1, 32).square().sum(-1)))
    with torch.no_grad():
        model.double()(input_ids=TOKENS, use_cache=False)
    return found, leaving


def sums(changes: list[Tensor], energies: list[float], channels: Tensor) -> dict[str, float]:
    """The three kinds of costs, of squared changes [H] token by token."""
    relative = [change / energy for change, energy in zip(changes, energies, strict=True)]
    return {
        "error": float(sum(change.sum() for change in changes)),
        "relative_error": float(sum(change.sum() for change in relative)),
        "relative_fisher": float(sum((change * channels).sum() for change in relative)),
    }


def test_costs_are_those_of_every_expert_alone(folder: Path, tmp_path: Path) -> None:
    channels = torch.rand(32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    scores = measured(folder, tmp_path / "scores", CONFIG, channels)
    for layer, (inputs, leaving) in enumerate(zip(*entering(folder), strict=True)):
        block = Block(folder, layer)
        statistics = scores.layers[layer].statistics
        routing = [block.route(x) for x in inputs]
        for expert in range(EXPERTS):
            own = [
                (x, float(energy), g)
                for x, energy, chosen in zip(inputs, leaving, routing, strict=True)
                for e, g in chosen
                if e == expert
            ]
            energies = [energy for _, energy, _ in own]
            assert len(own) == statistics["tokens"][expert]
            for part in ("expert", "gate_proj", "up_proj", "down_proj"):
                for bits in (1, 2, 4, 8):
                    new = rounded(block.experts[expert], bits, part)
                    old = block.experts[expert]
                    changes = [(g * (block.output(new, x) - block.output(old, x))).square() for x, _, g in own]
                    for kind, expected in sums(changes, energies, channels).items():
                        name = f"{kind}.{part}.{bits}"
                        assert statistics[name][expert] == pytest.approx(expected, rel=1e-3), name
            changes = [(block.routed(x, lost=expert) - block.routed(x)).square() for x, _, _ in own]
            for kind, expected in sums(changes, energies, channels).items():
                assert statistics[f"{kind}.expert.drop"][expert] == pytest.approx(expected, rel=1e-4), kind
    errors = scores.layers[0].statistics
    assert (errors["error.expert.1"] > errors["error.expert.4"]).all()


def test_few_tokens_stand_for_all(folder: Path, tmp_path: Path) -> None:
    """Of the tokens of an expert the first few are looked at, and count for all."""
    few = measured(folder, tmp_path / "few", CONFIG.model_copy(update={"max_tokens_per_expert": 3}))
    block, inputs = Block(folder, 0), entering(folder)[0][0]
    statistics = few.layers[0].statistics
    for expert in range(EXPERTS):
        own = [(x, g) for x in inputs for e, g in block.route(x) if e == expert]
        new = rounded(block.experts[expert], 2, "expert")
        changes = [float((g * (block.output(new, x) - block.output(block.experts[expert], x))).square().sum())
                   for x, g in own[:3]]  # fmt: skip
        assert statistics["error.expert.2"][expert] == pytest.approx(np.mean(changes) * len(own), rel=1e-3)
        assert statistics["tokens"][expert] == len(own)
