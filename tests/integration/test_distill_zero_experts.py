"""Training zero experts in two stages: what the losses are, what interruptions and processes change."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moe_compress import run
from moe_compress.compress.distill.balance import SkipTarget
from moe_compress.errors import UsageError
from moe_compress.models.layers import find_moe_layers
from moe_compress.runtime.trace import RoutingTrace
from moe_compress.verification import checks
from tests.integration.test_distill import distilled, killed, weights
from tests.tiny_checkpoint import tiny_recipe

LAYERS, EXPERTS, ZEROS, K = 2, 8, 4, 2
ZERO = {"op": "zero_experts"}
OFF = {
    "op": "distill", "trainable": ["all"], "nll_share": 0.5, "target_skip": 0.75, "balance_alpha": 0.2,
    "learning_rate": 3e-3, "batch_size": 4, "micro_batch_size": 2, "save_every": 2,
}  # fmt: skip
ON = {
    "op": "distill", "stage": "on_policy", "trainable": ["all"], "prompt_length": 40, "target_skip": 0.5, "epochs": 2,
    "learning_rate": 3e-4, "decay": "constant", "batch_size": 4, "micro_batch_size": 2, "save_every": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def lenient(no_reload: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short trainings may miss their target."""
    monkeypatch.setattr(checks, "check_target", lambda *given: checks.Check(True, "not looked at here."))


@pytest.fixture(scope="module")
def base(source: Path, texts: Path) -> dict[str, Any]:
    return tiny_recipe(source, texts, export={"tier": "plugin"})


