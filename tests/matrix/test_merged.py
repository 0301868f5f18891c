"""Merged and tied checkpoints of many kinds of families: reduced routers, kept ones, differences, constants, banks.

The judge is what `AutoModelForCausalLM` makes of the folder; the functions of experts are compared with those of the
source, computed here in float64 from its tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moe_compress.calibrate.scores import LayerScores, Scores
from moe_compress.checkpoint.rewrite import Ledger, open_rewritten, take_layer
from moe_compress.checkpoint.source import open_checkpoint
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.compress.merge.apply import MergeChange
from moe_compress.compress.merge.config import MergeConfig
from moe_compress.compress.merge.neurons import read_expert
from moe_compress.compress.merge.plan import Group, MergedLayer, MergePlan
from moe_compress.compress.prune.apply import PruneChange
from moe_compress.compress.prune.config import PruneConfig
from moe_compress.compress.prune.plan import LayerPlan, PrunePlan
from moe_compress.compress.tie.apply import ExpandChange, TieChange
from moe_compress.compress.tie.bank import make_banks
from moe_compress.compress.tie.config import TieConfig
from moe_compress.compress.tie.plan import TiedGroup, TiedLayer, TiePlan
from moe_compress.compress.tie.samples import ExpertSamples
from moe_compress.models.layers import routing_groups
from moe_compress.progress import SilentProgress
from tests.matrix.case import FamilyCase
from tests.matrix.families import NUM_EXPERTS, save, tiny_config, tiny_model
from tests.matrix.test_quantized import TOLERANCE, stored
from tests.unit.test_banks import routed_expert

# What is special about them is in docs/architectures.md: biases and transposed weights (gpt_oss), correction biases
# (deepseek_v3, minimax_m2, ernie4_5_moe), shared experts (deepseek_v3, qwen2_moe), experts without a gate in a latent
# space (nemotron_h), the decoder layer as the owner (gemma4), a null expert (zaya), fused storage (granitemoe).
KINDS = (
    "deepseek_v3", "deepseek_v4", "ernie4_5_moe", "gemma4", "gpt_oss", "granitemoe", "minimax_m2", "mixtral",
    "nemotron_h", "olmoe", "qwen2_moe", "qwen3_moe", "zaya",
)  # fmt: skip
TOKENS = torch.randint(3, 100, (4, 24), generator=torch.Generator().manual_seed(1))


class Case(FamilyCase):
    """What merging makes of one family's checkpoint."""

    def plan(
        self, layers: dict[int, list[list[int]]], ranks: dict[str, int] | None = None, **settings: Any
    ) -> MergePlan:
        """Groups by layer, each with its dominant expert first and equal shares."""
        config = MergeConfig.model_validate({"op": "merge", "grouping": "router", "keep": 4} | settings)
        found = []
        for layer, groups in layers.items():
            made = [Group(g[0], tuple(sorted(g)), (1 / len(g),) * len(g)) for g in groups]
            made.sort(key=lambda group: group.dominant)
            found.append(MergedLayer(layer, NUM_EXPERTS, tuple(made), (0.0,) * NUM_EXPERTS, (), ranks or {}))
        return MergePlan(config, tuple(found))

    def apply(self, name: str, plan: MergePlan) -> Ledger:
        return self.rewrite(name, MergeChange(plan, TOKENS, batch_size=2))

    def source_error(self, name: str) -> float:
        """Largest difference between the logits that the apply sweep gave and the source's own."""
        model = AutoModelForCausalLM.from_pretrained(self.folder / "source", dtype=torch.float32).eval()
        return self.probe_error(model, name)


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


def groups(case: Case) -> list[list[int]]:
    """Four groups, with the dominant expert first, inside the family's routing groups."""
    half = [[1, 0], [2, 3]] if routing_groups(case.source.config) > 1 else [[2, 0, 3], [1]]
    return [*half, [5, 4], [7, 6]]


def everywhere(case: Case) -> dict[int, list[list[int]]]:
    return {layer: groups(case) for layer in case.stream.moe_layers}


