"""Distillation from a recipe to a folder: what is trained, what is not, and what interruptions and processes change."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from moe_compress import run
from moe_compress.calibrate.config import CalibrationConfig
from moe_compress.checkpoint.hidden import load_hidden, save_hidden
from moe_compress.checkpoint.source import open_checkpoint
from moe_compress.compress.distill import layerwise
from moe_compress.compress.distill import step as distill_step
from moe_compress.compress.distill.state import parameter_readers, read_metrics, state_update
from moe_compress.compress.distill.train import _Run
from moe_compress.compress.scoring import read_calibration
from moe_compress.errors import CheckpointError, MoECompressError, TrainingError, UsageError
from moe_compress.verification import checks
from tests.crashes import in_child
from tests.tiny_checkpoint import VOCABULARY, tiny_checkpoint, tiny_recipe

LAYERS = 3
PRUNE = {"op": "prune", "criterion": "reap", "keep": 0.5}
DISTILL = {"op": "distill", "learning_rate": 2e-3, "epochs": 6, "batch_size": 4, "micro_batch_size": 2, "save_every": 2}
LAYERWISE = {"op": "distill", "mode": "layerwise", "learning_rate": 2e-3, "epochs": 6, "batch_size": 2}


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def no_reload(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Leaves out the fresh process that loads the result, where the test does not ask for it."""
    if "reloaded" not in request.keywords:
        monkeypatch.setattr(checks, "check_logits", lambda folder: checks.Check(True, "not computed here."))


@pytest.fixture
def recipe(source: Path, texts: Path) -> Callable[..., dict[str, Any]]:
    def make(*steps: dict[str, Any], **settings: Any) -> dict[str, Any]:
        return tiny_recipe(source, texts, **settings) | {"steps": list(steps)}

    return make


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def losses(out: Path, number: int = 1) -> list[dict[str, Any]]:
    """The lines of metrics of a step, but for the clock."""
    lines = read_metrics(out.with_name(f"{out.name}.work") / f"step-{number}" / "training")
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def round_to_nf4(model: Any) -> None:
    """Give every expert's matrices and the attention's the values that bitsandbytes makes of them."""
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and (".experts." in name or ".self_attn." in name):
            packed, state = quantize_4bit(weight.float().view(-1, 64), blocksize=64, quant_type="nf4")
            weight.copy_(dequantize_4bit(packed, state).view_as(weight))


def distilled(recipe: dict[str, Any], out: Path, *, number: int = 1, **options: Any) -> list[dict[str, Any]]:
    run(recipe, out, keep_steps=True, **options)
    return losses(out, number)


def killed(recipe: dict[str, Any], out: Path, update: int) -> None:
    """Run it in a process that is killed in the middle of an update."""

    def action() -> None:
        whole = _Run._passes

        def cut(self: _Run, *given: Any) -> dict[str, list[float]]:
            if len(losses(out)) == update:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(self, *given)

        _Run._passes = cut  # type: ignore[method-assign]
        run(recipe, out, keep_steps=True)

    assert in_child(action) == -signal.SIGKILL


@pytest.mark.reloaded
@pytest.mark.parametrize("trainable", [["routers", "norms"], ["experts"], ["all"]])
def test_what_is_trained_changes_and_nothing_else(
    recipe: Callable[..., dict[str, Any]], trainable: list[str], tmp_path: Path
) -> None:
    lines = distilled(recipe(PRUNE, DISTILL | {"trainable": trainable}), tmp_path / "out")
    assert len(lines) == 12
    assert sum(line["loss"] for line in lines[-2:]) < 0.95 * sum(line["loss"] for line in lines[:2])
    before, after = weights(tmp_path / "out.work" / "step-0" / "checkpoint"), weights(tmp_path / "out")
    assert {name: (t.dtype, t.shape) for name, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {
        "routers": {name for name in before if ".gate.weight" in name},
        "norms": {name for name in before if "norm" in name},
        "experts": {name for name in before if ".experts." in name},
        "all": set(before),
    }
    allowed = set().union(*(expected[part] for part in trainable))
    assert changed <= allowed
    unmoved = {name for name in allowed - changed if "norm" not in name}  # 1 in bfloat16 needs a step of 2^-8
    assert not unmoved
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())["steps"][1]
    assert [point["loss"] for point in plan["curve"]] == [line["loss"] for line in lines]
    assert plan["tokens"] == 6 * 8 * 64