@pytest.fixture(scope="module")
def zeros(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with untrained zero experts."""
    out = tmp_path_factory.mktemp("zeros") / "out"
    run(base | {"steps": [ZERO]}, out)
    return out


def opened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_the_wanted_share_of_slots_is_skipped(base: dict[str, Any], tmp_path: Path) -> None:
    """In the last updates, in every layer, and counted again on what was written."""
    lines = distilled(base | {"steps": [ZERO, OFF | {"epochs": 24, "balance_alpha": 1.0}]}, tmp_path / "out")
    assert lines[0]["skip"] < 0.55
    for layer in range(LAYERS):
        assert sum(line["skip_per_layer"][layer] for line in lines[-8:]) / 8 == pytest.approx(0.75, abs=0.05)
    layers = json.loads((tmp_path / "out" / "config.json").read_text())["moe_compress"]["layers"].values()
    assert sum(layer["experts_per_token"] for layer in layers) / (LAYERS * K) == pytest.approx(0.25, abs=0.05)


def test_the_first_losses_follow_the_formulas(base: dict[str, Any], zeros: Path, tmp_path: Path) -> None:
    """By hooks on the routers: L = (N + w Z) / K * (f_E P_E / N + f_Z P_Z / (w Z)), w = r / (1 - r) * N / Z."""
    step = OFF | {"batch_size": 8, "micro_batch_size": 8, "teacher_model": base["model"]}
    (line,) = distilled(base | {"model": str(zeros), "steps": [step]}, tmp_path / "out", number=0)
    tokens = load_file(tmp_path / "out.work" / "step-0" / "training" / "tokens.safetensors")["tokens"]
    model, found = opened(zeros), []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, inputs, output: found.append(inputs[0] @ module.weight.T))
    with torch.no_grad():
        log = model(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
        teacher = opened(Path(base["model"]))(input_ids=tokens).logits.log_softmax(-1)
    weight, total = 3 * EXPERTS / ZEROS, 0.0
    for layer, logits in enumerate(found):
        shares = logits.flatten(0, -2).softmax(-1)
        picked_zero = (shares.topk(K).indices >= EXPERTS).sum() / len(shares)
        p_zero = shares[:, EXPERTS:].sum(1).mean()
        total += (EXPERTS + weight * ZEROS) / K * (
            (K - picked_zero) * (1 - p_zero) / EXPERTS + picked_zero * p_zero / (weight * ZEROS)
        )  # fmt: skip
        assert line["skip_per_layer"][layer] == pytest.approx(float(picked_zero) / K, abs=2e-3)
    kl = (teacher.exp() * (teacher - log)).sum(-1).mean()
    nll = -log[:, :-1].gather(-1, tokens[:, 1:, None]).mean()
    assert line["balance"] == pytest.approx(float(total), rel=1e-3)
    assert line["loss"] == pytest.approx(float(0.5 * kl + 0.5 * nll + 0.2 * total), rel=1e-4)


def test_balance_of_experts_has_the_gradient_of_the_whole_batch(zeros: Path) -> None:
    """In float64, and the formula on all tokens at once: (N + w Z) * sum share_r P_r / w_r, w = r / (1 - r) * N / Z."""
    model, weight = opened(zeros).double(), 3 * EXPERTS / ZEROS
    tokens = torch.randint(256, (6, 20), generator=torch.Generator().manual_seed(0))
    logits: list[Any] = []
    gates = [layer.mlp.gate for layer in model.model.layers]
    hooks = [gate.register_forward_hook(lambda module, inputs, output: logits.append(output[0])) for gate in gates]
    model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    wanted = torch.zeros((), dtype=torch.float64)
    for found in logits:
        probability = found.softmax(-1)
        for row in range(EXPERTS + ZEROS):
            share = (probability.topk(K).indices == row).double().mean() / (weight if row >= EXPERTS else 1)
            wanted = wanted + (EXPERTS + weight * ZEROS) * share * probability[:, row].mean()
    wanted.backward()
    expected = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    skip, parts = SkipTarget(find_moe_layers(model), 0.75), tokens.split([1, 3, 2])
    model.zero_grad()
    picked = []
    for part in parts:
        with RoutingTrace(skip.layers) as trace, torch.no_grad():
            model(input_ids=part)
        picked.append({moe.layer: trace.last(moe.layer).row_TK for moe in skip.layers})
    shares, total = skip.shares(picked, lambda counts: counts), 0.0
    for part in parts:
        with RoutingTrace(skip.layers) as trace:
            model(input_ids=part)
        loss = len(part) / len(tokens) * skip.expert_loss(trace, shares)
        total += float(loss.detach())
        loss.backward()
    assert total == pytest.approx(float(wanted.detach()), rel=1e-6)
    assert len(expected) > LAYERS
    for name, value in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(value.grad, expected[name], rtol=1e-4, atol=1e-8, msg=name)


@pytest.mark.parametrize("step", [OFF, ON | {"epochs": 1}], ids=["off_policy", "on_policy"])
def test_passes_of_any_size_are_the_same_training(base: dict[str, Any], step: dict[str, Any], tmp_path: Path) -> None:
    """What is sampled and how single experts are balanced too."""
    step = step | {"balance_alpha": 1e-9, "expert_balance_alpha": 0.5}  # the group's is one of each pass
    sizes = [{"micro_batch_size": size} for size in (4, 1)]
    runs = [distilled(base | {"steps": [ZERO, step | size]}, tmp_path / str(n)) for n, size in enumerate(sizes)]
    for whole, divided in zip(*runs, strict=True):
        for name in ("expert_balance", "loss", "gradient_norm"):
            assert divided[name] == pytest.approx(whole[name], rel=1e-4), name


def test_a_student_that_is_its_teacher_learns_nothing_on_policy(base: dict[str, Any], tmp_path: Path) -> None:
    """What it drew is as likely to the teacher: also proof that decoding and training see the same model."""
    step = {key: value for key, value in ON.items() if key != "target_skip"}
    step |= {"teacher_model": base["model"], "epochs": 1, "batch_size": 8}
    (line,) = distilled(base | {"steps": [step]}, tmp_path / "out", number=0)
    assert line["reverse_kl"] == pytest.approx(0, abs=1e-6)
    assert line["gradient_norm"] == pytest.approx(0, abs=1e-5)


def test_the_students_own_text_becomes_likelier_to_the_teacher(base: dict[str, Any], tmp_path: Path) -> None:
    """Of enough tokens an update: what 24 tokens of a sequence or two say is chance."""
    step = {key: value for key, value in ON.items() if key != "target_skip"}
    data = {"dataset": base["calibration"]["dataset"], "num_samples": 64, "sequence_length": 64}
    step |= {"data": data, "batch_size": 64, "micro_batch_size": 64, "prompt_length": 8}
    lines = distilled(base | {"steps": [ZERO, step | {"epochs": 12, "learning_rate": 2e-3}]}, tmp_path / "out")
    first, last = (sum(line["reverse_kl"] for line in part) / 4 for part in (lines[:4], lines[-4:]))
    assert 0 < last < 0.92 * first


def test_responses_are_those_of_the_original(base: dict[str, Any], tmp_path: Path) -> None:
    """At a very low temperature they are its greedy continuations."""
    distilled(base | {"steps": [ZERO, OFF | {"prompt_length": 40, "sampling_temperature": 1e-6}]}, tmp_path / "out")
    tokens = load_file(tmp_path / "out.work" / "step-1" / "training" / "tokens.safetensors")["tokens"]
    length = tokens.shape[1] - 40
    greedy = opened(Path(base["model"])).generate(
        tokens[:, :40], max_new_tokens=length, min_new_tokens=length, do_sample=False
    )
    ends = (tokens == 256).any(dim=1)  # which `generate` leaves out
    assert (~ends).sum() >= 4
    assert torch.equal(tokens[~ends], greedy[~ends])


@pytest.mark.parametrize("step", [OFF | {"epochs": 2}, ON], ids=["off_policy", "on_policy"])
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(
    base: dict[str, Any], step: dict[str, Any], tmp_path: Path
) -> None:
    settings = base | {"steps": [ZERO, step]}
    whole = distilled(settings, tmp_path / "whole")
    killed(settings, tmp_path / "cut", random.randrange(1, 4))
    assert distilled(settings, tmp_path / "cut", resume=True) == whole
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


@pytest.mark.parametrize("step", [OFF, ON | {"epochs": 1}], ids=["off_policy", "on_policy"])
def test_two_processes_are_one(base: dict[str, Any], step: dict[str, Any], tmp_path: Path) -> None:
    step = step | {"expert_balance_alpha": 0.5}
    one = distilled(base | {"steps": [ZERO, step]}, tmp_path / "one")
    two = distilled(base | {"steps": [ZERO, step | {"processes": 2}]}, tmp_path / "two")
    for single, shared in zip(one, two, strict=True):
        assert shared.pop("skip_per_layer") == pytest.approx(single.pop("skip_per_layer"))
        assert shared == pytest.approx(single, rel=1e-4)


def test_a_target_needs_zero_experts(base: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="put `op: zero_experts` before"):
        run(base | {"steps": [OFF | {"teacher_model": base["model"]}]}, tmp_path / "out")


def test_layer_by_layer_only_routers_change(base: dict[str, Any], zeros: Path, tmp_path: Path) -> None:
    step = {"op": "distill", "mode": "layerwise", "trainable": ["routers"], "target_skip": 0.6, "balance_alpha": 5.0}
    step |= {"expert_balance_alpha": 0.5}
    step |= {"teacher_model": base["model"], "learning_rate": 1e-2, "batch_size": 2, "epochs": 16}
    lines = distilled(base | {"model": str(zeros), "steps": [step]}, tmp_path / "out", number=0)
    assert [line["skip"] for line in lines] == pytest.approx([0.6] * LAYERS, abs=0.05)
    before, after = weights(zeros), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("gate.weight")}
    layers = json.loads((tmp_path / "out" / "config.json").read_text())["moe_compress"]["layers"].values()
    noted = [layer["experts_per_token"] for layer in layers]
    assert noted == pytest.approx([K * (1 - line["skip"]) for line in lines], abs=0.02)