def shuffled(case: Case, folder: Path) -> Case:
    """The same family with experts that differ from the dominant ones of `groups` by the order of neurons alone."""
    twin = Case.__new__(Case)
    twin.name, twin.folder = case.name, folder
    model = tiny_model(tiny_config(case.name))
    generator = torch.Generator().manual_seed(5)
    for layer in case.stream.moe_layers.values():
        experts: Any = model.get_submodule(layer.experts_name)
        for group in groups(case):
            for member in group[1:]:
                order = torch.randperm(width(experts), generator=generator)
                permute(experts, group[0], member, order)
    twin.model = model
    save(model, folder / "source")
    return twin


def width(experts: Any) -> int:
    """Neurons of an expert."""
    return int(experts.down_proj.shape[1 if experts.is_transposed else 2])


def permute(experts: Any, source: int, target: int, order: Tensor) -> None:
    """Write expert `source` over `target` with its neurons in another order, straight into the fused tensors."""
    interleaved = torch.stack([2 * order, 2 * order + 1], dim=1).flatten()
    rows = order
    if experts.has_gate:
        rows = torch.cat([order, order + width(experts)]) if experts.is_concatenated else interleaved
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    with torch.no_grad():
        wide, down = getattr(experts, first), experts.down_proj
        wide[target] = wide[source][:, rows] if experts.is_transposed else wide[source][rows]
        down[target] = down[source][order] if experts.is_transposed else down[source][:, order]
        if experts.has_bias:
            getattr(experts, f"{first}_bias")[target] = getattr(experts, f"{first}_bias")[source][rows]
            experts.down_proj_bias[target] = experts.down_proj_bias[source]


def test_reduced_routers(case: Case) -> None:
    """Half the experts; the router's rows are those of the dominant ones; the reload gives the sweep's logits."""
    plan = case.plan(everywhere(case), align="weights")
    ledger = case.apply("reduced", plan)
    after = stored(case.folder / "reduced")
    assert {name: found[:2] for name, found in after.items()} == ledger.expected
    model = case.load("reduced")
    assert not type(model).__name__.startswith("Compressed")
    assert case.probe_error(model, "reduced") < TOLERANCE
    stream = LayerStream(open_checkpoint(str(case.folder / "reduced")))
    for layer, moe in case.stream.moe_layers.items():
        before, found = take_layer(case.stream, layer), take_layer(stream, layer)
        for name, (tensor, dimension) in moe.router_tensors().items():
            path = f"{moe.block_path}.{name}".lstrip(".")
            rows = [*sorted(group[0] for group in groups(case)), *range(NUM_EXPERTS, tensor.shape[dimension])]
            expected = before[path].index_select(dimension, torch.tensor(rows))
            assert torch.equal(found[path], expected), name


@pytest.mark.parametrize("align", ["weights", "activations"])
def test_experts_that_differ_by_the_order_of_neurons(case: Case, align: str, tmp_path: Path) -> None:
    """Merged with kept routers they give the source's logits; without alignment they do not."""
    twin = shuffled(case, tmp_path)
    twin.apply("kept", twin.plan(everywhere(case), align=align, router="keep"))
    model = twin.load("kept")
    assert type(model).__name__.startswith("Compressed")
    assert twin.probe_error(model, "kept") < TOLERANCE
    rounding = 0.02  # the averages of equal numbers are those numbers, to the last bit of the type they are stored in
    assert twin.source_error("kept") < rounding
    if align == "weights":
        twin.apply("scrambled", twin.plan(everywhere(case), align=False, router="keep"))
        assert twin.probe_error(twin.load("scrambled"), "scrambled") < TOLERANCE
        assert twin.source_error("scrambled") > 2 * rounding


