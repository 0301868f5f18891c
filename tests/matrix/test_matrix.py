"""Every family goes through the identity, the calibration sweep and a prune; plain transformers is the judge.

What counts experts is not asked of our own code: a pruned model's shapes, as plain transformers builds them from the
pruned configuration, say which tensors must have shrunk, and the source's rows say to what.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_compress.calibrate.scores import Scores
from moe_compress.calibrate.sweep import collect
from moe_compress.checkpoint.rewrite import Change
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.compress.prune.apply import PruneChange
from moe_compress.compress.prune.config import PruneConfig
from moe_compress.compress.prune.plan import PrunePlan, plan_prune
from moe_compress.errors import ResumeError
from moe_compress.models.layers import is_experts_module, routing_groups
from moe_compress.progress import SilentProgress
from tests.matrix.case import FamilyCase, load_eager
from tests.matrix.families import FAMILIES, NUM_EXPERTS, NUM_LAYERS, model_class

KEPT = 6
RESTARTED = {"inkling2"}  # families whose layers hand on more than they return
TOLERANCE = 1e-4  # of logits, relative to their spread
TOKENS = torch.randint(3, 100, (3, 24), generator=torch.Generator().manual_seed(1))


class Case(FamilyCase):
    """What pruning makes of one family's checkpoint, each thing once."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name, folder)
        self.strangers = add_strangers(folder / "source")

    def load(self, name: str, **settings: Any) -> PreTrainedModel:
        return load_eager(self.name, self.folder / name)

    @cached_property
    def plain(self) -> PreTrainedModel:
        return self.load("source")

    @cached_property
    def scores(self) -> Scores:
        with SilentProgress().stage("score", NUM_LAYERS) as stage:
            return collect(
                LayerStream(self.source), TOKENS, batch_size=2, folder=self.folder / "scores", fingerprint={},
                min_tokens_per_expert=1, stage=stage,
            )  # fmt: skip

    @cached_property
    def plan(self) -> PrunePlan:
        config = PruneConfig(op="prune", criterion="reap", keep=KEPT, protect_super_experts=False)
        text: Any = self.source.config.get_text_config()
        return plan_prune(
            config, self.scores, num_decoder_layers=NUM_LAYERS, num_groups=routing_groups(self.source.config),
            groups_per_token=getattr(text, "topk_group", None),
        )  # fmt: skip

    @cached_property
    def identity(self) -> Path:
        return self.written("identity", Change())

    @cached_property
    def pruned(self) -> Path:
        return self.written("pruned", PruneChange(self.plan))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    yield Case(request.param, tmp_path_factory.mktemp(request.param))


# -------------------------------------------------------------------------------------------------------------- helpers


def add_strangers(folder: Path) -> dict[str, Tensor]:
    """Add tensors the model does not know: a decoder layer beyond the last (as prediction heads are kept), a buffer."""
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    last = re.compile(rf"(\blayers\.){NUM_LAYERS - 1}\.")
    names = [name for name in index["weight_map"] if last.search(name) and "vision" not in name and "audio" not in name]
    strangers = {last.sub(rf"\g<1>{NUM_LAYERS}.", name): torch.randn(3, 5) for name in names}
    prefix = names[0][: last.search(names[0]).start()]  # type: ignore[union-attr]
    strangers |= {f"{prefix}layers.{NUM_LAYERS}.eh_proj.weight": torch.randn(4, 8).bfloat16()}
    strangers |= {f"{prefix}layers.0.self_attn.rotary_emb.inv_freq": torch.randn(4), "step": torch.tensor(7)}
    save_file(strangers, folder / "strangers.safetensors")
    index["weight_map"] |= dict.fromkeys(strangers, "strangers.safetensors")
    index_file.write_text(json.dumps(index))
    return strangers


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor on disk: dtype, shape and bytes by name."""
    return {
        name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for file in folder.glob("*.safetensors")
        for name, entry in safetensors.deserialize(file.read_bytes())
    }


def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


def own_routing(model: PreTrainedModel) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Tokens and gate sums per expert, by layer, as the model's own experts modules are called.

    Three families scale the experts' sum in the block instead of the gate values in the router.
    """
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    hooks = []
    language_model = set(model.get_decoder().modules())
    for name, module in model.named_modules():
        if module in language_model and is_experts_module(module):
            layer = int(re.findall(r"\.layers\.(\d+)\.", name)[-1])
            counts, gates = found[layer] = np.zeros(NUM_EXPERTS), np.zeros(NUM_EXPERTS)
            scale = getattr(model.get_submodule(name.rpartition(".")[0]), "routed_scaling_factor", 1.0)

            def hook(
                module: Any,
                inputs: Any,
                kwargs: Any,
                counts: np.ndarray = counts,
                gates: np.ndarray = gates,
                scale: float = scale,
            ) -> None:
                _, index, weight = (*inputs, *kwargs.values())
                np.add.at(gates, index.flatten().numpy(), scale * weight.double().flatten().numpy())
                np.add.at(counts, index.flatten().numpy(), (weight != 0).double().flatten().numpy())

            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    logits(model, TOKENS)
    for handle in hooks:
        handle.remove()
    return found