def test_a_cache_of_all_logits_teaches_like_the_model(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    settings = DISTILL | {"temperature": 1.5, "nll_share": 0.25}
    online = distilled(recipe(PRUNE, settings), tmp_path / "online")
    cached = distilled(recipe(PRUNE, settings | {"teacher": "cached", "top_logits": VOCABULARY}), tmp_path / "cached")
    for one, other in zip(online, cached, strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    few = distilled(recipe(PRUNE, settings | {"teacher": "cached", "top_logits": 8}), tmp_path / "few")
    assert few[0]["kl"] < online[0]["kl"]
    assert few[0]["nll"] == pytest.approx(online[0]["nll"])


@pytest.mark.parametrize("teacher", ["online", "nf4"])
def test_the_first_loss_is_that_of_plain_transformers(
    recipe: Callable[..., dict[str, Any]], source: Path, teacher: str, tmp_path: Path
) -> None:
    settings = {"batch_size": 8, "epochs": 1, "nll_share": 0.3, "hidden_weight": 0.5, "temperature": 2.0}
    (line,) = distilled(recipe(PRUNE, DISTILL | settings | {"teacher": teacher}), tmp_path / "out")
    work = tmp_path / "out.work"
    tokens = load_file(work / "step-1" / "training" / "tokens.safetensors")["tokens"]
    folders = {"student": work / "step-0" / "checkpoint", "teacher": source}
    found = {}
    for name, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
        with torch.no_grad():
            if (name, teacher) == ("teacher", "nf4"):
                round_to_nf4(model)
            found[name] = model(input_ids=tokens, output_hidden_states=True, use_cache=False)
    s, p = ((found[name].logits / 2).softmax(-1) for name in ("student", "teacher"))
    kl = 4 * (p * (p / s).log()).sum(-1).mean()
    shares = found["student"].logits.softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None]).log()
    pairs = list(zip(found["student"].hidden_states[1:], found["teacher"].hidden_states[1:], strict=True))
    hidden = sum(((own - t).square().sum(-1) / t.square().sum(-1)).mean() for own, t in pairs) / len(pairs)
    assert line["kl"] == pytest.approx(float(kl), rel=1e-4)
    assert line["nll"] == pytest.approx(float(-shares.mean()), rel=1e-4)
    assert line["hidden"] == pytest.approx(float(hidden), rel=1e-4)
    assert line["loss"] == pytest.approx(float(0.7 * kl - 0.3 * shares.mean() + 0.5 * hidden), rel=1e-4)