def test_constants_in_place_of_dropped_experts(case: Case) -> None:
    """What the calibration tokens gave on average, for experts whose router rows stay."""
    keep = (0, 3, 6)
    rng = np.random.default_rng(0)
    layers, measured = [], []
    for layer, moe in case.stream.moe_layers.items():
        layers.append(LayerPlan(layer, NUM_EXPERTS, keep, (0.0,) * NUM_EXPERTS, ()))
        tokens = rng.integers(1, 9, NUM_EXPERTS).astype(float)
        statistics = {"tokens": tokens, "output_sum": rng.normal(size=(NUM_EXPERTS, moe.width))}
        measured.append(LayerScores(layer, NUM_EXPERTS, moe.top_k, 40, 0.9, statistics))
    config = PruneConfig(op="prune", criterion="mone", keep=3, replace="constant")
    ledger = case.rewrite("constants", PruneChange(PrunePlan(config, tuple(layers)), Scores(measured, {})))
    after = stored(case.folder / "constants")
    assert {name: found[:2] for name, found in after.items()} == ledger.expected
    model = case.load("constants")
    assert case.probe_error(model, "constants") < TOLERANCE
    for scores in measured:
        moe = case.stream.moe_layers[scores.layer]
        experts: Any = model.get_submodule(moe.experts_name)
        dropped = [expert for expert in range(NUM_EXPERTS) if expert not in keep]
        expected = scores.statistics["output_sum"][dropped] / scores.statistics["tokens"][dropped, None]
        np.testing.assert_allclose(experts.constants.detach().numpy(), expected, rtol=1e-2)
        before = take_layer(case.stream, scores.layer)
        for name in moe.router_tensors():
            path = f"{moe.block_path}.{name}".lstrip(".")
            found = model.get_submodule(moe.block_name).state_dict()[name]
            assert torch.equal(found.float(), before[path].float()), name


def test_differences(case: Case) -> None:
    """At full rank nothing is lost but the rounding of the factors; at a small one the reload still agrees."""
    moe = next(iter(case.stream.moe_layers.values()))
    whole = dict.fromkeys(["gate_proj", "up_proj", "down_proj"], min(width(moe.experts), moe.width))
    if not moe.experts.has_gate:
        del whole["gate_proj"]
    small = dict.fromkeys(whole, 3)
    errors = {}
    for name, ranks in (("whole", whole), ("small", small)):
        plan = case.plan(everywhere(case), ranks, keep_differences={"rank": 1})
        ledger = case.apply(name, plan)
        assert {key: found[:2] for key, found in stored(case.folder / name).items()} == ledger.expected
        assert case.probe_error(case.load(name), name) < TOLERANCE
        errors[name] = case.source_error(name)
    assert errors["whole"] < 0.2 * errors["small"]


def tie_plan(case: Case, rank: int, **settings: Any) -> TiePlan:
    """The first two MoE layers share a bank; expert e of the second one has place (3 e + 1) mod 8 in it."""
    layers = list(case.stream.moe_layers)[:2]
    moe = case.stream.moe_layers[layers[0]]
    parts = ["gate_proj", "up_proj", "down_proj"] if moe.experts.has_gate else ["up_proj", "down_proj"]
    slots = tuple((3 * expert + 1) % NUM_EXPERTS for expert in range(NUM_EXPERTS))
    half = (0.5,) * NUM_EXPERTS
    tied = (TiedLayer(layers[0], tuple(range(NUM_EXPERTS)), half), TiedLayer(layers[1], slots, half))
    config = TieConfig.model_validate({"op": "tie", "residual_rank": rank} | settings)
    ranks = dict.fromkeys(parts, min(rank, width(moe.experts), moe.width)) if rank else {}
    return TiePlan(config, (TiedGroup(NUM_EXPERTS, tied, ranks),), len(case.stream.moe_layers))


def tie(case: Case, name: str, plan: TiePlan) -> Path:
    """Write a tied checkpoint and, as `name` with `-stock`, the dense one that it stands for."""
    folder = case.folder / f"{name}-work"
    (folder / "samples").mkdir(parents=True)
    for tied in plan.groups[0].layers:
        moe = case.stream.moe_layers[tied.layer]
        sampled = ExpertSamples(moe, folder / "samples", limit=16)
        generator = torch.Generator().manual_seed(tied.layer)
        for expert in range(NUM_EXPERTS):
            rows = torch.randn(12, moe.width, generator=generator)
            sampled.add(expert, rows, rows, torch.rand(12, generator=generator), torch.ones(12))
        sampled.measure()
    with SilentProgress().stage(name, 1) as stage:
        make_banks(plan, LayerStream(case.source), folder / "samples", folder / "banks", stage)
    ledger = case.rewrite(name, TieChange(plan, folder / "banks", TOKENS, batch_size=2))
    assert {key: found[:2] for key, found in stored(case.folder / name).items()} == ledger.expected
    expand = ExpandChange(LayerStream(open_rewritten(case.folder / name, case.source)))
    case.rewrite(f"{name}-stock", expand)
    return case.folder / name


