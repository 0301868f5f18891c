"""Every family with zero experts, fewer slots and skipped slots; the family's own eager code is the judge.

The experts of a layer are compared with a loop in float64 over tokens and slots, each of which runs one expert of the
family's own module. What a router picks is not asked of ours: with another top-k it is that of a plain model that has
this top-k in its configuration, and without zero experts it is the original to the last bit.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from moe_compress.checkpoint.config_file import with_setting
from moe_compress.checkpoint.rewrite import Change
from moe_compress.checkpoint.stream import TORCH_DTYPES
from moe_compress.compress.distill.balance import num_rows
from moe_compress.compress.zero_experts.apply import ZeroExpertsChange
from moe_compress.compress.zero_experts.config import ZeroExpertsConfig
from moe_compress.compress.zero_experts.plan import LayerFacts, plan_zero_experts
from moe_compress.errors import UnsupportedModelError
from moe_compress.models.families import TOP_K_KEYS
from moe_compress.models.layers import MoELayer, divides_gates, find_moe_layers, routing_groups
from moe_compress.runtime.families import with_layers
from moe_compress.runtime.trace import RoutingTrace, replayed
from moe_compress.runtime.zero_experts import use_zero_experts
from tests.matrix.case import FamilyCase, probe_error
from tests.matrix.families import FAMILIES, NUM_EXPERTS
from tests.matrix.test_quantized import NOT_CAUSAL

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4  # of logits and outputs, relative to their spread
TOKENS = torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(1))
CAUSAL = [name for name in FAMILIES if name not in NOT_CAUSAL]
PICKS = 3  # experts per token of routers that pick more than their own
# In a tiny ZAYA, whose tokens are all alike to the router, one expert takes them all: here a zero expert in some layer.
SEEDS = {"zaya": 2}
FIXED_TOP_K = {"phimoe", "zaya"}  # routers whose code allows one top-k only
# Tiny models of these families have no layer of full attention, and transformers' cache asks for one.
WITHOUT_ATTENTION = {"bailing_hybrid", "jamba", "kimi_linear"}
OWN_CACHE = {"minimax"}  # the original itself gives other tokens with its cache
# Families whose MoE layers, or some of them, have no attention of their own, or none with a map of all tokens.
WITHOUT_MAPS = {
    "bailing_hybrid", "deepseek_v4", "granitemoehybrid", "jamba", "kimi_linear", "lfm2_moe", "minimax", "nemotron_h",
    "qwen3_5_moe_text", "qwen3_next",
}  # fmt: skip
# How routers score, as read in their code; the others take a softmax.
SIGMOID = {
    "afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "deepseek_v3", "deepseek_v32", "dots1",
    "exaone_moe", "flint", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "hy_v3", "hy_v4", "kimi_linear", "kolibri1",
    "laguna", "lfm2_moe", "mimo_v2_flash", "minimax_m2", "nemotron_h", "solar_open",
}  # fmt: skip


class Sections(Change):
    """Changes nothing but the entries of the layers."""

    def __init__(self, entries: dict[int, dict[str, Any]]) -> None:
        self.entries = entries

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        return with_layers(config, NUM_EXPERTS, self.entries)


class Case(FamilyCase):
    """What skipping makes of one family's checkpoint, each thing once."""

    @property
    def own_top_k(self) -> int:
        return next(iter(self.stream.moe_layers.values())).top_k

    @cached_property
    def zero(self) -> Path:
        """Half as many zero experts as experts."""
        facts = [LayerFacts(moe.layer, moe.num_experts, moe.top_k) for moe in self.stream.moe_layers.values()]
        config = ZeroExpertsConfig(op="zero_experts", seed=SEEDS.get(self.name, 0))
        plan = plan_zero_experts(config, facts, routing_groups(self.source.config))
        dtypes = {name: TORCH_DTYPES[dtype] for name, dtype in self.stream.stored_dtypes.items()}
        return self.written("zero", ZeroExpertsChange(plan, dtypes))

    @cached_property
    def mixed(self) -> Path:
        """Another departure in every MoE layer in turn."""
        picks = self.own_top_k if self.name in FIXED_TOP_K else PICKS
        entries: list[dict[str, Any]] = [
            {"top_k": 1, "normalise_over": picks, "skip": {"threshold": 0.7}},
            {"top_k": max(1, picks - 1), "normalise_over": picks},
            {"skip": {"threshold": 0.8, "renormalise": True}},
        ]
        layers = self.stream.moe_layers
        return self.written("mixed", Sections({layer: entries[n % 3] for n, layer in enumerate(layers)}))

    def load(self, name: str, **settings: Any) -> PreTrainedModel:
        return aligned(super().load(name, **settings))

    @cached_property
    def plain(self) -> PreTrainedModel:
        return self.load("source")

    def with_top_k(self, count: int) -> PreTrainedModel:
        """The plain model whose configuration has this top-k."""
        file = self.folder / "source/config.json"
        content = json.loads(file.read_text())
        try:
            file.write_text(json.dumps(with_setting(content, TOP_K_KEYS, self.own_top_k, count)))
            return self.load("source")
        finally:
            file.write_text(json.dumps(content, indent=2))


