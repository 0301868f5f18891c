"""Traces of routers: what was rolled out token by token is replayed in one pass, with gradients."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moe_compress.checkpoint.rewrite import rewrite
from moe_compress.checkpoint.source import open_checkpoint
from moe_compress.checkpoint.stream import TORCH_DTYPES, LayerStream
from moe_compress.compress.zero_experts.apply import ZeroExpertsChange
from moe_compress.compress.zero_experts.config import ZeroExpertsConfig
from moe_compress.compress.zero_experts.losses import group_balance_loss
from moe_compress.compress.zero_experts.plan import LayerFacts, plan_zero_experts
from moe_compress.models.layers import find_moe_layers
from moe_compress.progress import SilentProgress
from moe_compress.runtime.trace import RoutingTrace, replayed
from moe_compress.runtime.zero_experts import use_zero_experts
from tests.tiny_checkpoint import tiny_checkpoint

LAYERS, EXPERTS, ZERO, K = 2, 8, 4, 2
PROMPT = torch.randint(256, (3, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("model")
    source = open_checkpoint(str(tiny_checkpoint(folder / "source")))
    stream = LayerStream(source)
    plan = plan_zero_experts(ZeroExpertsConfig(op="zero_experts"), [LayerFacts(n, EXPERTS, K) for n in range(LAYERS)])
    change = ZeroExpertsChange(plan, {name: TORCH_DTYPES[dtype] for name, dtype in stream.stored_dtypes.items()})
    with SilentProgress().stage("apply", LAYERS) as stage:
        rewrite(source, folder / "zero", change, max_shard_bytes=10**8, device="cpu", stage=stage)
    return AutoModelForCausalLM.from_pretrained(folder / "zero", dtype=torch.float32).eval()


def test_a_rollout_is_replayed_in_one_pass(model: Any) -> None:
    """Also after the routers have changed: the experts are those of the rollout."""
    layers = find_moe_layers(model)
    with RoutingTrace(layers) as rollout, torch.no_grad():
        tokens = model.generate(PROMPT, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert len(rollout.passes[0]) == 5, "the prompt, and each token but the last"
    seen = tokens[:, :-1]
    rows = {moe.layer: rollout.rows_BSK(moe.layer, len(PROMPT)) for moe in layers}
    assert all(found.shape == (*seen.shape, K) for found in rows.values())
    with RoutingTrace(layers) as again, torch.no_grad():
        expected = model(input_ids=seen).logits
    for layer, found in rows.items():
        assert torch.equal(again.last(layer).row_TK.view(found.shape).sort().values, found.sort().values)
    routers = [parameter for name, parameter in model.named_parameters() if name.endswith("gate.weight")]
    before = [parameter.detach().clone() for parameter in routers]
    try:
        with torch.no_grad():
            for parameter in routers:
                parameter.add_(torch.randn_like(parameter))
            with RoutingTrace(layers) as other:
                model(input_ids=seen)
            with RoutingTrace(layers) as replay, replayed(layers, rows):
                logits = model(input_ids=seen).logits
    finally:
        for parameter, value in zip(routers, before, strict=True):
            parameter.data = value
    for layer, found in rows.items():
        assert torch.equal(replay.last(layer).row_TK.view(found.shape), found)
        assert not torch.equal(other.last(layer).row_TK.view(found.shape), found)
        scores: Tensor = replay.last(layer).logits_TR.softmax(dim=1).gather(1, found.flatten(0, 1))
        torch.testing.assert_close(replay.last(layer).gate_TK, scores / scores.sum(dim=1, keepdim=True))
    assert not torch.allclose(logits, expected)


def test_the_balance_loss_reaches_every_row_of_the_routers(model: Any) -> None:
    layers = find_moe_layers(model)
    with RoutingTrace(layers) as trace:
        model(input_ids=PROMPT)
    losses = []
    for moe in layers:
        found = trace.last(moe.layer)
        assert found.zero_R.tolist() == [False] * EXPERTS + [True] * ZERO
        losses.append(group_balance_loss(found.probability_TR, found.zero_R, found.skipped_TK, weight=2.0))
    gradients = torch.autograd.grad(sum(losses), [moe.block.get_parameter("gate.weight") for moe in layers])  # type: ignore[arg-type]
    for gradient in gradients:
        assert gradient.shape == (EXPERTS + ZERO, 32) and bool((gradient != 0).any(dim=1).all())


def test_nothing_is_left_behind(model: Any) -> None:
    layers = find_moe_layers(model)
    hooks = [len(moe.experts._forward_pre_hooks) for moe in layers]
    with torch.no_grad():
        expected = model(input_ids=PROMPT).logits
        with RoutingTrace(layers) as trace, replayed(layers, {0: torch.zeros(PROMPT.numel(), K, dtype=torch.int64)}):
            model(input_ids=PROMPT)
        assert len(trace.passes[1]) == 1
        assert torch.equal(model(input_ids=PROMPT).logits, expected)
    assert len(trace.passes[1]) == 1
    assert [len(moe.experts._forward_pre_hooks) for moe in layers] == hooks


def test_a_copy_is_a_model_of_its_own(model: Any) -> None:
    """Such as a frozen teacher: switched to the original, it leaves the student alone."""
    with torch.no_grad():
        expected = model(input_ids=PROMPT).logits
        teacher = copy.deepcopy(model)
        assert torch.equal(teacher(input_ids=PROMPT).logits, expected)
        use_zero_experts(teacher, False)
        original = teacher(input_ids=PROMPT).logits
        assert not torch.allclose(original, expected)
        assert torch.equal(model(input_ids=PROMPT).logits, expected)
        model.get_parameter("model.layers.0.mlp.gate.weight")[EXPERTS:].add_(1)
        assert torch.equal(teacher(input_ids=PROMPT).logits, original)
        model.get_parameter("model.layers.0.mlp.gate.weight")[EXPERTS:].sub_(1)
