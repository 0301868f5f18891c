"""Zero experts, fewer and skipped slots from a recipe to a folder; plain transformers and hooks are the judges."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import moe_compress
from moe_compress import pipeline
from moe_compress.calibrate.config import CalibrationConfig
from moe_compress.checkpoint.source import open_checkpoint
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.compress.quantize.sensitivity import ReducedRouters
from moe_compress.compress.scoring import read_calibration
from moe_compress.compress.skip import step as skip_step
from moe_compress.compress.skip.apply import SkipChange
from moe_compress.compress.skip.plan import SkipPlan
from moe_compress.compress.topk import profile as profiles
from moe_compress.compress.topk.config import TopkConfig
from moe_compress.errors import RecipeError, UnsupportedModelError, UsageError, VerificationError
from moe_compress.models.experts import whole_expert
from moe_compress.models.layers import is_experts_module
from moe_compress.progress import SilentProgress
from moe_compress.recipe import load_recipe
from tests.integration.test_run import content, interrupted_at
from tests.tiny_checkpoint import tiny_checkpoint, tiny_recipe

LAYERS, EXPERTS, K = 3, 8, 4
ZERO = {"op": "zero_experts"}
SKIP = {"op": "skip", "target_skip": 0.4}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    return tiny_checkpoint(folder, num_hidden_layers=LAYERS, num_experts_per_tok=K)


def recipe(source: Path, texts: Path, *steps: dict[str, Any], tier: str = "plugin", **settings: Any) -> dict[str, Any]:
    export = {"tier": tier, "max_shard_size": "20KB"}
    return tiny_recipe(source, texts, export=export, **settings) | {"steps": list(steps)}


def opened(folder: Path, **settings: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32} | settings)
    return model.eval()


def calibration_tokens(source: Path, settings: dict[str, Any]) -> Tensor:
    config = open_checkpoint(str(source)).config
    return read_calibration(source, config, CalibrationConfig.model_validate(settings["calibration"])).tokens


def experts_used(model: PreTrainedModel, tokens: Tensor) -> list[float]:
    """Per MoE layer, the mean number of slots that an experts module is called with and that stand for an expert."""
    modules = [module for module in model.modules() if is_experts_module(module)]
    counts = [0] * len(modules)
    for number, module in enumerate(modules):

        def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], number: int = number) -> None:
            _, index, gate = (*args, *kwargs.values())
            counts[number] += int(((index < EXPERTS) & (gate != 0)).sum())

        module.register_forward_pre_hook(count, with_kwargs=True)
    with torch.no_grad():
        for batch in tokens.split(2):
            model(input_ids=batch, use_cache=False)
    return [count / tokens.numel() for count in counts]


def router_choices(folder: Path, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What comes to the experts of the first layer of a plain model, [T, K] each: indices, gate values."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    caught: list[tuple[Tensor, Tensor]] = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(
        lambda module, args, kwargs: caught.append((*args, *kwargs.values())[1:]), with_kwargs=True
    )
    with torch.no_grad():
        for sequence in tokens:
            model(input_ids=sequence[None])
    index_TK, gate_TK = (torch.cat(parts) for parts in zip(*caught, strict=True))
    return index_TK, gate_TK


def layer_entries(folder: Path) -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = json.loads((folder / "config.json").read_text())["moe_compress"]["layers"]
    return entries


# ------------------------------------------------------------------------------------------------------- what OUT holds


def test_zero_experts_from_start_to_finish(source: Path, texts: Path, tmp_path: Path) -> None:
    settings = recipe(source, texts, ZERO)
    report = moe_compress.run(settings, tmp_path / "out")
    assert all(check["passed"] for check in report["checks"].values())
    used = experts_used(opened(tmp_path / "out"), calibration_tokens(source, settings))
    assert [entry["zero_experts"] for entry in layer_entries(tmp_path / "out").values()] == [EXPERTS // 2] * LAYERS
    noted = [entry["experts_per_token"] for entry in layer_entries(tmp_path / "out").values()]
    assert noted == pytest.approx(used) and max(noted) < K
    compressed = report["compressed"]
    assert compressed["experts_per_token_mean"] == pytest.approx(np.mean(used))
    assert report["ratio"]["expert_flops_per_token"] == pytest.approx(np.mean(used) / K)
    (drawn,) = json.loads((tmp_path / "out" / "plan.json").read_text())["steps"][0]["maps"]
    assert [sum(row) for row in drawn["values"].values()] == pytest.approx(used), "an expert's share of the tokens"
    rows = LAYERS * EXPERTS // 2 * 32
    assert compressed["stored_bytes"] - report["baseline"]["stored_bytes"] == 2 * rows, "new rows, in bfloat16"
    assert compressed["total_params"] - report["baseline"]["total_params"] == rows
    for name, tensor in load_all(source).items():
        kept = load_all(tmp_path / "out")[name]
        assert torch.equal(kept[: len(tensor)], tensor)
    original = opened(source)
    with torch.no_grad():
        tokens = calibration_tokens(source, settings)[:2]
        off = opened(tmp_path / "out", use_zero_experts=False)(input_ids=tokens).logits
        torch.testing.assert_close(off, original(input_ids=tokens).logits, rtol=1e-5, atol=1e-5)


def load_all(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        found |= load_file(shard)
    return found


@pytest.mark.parametrize("target", [0.25, 0.5, 0.7])
@pytest.mark.usefixtures("no_reload")
def test_skip_reaches_its_target(target: float, source: Path, texts: Path, tmp_path: Path) -> None:
    settings = recipe(source, texts, SKIP | {"target_skip": target})
    report = moe_compress.run(settings, tmp_path / "out")
    used = experts_used(opened(tmp_path / "out"), calibration_tokens(source, settings))
    assert 1 - np.mean(used) / K == pytest.approx(target, abs=0.05)
    assert report["compressed"]["experts_per_token_mean"] == pytest.approx(np.mean(used))
    assert "slots skipped" in report["checks"]["target"]["detail"]
    (drawn,) = json.loads((tmp_path / "out" / "plan.json").read_text())["steps"][0]["maps"]
    # Nothing is skipped before the first layer, so the original's routing is that of the result.
    index_TK, gate_TK = router_choices(source, calibration_tokens(source, settings))
    threshold = layer_entries(tmp_path / "out")["0"]["skip"]["threshold"]
    skipped_TK = gate_TK < threshold * gate_TK.amax(dim=1, keepdim=True)
    expected = [float(skipped_TK[index_TK == expert].float().mean()) for expert in range(EXPERTS)]
    assert drawn["title"] == "Skip ratio" and drawn["values"]["0"] == pytest.approx(expected, abs=0.02)
    assert max(expected) - min(expected) > 0.05
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Share of the calibration tokens routed to the expert that skip it." in page
    assert report["compressed"]["stored_bytes"] == report["baseline"]["stored_bytes"]


@pytest.mark.usefixtures("no_reload")
def test_a_missed_target_is_said(source: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thresholds are moved between plan and apply."""

    def moved(plan: SkipPlan) -> SkipChange:
        return SkipChange(replace(plan, layers=tuple(replace(layer, threshold=0.999) for layer in plan.layers)))

    monkeypatch.setattr(skip_step, "SkipChange", moved)
    with pytest.raises(VerificationError, match="slots skipped 7"):
        moe_compress.run(recipe(source, texts, SKIP), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fewer_experts_in_plain_transformers(source: Path, texts: Path, tmp_path: Path) -> None:
    """One top-k for all and shares of those that run: only a number in config.json changes."""
    settings = recipe(source, texts, {"op": "topk", "k": 2, "normalise_over": "kept"}, tier="stock")
    report = moe_compress.run(settings, tmp_path / "out")
    assert all(check["passed"] for check in report["checks"].values())
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    assert {key for key in after if after[key] != before.get(key)} == {"num_experts_per_tok"}
    assert after["num_experts_per_tok"] == 2
    stored = load_all(tmp_path / "out")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in load_all(source).items())
    assert report["compressed"]["experts_per_token_mean"] == 2