@pytest.fixture(params=CAUSAL)
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


# -------------------------------------------------------------------------------------------------------------- helpers


def aligned(model: PreTrainedModel) -> PreTrainedModel:
    """The model with weights in memory of its own: where a tensor begins in a file decides a product's last bits."""
    for tensor in model.state_dict(keep_vars=True).values():
        tensor.data = tensor.data.clone()
    return model


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return found


def stored(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        found |= load_file(shard)
    return found


def generated(model: Any) -> list[list[int]]:
    """Greedy tokens after two prompts, with the cache."""
    with torch.no_grad():
        tokens = model.generate(TOKENS[:, :3], max_new_tokens=5, min_new_tokens=5, do_sample=False)
    return tokens.tolist()  # type: ignore[no-any-return]


def greedy(model: Any) -> list[list[int]]:
    """The same, every token from the whole sequence before it; the end token is not allowed."""
    tokens = TOKENS[:, :3]
    for _ in range(5):
        with torch.no_grad():
            last = model(input_ids=tokens, use_cache=False).logits[:, -1]
        last[:, model.generation_config.eos_token_id] = -torch.inf
        tokens = torch.cat([tokens, last.argmax(dim=-1, keepdim=True)], dim=1)
    return tokens.tolist()


def calls(model: PreTrainedModel) -> dict[int, dict[str, Tensor]]:
    """Of each MoE layer: what the router picked, what came to the experts, and what came out of them."""
    seen: dict[int, dict[str, Tensor]] = {}
    hooks = []
    for moe in find_moe_layers(model):
        found = seen[moe.layer] = {}

        def before(
            module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], found: dict[str, Tensor] = found
        ) -> None:
            found["hidden"], found["index"], found["gate"] = (*args, *kwargs.values())

        def after(module: Any, args: Any, output: Tensor, found: dict[str, Tensor] = found) -> None:
            found["output"] = output

        hooks.append(moe.experts.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        hooks.append(moe.experts.register_forward_hook(after))
    logits(model)
    for hook in hooks:
        hook.remove()
    return {layer: {name: tensor.detach() for name, tensor in found.items()} for layer, found in seen.items()}


def one_by_one(experts: Any, hidden: Tensor, slots: list[list[tuple[int, float]]]) -> Tensor:
    """The sum over each token's (expert, gate value) of the family's own expert, in float64."""
    own = copy.deepcopy(experts).double()
    own.config = copy.copy(own.config)
    own.config._experts_implementation = "eager"
    own._forward_pre_hooks.clear()
    own.requires_grad_(False)
    own.__class__ = next(base for base in type(experts).__mro__ if base.__module__.startswith("transformers."))
    outputs = torch.zeros(hidden.shape, dtype=torch.float64)
    for token, chosen in enumerate(slots):
        for expert, gate in chosen:
            alone = own(hidden[token : token + 1].double(), torch.tensor([[expert]]), torch.ones(1, 1).double())
            outputs[token] += gate * alone[0]
    return outputs


def rows_of_experts(zeros: int, groups: int) -> list[int]:
    """Where the routed experts' rows are when every group of the router ends with its zero experts."""
    size = (NUM_EXPERTS + zeros) // groups
    return [row for row in range(NUM_EXPERTS + zeros) if row % size < NUM_EXPERTS // groups]


def ruled(entry: dict[str, Any], index: list[int], gate: list[float]) -> list[tuple[int, float]]:
    """The slots of a token that run, by the formulas."""
    slots = [(expert, value) for expert, value in zip(index, gate, strict=True) if value != 0 and expert < NUM_EXPERTS]
    if "top_k" in entry:
        slots = sorted(slots, key=lambda slot: -slot[1])[: entry["top_k"]]
    if "skip" in entry:
        largest, before = max(value for _, value in slots), sum(value for _, value in slots)
        slots = [slot for slot in slots if slot[1] >= entry["skip"]["threshold"] * largest]
        if entry["skip"].get("renormalise"):
            after = sum(value for _, value in slots)
            slots = [(expert, value * before / after) for expert, value in slots]
    return slots


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).abs().max()) <= TOLERANCE * max(float(expected.std()), 1e-6)


