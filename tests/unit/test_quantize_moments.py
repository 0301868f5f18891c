"""Second moments from rehearsals that end early, against the inputs seen in the model's own forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_compress.compress.quantize.apply import POOL_BELOW, _Moments
from moe_compress.compress.quantize.gptq import Hessians
from moe_compress.compress.quantize.shapes import linear_layers
from moe_compress.models.experts import IMPLEMENTATION
from moe_compress.models.layers import decoder_layers, find_moe_layers
from moe_compress.models.lockstep import Lockstep
from tests.tiny_checkpoint import VOCABULARY, tiny_model


def test_equal_to_those_of_whole_passes() -> None:
    model: Any = tiny_model(num_hidden_layers=1)
    model.set_experts_implementation(IMPLEMENTATION)
    layer, moe = decoder_layers(model)[1][0], find_moe_layers(model)[0]
    linears = [linear for linear in linear_layers([layer], {0: moe}) if linear.part == "attention"]
    batches = list(torch.randint(VOCABULARY, (4, 2, 60), generator=torch.Generator().manual_seed(0)))

    expected = {linear.path: Hessians(1, linear.shape[1]) for linear in linears}
    inner = Hessians(moe.num_experts, 16)
    outer = Hessians(moe.num_experts, 32)

    def record(expert: int, hidden_NH: Tensor, inner_NF: Tensor) -> None:
        outer.add(expert, hidden_NH)
        inner.add(expert, inner_NF)

    handles = [
        layer.get_submodule(path).register_forward_pre_hook(
            lambda module, inputs, path=path: expected[path].add(0, inputs[0].flatten(0, 1))
        )
        for path in expected
    ]
    moe.experts.recorder = record  # type: ignore[assignment]
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    del moe.experts.recorder
    for handle in handles:
        handle.remove()

    run = Lockstep(model, decoder_layers(model)[1], batches)
    experts_ran = []
    counting = layer.mlp.experts.register_forward_hook(lambda *arguments: experts_ran.append(1))
    moments = _Moments(layer, moe, linears)
    moments.collect_linears(lambda: run.rehearse(0))
    assert not experts_ran, "attention comes before the experts"
    counting.remove()
    for path, hessians in expected.items():
        assert torch.equal(moments.linear(path), hessians.finish(1)[0])
    members = list(range(moe.num_experts))
    for name, hessians in (("gate_up_proj", outer), ("down_proj", inner)):
        found, few = moments.experts(name, members, lambda: run.rehearse(0))
        means, starved = hessians.finish(POOL_BELOW)
        assert torch.equal(found, means) and few == starved
    run.close()


def test_inputs_shared_by_projections_are_counted_once() -> None:
    model: Any = tiny_model(num_hidden_layers=1)
    layer, moe = decoder_layers(model)[1][0], find_moe_layers(model)[0]
    linears = [linear for linear in linear_layers([layer], {0: moe}) if linear.part == "attention"]
    run = Lockstep(model, decoder_layers(model)[1], [torch.arange(20)[None]])
    moments = _Moments(layer, moe, linears)
    moments.collect_linears(lambda: run.rehearse(0))
    run.close()
    assert moments.linear("self_attn.k_proj") is moments.linear("self_attn.q_proj")
    assert moments.linear("self_attn.o_proj") is not moments.linear("self_attn.q_proj")