@pytest.mark.usefixtures("no_reload")
def test_steps_go_together(source: Path, texts: Path, tmp_path: Path) -> None:
    """Zero experts, then fewer experts, then skipping, then bits: every layer's entry has it all."""
    steps = [
        ZERO,
        {"op": "prune", "criterion": "reap", "keep": 0.75, "protect_super_experts": False},
        {"op": "topk", "k": 3},
        {"op": "skip", "threshold": 0.5},
        {"op": "quantize", "method": "rtn", "bits": 4, "group_size": 16, "symmetric": False},
    ]
    moe_compress.run(recipe(source, texts, *steps), tmp_path / "out")
    for entry in layer_entries(tmp_path / "out").values():
        expected = {"num_experts": 6, "zero_experts": 4, "top_k": 3, "normalise_over": K}
        assert {key: entry[key] for key in expected} == expected
        assert entry["skip"]["threshold"] == 0.5 and 0 < entry["experts_per_token"] < 3
    tokens = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
    outputs = []
    for settings in ({}, {"dequantize": True}):
        model: Any = opened(tmp_path / "out", **settings)
        with torch.no_grad():
            outputs.append(model(input_ids=tokens, use_cache=False).logits)
            generated = model.generate(tokens, max_new_tokens=4, do_sample=False)
        assert generated.shape == (2, 16)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------------------------- profile