@pytest.mark.parametrize(("update", "teacher"), [(1, "online"), (7, "online"), (4, "cached")])
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(
    recipe: Callable[..., dict[str, Any]], update: int, teacher: str, tmp_path: Path
) -> None:
    settings = recipe(PRUNE, DISTILL | {"teacher": teacher})
    whole = distilled(settings, tmp_path / "whole")
    killed(settings, tmp_path / "cut", update)
    assert len(losses(tmp_path / "cut")) == update
    assert distilled(settings, tmp_path / "cut", resume=True) == whole
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def test_two_processes_are_one_with_twice_the_batch(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Each of the two has 2 of the 4 sequences of a batch in a pass; the one process has them in turn."""
    settings = DISTILL | {"hidden_weight": 0.1}
    one = distilled(recipe(PRUNE, settings), tmp_path / "one")
    two = distilled(recipe(PRUNE, settings | {"processes": 2}), tmp_path / "two")
    for single, shared in zip(one, two, strict=True):
        assert shared == pytest.approx(single, rel=1e-4)


def test_what_fails_in_a_process_is_said(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    settings = recipe(PRUNE, DISTILL | {"processes": 2, "learning_rate": 1e30, "trainable": ["experts"]})
    with pytest.raises(TrainingError, match="the training processes failed: the loss is nan"):
        run(settings, tmp_path / "out")


@pytest.mark.parametrize("save_every", [1, 25])
def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(
    recipe: Callable[..., dict[str, Any]], tmp_path: Path, save_every: int
) -> None:
    """Whether or not the state before that update was kept already; a run that goes on from it ends in the same way."""
    settings = recipe(PRUNE, DISTILL | {"learning_rate": 1e30, "trainable": ["experts"], "save_every": save_every})
    for resume in (False, True):
        with pytest.raises(TrainingError, match="lower `learning_rate`"):
            run(settings, tmp_path / "out", resume=resume)
    assert not (tmp_path / "out").exists()
    folder = tmp_path / "out.work" / "step-1" / "training"
    assert state_update(folder) == len(read_metrics(folder))
    assert all(bool(read().isfinite().all()) for read in parameter_readers(folder).values())


def test_a_resumed_training_must_be_the_same(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    settings = recipe(PRUNE, DISTILL)
    killed(settings, tmp_path / "out", 5)
    (about,) = (tmp_path / "out.work" / "step-1" / "training").glob("state-*/about.json")
    about.write_text(json.dumps(json.loads(about.read_text()) | {"identity": "another"}))
    with pytest.raises(MoECompressError, match="of a training with other data or settings"):
        run(settings, tmp_path / "out", resume=True)


@pytest.mark.reloaded
@pytest.mark.parametrize("inputs", ["teacher", "student"])
def test_layers_are_healed_one_by_one(recipe: Callable[..., dict[str, Any]], inputs: str, tmp_path: Path) -> None:
    lines = distilled(recipe(PRUNE, LAYERWISE | {"inputs": inputs}), tmp_path / "out")
    assert [line["layer"] for line in lines] == list(range(LAYERS))
    assert all(line["loss"] < 0.95 * line["before"] for line in lines)
    before, after = weights(tmp_path / "out.work" / "step-0" / "checkpoint"), weights(tmp_path / "out")
    frozen = {name for name in before if "_proj.weight" in name and ".experts." not in name} | {"lm_head.weight"}
    frozen |= {"model.embed_tokens.weight", "model.norm.weight"}
    assert all(torch.equal(before[name], after[name]) for name in frozen)


def layer_outputs(folder: Path, tokens: Tensor) -> list[Tensor]:
    """What enters the layers and leaves the last, in float64, by hooks on plain transformers."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    found: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    model.model.layers[-1].register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    return found


def test_a_layers_error_is_that_of_plain_transformers(
    recipe: Callable[..., dict[str, Any]], source: Path, tmp_path: Path
) -> None:
    """In a closed loop: what leaves a layer of the healed model, against the original."""
    lines = distilled(recipe(PRUNE, LAYERWISE | {"inputs": "student"}), tmp_path / "out")
    work = tmp_path / "out.work"
    calibration = CalibrationConfig.model_validate(recipe()["calibration"])
    tokens = read_calibration(source, open_checkpoint(str(source)).config, calibration).tokens
    wanted, pruned, healed = (
        layer_outputs(folder, tokens) for folder in (source, work / "step-0" / "checkpoint", tmp_path / "out")
    )

    def error(own: list[Tensor], layer: int) -> float:
        change = (wanted[layer + 1] - wanted[layer]).square().sum()
        return float((own[layer + 1] - wanted[layer + 1]).square().sum() / change)

    assert lines[0]["before"] == pytest.approx(error(pruned, 0), rel=1e-4)
    for layer in range(LAYERS):
        assert lines[layer]["loss"] == pytest.approx(error(healed, layer), rel=1e-3)


def test_a_student_that_equals_its_teacher_stays_put(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    everything = PRUNE | {"keep": 1.0}
    lines = distilled(recipe(everything, LAYERWISE | {"trainable": ["all"]}), tmp_path / "out")
    assert [(line["before"], line["loss"]) for line in lines] == [(0.0, 0.0)] * LAYERS
    before, after = weights(tmp_path / "out.work" / "step-0" / "checkpoint"), weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("inputs", ["teacher", "student"])
def test_layerwise_goes_on_with_the_layer_at_hand(
    recipe: Callable[..., dict[str, Any]], inputs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted as soon as the second one is kept."""
    settings = recipe(PRUNE, LAYERWISE | {"inputs": inputs})
    whole = distilled(settings, tmp_path / "whole")

    def cut(folder: Path, layer: int, hidden: Sequence[Tensor]) -> None:
        save_hidden(folder, layer, hidden)
        if layer == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(layerwise, "save_hidden", cut)
        run(settings, tmp_path / "cut", keep_steps=True)
    assert load_hidden(tmp_path / "cut.work" / "step-1" / "training")[0] == 2
    assert distilled(settings, tmp_path / "cut", resume=True) == whole
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.reloaded
@pytest.mark.parametrize("settings", [DISTILL, LAYERWISE], ids=["full", "layerwise"])
def test_layers_with_different_numbers_of_experts(
    recipe: Callable[..., dict[str, Any]], settings: dict[str, Any], tmp_path: Path
) -> None:
    uneven = PRUNE | {"scope": "global", "protect_super_experts": False}
    export = {"tier": "plugin", "max_shard_size": "20KB"}
    lines = distilled(recipe(uneven, settings, export=export), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len({layer["num_experts"] for layer in config["moe_compress"]["layers"].values()}) > 1
    if settings is LAYERWISE:
        assert all(line["loss"] < line["before"] for line in lines)
    else:
        assert sum(line["loss"] for line in lines[-2:]) < sum(line["loss"] for line in lines[:2])


@pytest.mark.reloaded
def test_tied_embeddings_are_trained_once(texts: Path, tmp_path: Path) -> None:
    tied = tiny_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    settings = tiny_recipe(tied, texts) | {"steps": [PRUNE, DISTILL | {"trainable": ["all"]}]}
    distilled(settings, tmp_path / "out")
    before, after = weights(tied), weights(tmp_path / "out")
    assert "lm_head.weight" not in after
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


def test_another_teacher_is_taken_when_it_speaks_the_same_language(source: Path, texts: Path, tmp_path: Path) -> None:
    pruned = tmp_path / "pruned"
    run(tiny_recipe(source, texts) | {"steps": [PRUNE]}, pruned)
    alone = tiny_recipe(pruned, texts) | {"steps": [DISTILL | {"teacher_model": str(source)}]}
    run(alone, tmp_path / "alone", keep_steps=True)
    both = distilled(tiny_recipe(source, texts) | {"steps": [PRUNE, DISTILL]}, tmp_path / "both")
    assert losses(tmp_path / "alone", 0) == both

    other = tmp_path / "other"
    shutil.copytree(source, other)
    content = json.loads((other / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    first, second, *_ = words
    words[first], words[second] = words[second], words[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    alone["steps"][0]["teacher_model"] = str(other)
    with pytest.raises(UsageError, match="has another tokenizer"):
        run(alone, tmp_path / "refused")
    assert not (tmp_path / "refused.work").exists()


@pytest.mark.parametrize("settings", [DISTILL, LAYERWISE], ids=["full", "layerwise"])
def test_too_little_memory_is_said_before_training(
    recipe: Callable[..., dict[str, Any]],
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = SimpleNamespace(available=100_000)
    monkeypatch.setattr(distill_step.psutil, "virtual_memory", lambda: free)
    with pytest.raises(CheckpointError, match=r"distillation needs about 0\.\d GB .* are free; train fewer parts"):
        run(recipe(PRUNE, settings), tmp_path / "out")
    assert not list((tmp_path / "out.work" / "step-1" / "training").iterdir())


def test_own_data_is_looked_at_before_any_step(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    bad_data = {"dataset": "/nowhere/texts.txt", "num_samples": 4, "sequence_length": 32}
    with pytest.raises(MoECompressError, match=r"/nowhere/texts\.txt"):
        run(recipe(PRUNE, DISTILL | {"data": bad_data}), tmp_path / "out")
    assert not (tmp_path / "out.work").exists()