def wrong_tensors(source: PreTrainedModel, pruned: PreTrainedModel, plan: PrunePlan) -> list[str]:
    """The tensors of a pruned model that are not exactly the source's, less what the plan drops."""
    keep = {layer.layer: torch.tensor(layer.keep) for layer in plan.layers}
    before, after = source.state_dict(), pruned.state_dict()
    wrong = sorted(set(before) ^ set(after))
    shrunk = set()
    for name in set(before) & set(after):
        expected = before[name]
        grown = [dim for dim, size in enumerate(after[name].shape) if size != expected.shape[dim]]
        if grown:
            layer = int(re.findall(r"\.layers\.(\d+)\.", name)[-1])
            shrunk.add(layer)
            tail = torch.arange(NUM_EXPERTS, expected.shape[grown[0]])
            expected = expected.index_select(grown[0], torch.cat([keep[layer], tail]))
        if not torch.equal(after[name], expected):
            wrong.append(name)
    assert shrunk == set(keep), "the plan's layers are the MoE layers"
    return wrong


# ---------------------------------------------------------------------------------------------------------------- tests


def test_identity_returns_every_tensor(case: Case) -> None:
    before, after = stored(case.folder / "source"), stored(case.identity)
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == []
    assert set(case.strangers) <= set(after), "also what the model does not know"
    assert (case.identity / "config.json").read_bytes() == (case.folder / "source/config.json").read_bytes()
    assert case.probe_error(case.plain, "identity") < TOLERANCE
    assert torch.equal(logits(case.load("identity"), TOKENS), logits(case.plain, TOKENS))


def test_calibration_sees_the_models_own_routing(case: Case) -> None:
    own = own_routing(case.plain)
    assert [scores.layer for scores in case.scores.layers] == sorted(own)
    for scores in case.scores.layers:
        counts, gates = own[scores.layer]
        assert scores.num_tokens == TOKENS.numel()
        np.testing.assert_array_equal(scores.statistics["tokens"], counts)
        np.testing.assert_allclose(scores.statistics["gate_sum"], gates, rtol=1e-4, atol=1e-4)
        assert all(np.isfinite(values).all() for values in scores.statistics.values())
        assert scores.statistics["easy_ep"].sum() > 0


def test_prune_keeps_exactly_the_planned_experts(case: Case) -> None:
    before, after = stored(case.folder / "source"), stored(case.pruned)
    assert {name: before[name] for name in case.strangers} == {name: after[name] for name in case.strangers}
    assert all(after[name][0] == before[name][0] for name in after), "types stay"
    assert all(len(layer.keep) == KEPT for layer in case.plan.layers)
    pruned = case.load("pruned")
    assert wrong_tensors(case.plain, pruned, case.plan) == []
    assert case.probe_error(pruned, "pruned") < TOLERANCE
    assert not torch.allclose(logits(pruned, TOKENS), logits(case.plain, TOKENS)), "experts matter to these models"


def test_a_wrong_router_row_is_noticed(case: Case) -> None:
    """First two rows of one router tensor change places, then every router's rows move on by one."""
    assert case.pruned
    pruned, sizes = case.load("pruned"), {name: tensor.shape for name, tensor in case.plain.state_dict().items()}
    state = pruned.state_dict()
    router = [name for name in state if state[name].shape != sizes[name] and ".experts." not in name]
    layers = {re.findall(r"\.layers\.(\d+)\.", name)[-1] for name in router}
    assert len(layers) == len(case.plan.layers), "every MoE layer has a router"
    for name in router:
        right, dimension = state[name].clone(), int(state[name].shape[0] < KEPT)
        state[name].copy_(right.index_select(dimension, torch.tensor([1, 0, *range(2, right.shape[dimension])])))
        assert wrong_tensors(case.plain, pruned, case.plan) == [name]
        state[name].copy_(right)
    for name in router:
        state[name].copy_(state[name].roll(1, int(state[name].shape[0] < KEPT)))
    assert case.probe_error(pruned, "pruned") > TOLERANCE


class Interrupting:
    """A stage that stops the run before its last layer."""

    def __init__(self) -> None:
        self.done = 0

    def advance(self, detail: str = "") -> None:
        self.done += 1
        if self.done == NUM_LAYERS - 1:
            raise KeyboardInterrupt


def test_interrupted_run_ends_the_same_or_says_it_cannot_go_on(case: Case) -> None:
    with pytest.raises(KeyboardInterrupt):
        case.rewrite("resumed", Change(), Interrupting())
    if case.name in RESTARTED:
        with pytest.raises(ResumeError, match="start over"):
            case.rewrite("resumed", Change())
        return
    case.rewrite("resumed", Change())
    assert stored(case.folder / "resumed") == stored(case.identity)
    assert (case.folder / "resumed/probe.npz").read_bytes() == (case.identity / "probe.npz").read_bytes()


def test_the_page_on_architectures_says_so(case: Case) -> None:
    page = (Path(__file__).parents[2] / "docs/architectures.md").read_text()
    rows = {cells[1].strip("` "): cells for cells in (line.split("|") for line in page.splitlines()) if len(cells) == 6}
    supported = [name for name in rows if name in CONFIG_MAPPING]
    assert supported == sorted(FAMILIES)
    assert f"The {len(FAMILIES)} families" in page
    _, _, architecture, tensors, _, _ = rows[case.name]
    assert architecture.strip() == model_class(case.source.config).__name__
    layers = LayerStream(case.source).moe_layers.values()
    assert {frozenset(re.findall("`(.+?)`", tensors))} == {frozenset(layer.router_tensors()) for layer in layers}