@pytest.mark.parametrize("rank", [0, 3])
def test_tied_layers(case: Case, rank: int) -> None:
    """One bank on disk and in memory; the reload gives the sweep's logits, and so does the expanded checkpoint."""
    if len(case.stream.moe_layers) < 2 or unlike(case):
        pytest.skip("no two MoE layers of equal shapes")
    name = f"tied-{rank}"
    plan = tie_plan(case, rank, fit="closed_form")
    tie(case, name, plan)
    model = case.load(name)
    assert case.probe_error(model, name) < TOLERANCE
    leader, follower = (case.stream.moe_layers[tied.layer] for tied in plan.groups[0].layers)
    first, second = (model.get_submodule(moe.experts_name) for moe in (leader, follower))
    for tensor in leader.expert_tensors():
        leaf = tensor.rpartition(".")[2]
        assert first.get_parameter(leaf).data_ptr() == second.get_parameter(leaf).data_ptr(), leaf
    names = stored(case.folder / name)
    assert not [key for key in names if key.startswith(f"{follower.experts_name}.") and "differences" not in key]
    expanded = case.load(f"{name}-stock")
    assert not type(expanded).__name__.startswith("Compressed")
    assert rank or case.probe_error(expanded, name) < TOLERANCE  # differences are rounded once more
    for moe in (leader, follower):
        banked, dense = (model.get_submodule(moe.experts_name) for model in (model, expanded))
        for expert in range(NUM_EXPERTS):
            expected = routed_expert(banked, expert) if hasattr(banked, "bank") else read_expert(banked, expert)
            found = read_expert(dense, expert)
            torch.testing.assert_close(found.rows_FD, expected.rows_FD, rtol=0.01, atol=0.01)
    source = AutoModelForCausalLM.from_pretrained(case.folder / "source", dtype=torch.float32)
    original = dict(source.named_parameters())
    own = tuple(f"{moe.experts_name}." for moe in (leader, follower))
    for key, tensor in model.named_parameters():
        assert key.startswith(own) or torch.equal(tensor, original[key]), key


def unlike(case: Case) -> bool:
    """Whether the first two MoE layers have experts of different shapes."""
    one, other = list(case.stream.moe_layers.values())[:2]
    return [t.shape for t in one.expert_tensors().values()] != [t.shape for t in other.expert_tensors().values()]


def test_layers_with_the_same_experts_in_another_order(case: Case, tmp_path: Path) -> None:
    """Tied without loss, wherever the experts and their neurons are."""
    if len(case.stream.moe_layers) < 2 or unlike(case):
        pytest.skip("no two MoE layers of equal shapes")
    twin = Case.__new__(Case)
    twin.name, twin.folder = case.name, tmp_path
    model = tiny_model(tiny_config(case.name))
    plan = tie_plan(case, 0, fit="average", align="weights")
    generator = torch.Generator().manual_seed(3)
    leader, follower = (
        model.get_submodule(case.stream.moe_layers[tied.layer].experts_name) for tied in plan.groups[0].layers
    )
    for expert, slot in enumerate(plan.groups[0].layers[1].slots):
        order = torch.randperm(width(leader), generator=generator)
        for name, tensor in leader.named_parameters(recurse=False):
            follower.get_parameter(name).data[expert] = tensor.data[slot]
        permute(follower, expert, expert, order)
    save(model, tmp_path / "source")
    tie(twin, "tied", plan)
    assert twin.probe_error(twin.load("tied"), "tied") < TOLERANCE
    assert twin.source_error("tied") < 0.02