def perplexity(model: PreTrainedModel, tokens: Tensor, counts: tuple[int, ...], over: str) -> float:
    """With so many experts in each layer, by hooks in a plain model of the Qwen3 family, whose gate values sum to 1."""
    modules = [module for module in model.modules() if is_experts_module(module)]
    hooks = []
    for module, count in zip(modules, counts, strict=True):

        def reduce(module: Any, args: tuple[Any, ...], count: int = count) -> tuple[Any, ...]:
            hidden, index, gate = args
            smallest = gate.sort(dim=1, descending=True).values[:, count - 1 : count]
            gate = torch.where(gate >= smallest, gate, 0)
            return hidden, index, gate / gate.sum(dim=1, keepdim=True) if over == "kept" else gate

        hooks.append(module.register_forward_pre_hook(reduce))
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits.double()
    for hook in hooks:
        hook.remove()
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).exp())


@pytest.mark.parametrize("over", ["picked", "kept"])
@pytest.mark.parametrize("together", [1 << 30, 1])
def test_profile_is_that_of_plain_models(
    over: Any, together: int, source: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers before as they are, the layer with k, the layers after it with one; all at once or one by one."""
    monkeypatch.setattr(profiles, "HIDDEN_BYTES", together)
    tokens = calibration_tokens(source, recipe(source, texts, ZERO))[:3]
    config = TopkConfig(op="topk", k=2, normalise_over=over, allocation="per_layer")
    with SilentProgress().stage("profile", 1) as stage:
        found = profiles.profile(
            open_checkpoint(str(source)),
            tokens,
            config,
            batch_size=2,
            device="cpu",
            file=tmp_path / "p.json",
            stage=stage,
        )
    plain = opened(source, experts_implementation="eager")
    for layer, k in product(range(LAYERS), range(1, K + 1)):
        counts = (*[K] * layer, k, *[1] * (LAYERS - layer - 1))
        assert found[layer][k - 1] == pytest.approx(perplexity(plain, tokens, counts, over), rel=1e-4)


def test_profile_is_not_measured_again(
    source: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiles, "HIDDEN_BYTES", 1)
    tokens = calibration_tokens(source, recipe(source, texts, ZERO))[:2]
    config = TopkConfig(op="topk", k=2, allocation="per_layer")
    arguments: dict[str, Any] = {"batch_size": 2, "device": "cpu", "file": tmp_path / "p.json"}
    checkpoint = open_checkpoint(str(source))
    with interrupted_at(4) as progress, progress.stage("profile", 1) as stage:
        profiles.profile(checkpoint, tokens, config, stage=stage, **arguments)
    measured = json.loads((tmp_path / "p.json").read_text())
    assert len(measured) == 4
    (tmp_path / "p.json").write_text(json.dumps(dict.fromkeys(measured, 0.0)))
    with SilentProgress().stage("profile", 1) as stage:
        found = profiles.profile(checkpoint, tokens, config, stage=stage, **arguments)
    assert found[0][:3] == [1.0] * 3 and found[2][0] > 1


@pytest.mark.usefixtures("no_reload")
def test_per_layer_from_start_to_finish(source: Path, texts: Path, tmp_path: Path) -> None:
    """Scores are measured once and serve any number of experts."""
    step = {"op": "topk", "k": 0.5, "allocation": "per_layer", "samples": 2}
    settings = recipe(source, texts, step)
    moe_compress.score(settings, tmp_path / "scores")
    planned = moe_compress.plan(settings, scores=tmp_path / "scores")
    report = moe_compress.run(settings, tmp_path / "out", scores=tmp_path / "scores")
    counts = [entry["top_k"] for entry in layer_entries(tmp_path / "out").values()]
    assert sum(counts) <= LAYERS * K // 2 and min(counts) >= 1
    assert f"by layer {' '.join(map(str, counts))}" in planned["steps"][0]["summary"][0] or len(set(counts)) == 1
    assert report["compressed"]["experts_per_token_mean"] == pytest.approx(np.mean(counts))
    assert planned["predicted"]["experts_per_token_mean"] == pytest.approx(np.mean(counts))
    fewer = moe_compress.plan(settings, overrides=["steps.0.k=1"], scores=tmp_path / "scores")
    assert fewer["predicted"]["experts_per_token_mean"] == 1


# ----------------------------------------------------------------------------------------------------- resume, previews


@pytest.mark.parametrize("step", [ZERO, SKIP])
@pytest.mark.usefixtures("no_reload")
def test_interrupted_ends_the_same(step: dict[str, Any], source: Path, texts: Path, tmp_path: Path) -> None:
    """Also the counted experts per token, of layers that were done before."""
    settings = recipe(source, texts, step)
    moe_compress.run(settings, tmp_path / "one")
    expected = content(tmp_path / "one")
    units = (1, 2, LAYERS) if step is ZERO else (2, LAYERS + 1, 2 * LAYERS - 1)
    for count in units:
        with interrupted_at(count) as progress:
            moe_compress.run(settings, tmp_path / "two", progress=progress)
        moe_compress.run(settings, tmp_path / "two", resume=True)
        found = content(tmp_path / "two")
        assert [name for name in expected if expected[name] != found.get(name)] == []
        shutil.rmtree(tmp_path / "two")


def test_previews_count_the_experts_that_would_run(source: Path, texts: Path, tmp_path: Path) -> None:
    def predicted(*steps: dict[str, Any], **settings: Any) -> float:
        found = moe_compress.plan(recipe(source, texts, *steps), **settings)["predicted"]
        return float(found["experts_per_token_mean"])

    assert predicted(ZERO) == pytest.approx(K * 8 / 12)
    assert predicted(SKIP) == pytest.approx(K * 0.6)
    assert predicted({"op": "topk", "k": 0.5}) == 2
    assert predicted(ZERO, {"op": "topk", "k": 1}) == pytest.approx(8 / 12)
    moe_compress.score(recipe(source, texts, SKIP), tmp_path / "scores")
    plan = moe_compress.plan(recipe(source, texts, SKIP), scores=tmp_path / "scores")
    assert plan["predicted"]["experts_per_token_mean"] == pytest.approx(K * 0.6, abs=0.02)
    assert "Predicted: 40." in plan["steps"][0]["summary"][1]


@pytest.mark.parametrize(
    ("steps", "tier", "message"),
    [
        ([ZERO], "stock", "plain transformers knows no experts that do nothing"),
        ([SKIP], "stock", "plain transformers runs every expert that a router picks"),
        ([{"op": "topk", "k": 2}], "stock", "which is `kept`"),
        ([{"op": "topk", "k": 2, "normalise_over": "kept", "allocation": "per_layer"}], "stock", "one top-k for all"),
        ([{"op": "topk", "k": 2, "samples": 4}], "plugin", "only `allocation: per_layer` measures"),
        ([{"op": "skip", "threshold": 0.5, "scope": "global"}], "plugin", "only `target_skip` is shared by layers"),
        ([ZERO | {"init": "tile", "seed": 1}], "plugin", "only `init: normal` draws numbers"),
    ],
)
def test_mistakes_in_a_recipe(steps: list[dict[str, Any]], tier: str, message: str, source: Path, texts: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe(source, texts, *steps, tier=tier), runnable=True)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([ZERO, ZERO], "layer 0 has 4 zero experts already"),
        ([{"op": "topk", "k": 5}], "k: 5 is more than the 4 experts per token"),
        ([{"op": "topk", "k": 4}], "so the step has no effect"),
        ([{"op": "topk", "k": 2, "normalise_over": 9}], "normalise_over: 9 is impossible"),
        ([{"op": "topk", "k": 1, "normalise_over": "kept"}, {"op": "skip", "threshold": 0.5}], "uses one per token"),
    ],
)
def test_what_cannot_be_is_refused_before_weights_are_read(
    steps: list[dict[str, Any]],
    message: str,
    source: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline, "open_checkpoint", None)
    with pytest.raises(UsageError, match=message):
        moe_compress.run(recipe(source, texts, *steps), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_families_beyond_the_tier_are_refused(texts: Path, tmp_path: Path) -> None:
    from tests.matrix.families import save, tiny_config, tiny_model

    save(tiny_model(tiny_config("qwen3_vl_moe")), tmp_path / "model")
    for step in (ZERO, {"op": "skip", "threshold": 0.5}, {"op": "topk", "k": 1}):
        with pytest.raises(UnsupportedModelError, match="tier `plugin`"):
            moe_compress.plan(recipe(tmp_path / "model", texts, step))


@pytest.mark.usefixtures("no_reload")
def test_dropping_experts_of_a_model_with_zero_experts(source: Path, texts: Path, tmp_path: Path) -> None:
    """What a drop costs is measured on a router that has lost the expert and kept its zero experts."""

    moe_compress.run(recipe(source, texts, ZERO), tmp_path / "zero")
    checkpoint = open_checkpoint(str(tmp_path / "zero"))
    stream = LayerStream(checkpoint)
    stream.load(1)
    moe = stream.moe_layers[1]
    hidden = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    router = moe.block.state_dict()["gate.weight"].double()
    assert router.shape == (EXPERTS + EXPERTS // 2, 32)

    def routed(allowed: list[int]) -> Tensor:
        """Softmax over these rows, the K largest, their sum 1; rows of zero experts add nothing."""
        output = torch.zeros(20, 32, dtype=torch.float64)
        for token, state in enumerate(hidden.double()):
            probability = (router[allowed] @ state).softmax(dim=0)
            best = probability.topk(K)
            for share, row in zip((best.values / best.values.sum()).tolist(), best.indices.tolist(), strict=True):
                if allowed[row] < EXPERTS:
                    output[token] += share * whole_expert(moe.experts, allowed[row], state[None].float())[0].double()
        return output

    everyone = [*range(EXPERTS + EXPERTS // 2)]
    for expert in (0, 5):
        found = ReducedRouters(checkpoint.config).change(moe, expert, hidden)
        expected = routed([row for row in everyone if row != expert]) - routed(everyone)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