# ---------------------------------------------------------------------------------------------------------------- tests


def test_zero_experts_leave_every_weight_alone(case: Case) -> None:
    before, after = stored(case.folder / "source"), stored(case.zero)
    groups = routing_groups(case.source.config)
    routed = rows_of_experts(NUM_EXPERTS // 2, groups)
    assert before.keys() == after.keys()
    grown = set()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        if after[name].shape != tensor.shape:
            grown.add(name)
            (dimension,) = (d for d, size in enumerate(tensor.shape) if after[name].shape[d] != size)
            tail = range(NUM_EXPERTS + NUM_EXPERTS // 2, after[name].shape[dimension])
            kept = after[name].index_select(dimension, torch.tensor([*routed, *tail]))
            assert torch.equal(kept, tensor), "original rows are bit for bit"
            new = sorted(set(range(after[name].shape[dimension])) - {*routed, *tail})
            drawn = after[name].index_select(dimension, torch.tensor(new)).float()
            assert len(new) == NUM_EXPERTS // 2 and drawn.isfinite().all()
            assert len(drawn.unique()) > 1, "drawn, not filled"
        else:
            assert torch.equal(after[name], tensor)
    per_layer = len(next(iter(case.stream.moe_layers.values())).router_tensors())
    assert len(grown) == per_layer * len(case.stream.moe_layers)


def test_zero_experts_cost_nothing_and_change_no_gate_value(case: Case) -> None:
    """Tokens keep the gate values that the router gave over all slots, those of zero experts included."""
    assert case.zero
    model = case.load("zero")
    assert probe_error(model, case.zero) < TOLERANCE
    groups = routing_groups(model.config)
    number = {row: expert for expert, row in enumerate(rows_of_experts(NUM_EXPERTS // 2, groups))}
    skipped = 0
    for layer, found in calls(model).items():
        slots = [
            [(number[row], value) for row, value in zip(rows, values, strict=True) if row in number and value != 0]
            for rows, values in zip(found["index"].tolist(), found["gate"].tolist(), strict=True)
        ]
        skipped += found["index"].numel() - sum(map(len, slots))
        experts = next(moe.experts for moe in find_moe_layers(model) if moe.layer == layer)
        assert close(found["output"], one_by_one(experts, found["hidden"], slots))
    assert skipped, "some slots went to zero experts"


def test_without_its_zero_experts_it_is_the_original(case: Case) -> None:
    assert case.zero
    original = logits(case.plain)
    off = case.load("zero", use_zero_experts=False)
    assert torch.equal(logits(off), original)
    model = case.load("zero")
    with_zeros = logits(model)
    assert not torch.allclose(with_zeros, original)
    use_zero_experts(model, False)
    assert torch.equal(logits(model), original)
    use_zero_experts(model, True)
    assert torch.equal(logits(model), with_zeros)
    file = case.zero / "config.json"
    content = json.loads(file.read_text())
    assert content["moe_compress"]["use_zero_experts"] is True
    try:
        file.write_text(json.dumps(content | {"moe_compress": content["moe_compress"] | {"use_zero_experts": False}}))
        by_config = case.load("zero")
    finally:
        file.write_text(json.dumps(content))
    assert torch.equal(logits(by_config), original)
    by_config.save_pretrained(case.folder / "off")
    assert stored(case.folder / "off").keys() == stored(case.zero).keys(), "zero experts are saved all the same"
    assert torch.equal(logits(case.load("off")), original)
    assert torch.equal(logits(case.load("off", use_zero_experts=True)), with_zeros)


def test_fewer_slots_and_gate_ratios(case: Case) -> None:
    """Routers pick what a plain model with this top-k picks; of that, what the formulas say runs."""
    assert case.mixed
    model = case.load("mixed")
    assert probe_error(model, case.mixed) < TOLERANCE
    entries = json.loads((case.mixed / "config.json").read_text())["moe_compress"]["layers"]
    picks = case.own_top_k if case.name in FIXED_TOP_K else PICKS
    plain = calls(case.with_top_k(picks))
    first = min(plain)
    found = calls(model)
    for name in ("index", "gate"):
        assert torch.equal(found[first][name], plain[first][name]), "the first layer sees the same"
    skipped = 0
    for moe in find_moe_layers(model):
        seen, entry = found[moe.layer], entries[str(moe.layer)]
        assert seen["index"].shape[1] == moe.top_k == entry.get("normalise_over", case.own_top_k)
        picked = zip(seen["index"].tolist(), seen["gate"].tolist(), strict=True)
        slots = [ruled(entry, index, gate) for index, gate in picked]
        skipped += seen["index"].numel() - sum(map(len, slots))
        assert close(seen["output"], one_by_one(moe.experts, seen["hidden"], slots))
    assert skipped or case.own_top_k == 1


def test_greedy_output_is_the_same_with_and_without_cache(case: Case) -> None:
    assert case.zero and case.mixed
    if case.name in WITHOUT_ATTENTION:
        with pytest.raises(ValueError, match="get_seq_length"):
            generated(case.plain)
        return
    if case.name in OWN_CACHE:
        assert generated(case.plain) != greedy(case.plain)
        return
    for name in ("zero", "mixed"):
        model = case.load(name)
        assert generated(model) == greedy(model)


def test_routing_is_traced_and_replayed(case: Case) -> None:
    assert case.zero
    model = case.load("zero")
    layers = find_moe_layers(model)
    with RoutingTrace(layers) as trace:
        expected = logits(model)
    rows = {moe.layer: trace.last(moe.layer).row_TK for moe in layers}
    if case.name == "phimoe":
        with pytest.raises(UnsupportedModelError, match="cannot be replayed"), replayed(layers, rows):
            logits(model)
        assert torch.equal(logits(model), expected)
        return
    with replayed(layers, rows):
        assert close(logits(model), expected)
    others = {layer: (found + 5) % (NUM_EXPERTS + NUM_EXPERTS // 2) for layer, found in rows.items()}
    with RoutingTrace(layers) as again, replayed(layers, others):
        replay = logits(model)
    assert not torch.allclose(replay, expected)
    assert torch.equal(logits(model), expected), "the router is its own again"
    for moe in layers:
        check_pass(case.name, moe, trace, again, others[moe.layer])


def check_pass(name: str, moe: MoELayer, trace: RoutingTrace, again: RoutingTrace, rows: Tensor) -> None:
    """The probabilities are those of the router's kind, and gate values of replayed rows are their scores."""
    found, replay = trace.last(moe.layer), again.last(moe.layer)
    assert found.probability_TR.shape[1] - NUM_EXPERTS - NUM_EXPERTS // 2 in (0, 1)
    assert num_rows(moe) == found.probability_TR.shape[1]
    np.testing.assert_allclose(found.probability_TR.sum(dim=1), 1, rtol=1e-5)
    if name == "gemma4":  # its router hands out probabilities
        scores = found.logits_TR.double()
    elif name == "deepseek_v4":
        scores = (1 + found.logits_TR.double().exp()).log().sqrt()
    elif name in SIGMOID:
        scores = 1 / (1 + (-found.logits_TR.double()).exp())
    else:
        scores = found.logits_TR.double().exp()
    np.testing.assert_allclose(found.probability_TR, scores / scores.sum(dim=1, keepdim=True), rtol=1e-4, atol=1e-6)
    runs = replay.gate_TK != 0
    assert torch.equal(replay.row_TK[runs], rows[runs])
    assert torch.equal(found.zero_R[found.row_TK] | (found.gate_TK == 0), found.skipped_TK)
    assert int((~found.zero_R).sum()) == NUM_EXPERTS


@pytest.mark.parametrize("name", [name for name in CAUSAL if name not in FIXED_TOP_K])
def test_which_routers_divide_gate_values_by_their_sum(name: str, cases: dict[str, Case]) -> None:
    """With one expert more picked, the gate values of the others change, or they do not; whatever the settings say."""
    case = cases[name]
    file = case.folder / "source/config.json"
    content = json.loads(file.read_text())
    settings: list[dict[str, Any]] = [{}]
    if "norm_topk_prob" in content:
        settings = [{"norm_topk_prob": True}, {"norm_topk_prob": False}]
    try:
        for changed in settings:
            file.write_text(json.dumps(content | changed))
            model = case.load("source")
            two, three = calls(model), calls(case.with_top_k(PICKS))
            first = min(two)
            same = []
            for token in range(TOKENS.numel()):
                few, many = (
                    dict(zip(seen[first]["index"][token].tolist(), seen[first]["gate"][token].tolist(), strict=True))
                    for seen in (two, three)
                )
                same += [
                    many[expert] == pytest.approx(gate, rel=1e-4) for expert, gate in few.items() if expert in many
                ]
            assert same and all(same) != divides_gates(model.config) and any(same) == all(same)
    finally:
        file.write_text(json.dumps(content, indent=2))


def test_protected_tokens_are_those_with_the_most_attention(case: Case) -> None:
    """By the formula, from the attention maps that the model itself gives out; or a sentence where it has none."""
    entries = {layer: {"skip": {"threshold": 0.95, "protect": 0.1}} for layer in case.stream.moe_layers}
    if case.name in WITHOUT_MAPS:
        with pytest.raises(UnsupportedModelError, match="has no attention map to choose protected tokens by"):
            case.rewrite("protected", Sections(entries))
        return
    model = case.load(case.written("protected", Sections(entries)).name)
    maps: dict[int, Tensor] = {}
    for name, module in model.named_modules():
        if "Attention" in type(module).__name__ and ".layers." in name:

            def note(
                module: Any, args: Any, output: Any, layer: int = int(name.split(".layers.")[1].split(".")[0])
            ) -> None:
                if isinstance(output, tuple) and isinstance(output[1], Tensor):
                    maps[layer] = output[1]

            module.register_forward_hook(note)
    length = TOKENS.shape[1]
    for layer, found in calls(model).items():
        received = torch.zeros(2, length, dtype=torch.float64)
        for token in range(length):
            received[:, token] = maps[layer].double()[:, :, token:, token].sum(dim=2).mean(dim=1) / (length - token)
        importance = received * found["hidden"].double().abs().sum(dim=1).view(2, length)
        chosen = importance.argsort(dim=1, descending=True)[:, :3]  # a tenth of 24 tokens, rounded up
        slots = []
        for token in range(2 * length):
            picked = found["index"][token].tolist(), found["gate"][token].tolist()
            protected = token % length in chosen[token // length]
            slots.append(ruled({} if protected else entries[layer], *picked))
        experts = next(moe.experts for moe in find_moe_layers(model) if moe.layer == layer)
        assert close(found["output"], one_by_one(experts, found["hidden"], slots))


def test_saved_again_and_loaded_in_a_fresh_process(cases: dict[str, Case], tmp_path: Path) -> None:
    """All families in one process that has seen none of them."""
    expected = {}
    for name in CAUSAL:
        case = cases[name]
        assert case.zero and case.mixed
        for kind in ("zero", "mixed"):
            model = case.load(kind)
            folder = case.folder / f"{kind}-saved"
            model.save_pretrained(folder)
            expected[str(folder)] = logits(model)
    torch.save({"tokens": TOKENS, "expected": expected}, tmp_path / "expected.pt")
    line = [sys.executable, "-c", FRESH, str(tmp_path / "expected.pt")]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


FRESH = """
import json, sys, torch
import moe_compress
from transformers import AutoModelForCausalLM
content, wrong = torch.load(sys.argv[1]), []
for folder, expected in content["expected"].items():
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for tensor in model.state_dict(keep_vars=True).values():
        tensor.data = tensor.data.clone()
    with torch.no_grad():
        if not torch.equal(model(input_ids=content["tokens"], use_cache=False).logits, expected):
            wrong.append(folder)
print(json.dumps(wrong))
"""


def test_the_page_on_skipping_says_so() -> None:
    page = " ".join((ROOT / "docs/expert_skipping.md").read_text(encoding="utf-8").split())
    names = ", ".join(f"`{name}`" for name in sorted(WITHOUT_MAPS))
    assert f"or none with a map of all tokens: {names}." in page
    assert "The routers of " + " and ".join(f"`{name}`" for name in sorted(FIXED_TOP_K)) in page
