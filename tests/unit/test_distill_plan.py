"""Schedules, memory needs, the rules between the settings, and the parts of a model."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from moe_compress.compress.distill import parts
from moe_compress.compress.distill.config import DistillConfig
from moe_compress.compress.distill.plan import Schedule, full_memory, thinned
from moe_compress.compress.distill.step import teacher_floats
from moe_compress.errors import RecipeError, UsageError
from moe_compress.models.layers import find_moe_layers
from moe_compress.recipe import dump_recipe, load_recipe
from tests.tiny_checkpoint import tiny_model

PRUNE = {"op": "prune", "criterion": "reap", "keep": 0.5}


def config(**settings: Any) -> DistillConfig:
    return DistillConfig(op="distill", **settings)


def recipe(*steps: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {"model": "reference", "calibration": {"dataset": "reference"}, "steps": list(steps)} | settings


def test_every_epoch_has_every_sequence_once_in_an_order_of_its_own() -> None:
    schedule = Schedule(config(batch_size=4, epochs=3), 10, 16)
    assert (schedule.num_updates, schedule.num_tokens) == (8, 480)
    order = [sequence for update in range(8) for sequence in schedule.sequences(update)]
    epochs = [order[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [len(schedule.sequences(update)) for update in range(8)] == [4] * 7 + [2]
    assert Schedule(config(batch_size=4, epochs=3, seed=1), 10, 16).sequences(0) != schedule.sequences(0)


def test_learning_rate_rises_linearly_and_falls_by_a_cosine() -> None:
    schedule = Schedule(config(batch_size=1, warmup=0.2), 20, 8)
    factors = [schedule.factor(update) for update in range(20)]
    assert factors[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert factors[12] == pytest.approx(0.5 * (1 + math.cos(math.pi * 8 / 16)))
    assert 0 < factors[-1] < 0.01
    assert Schedule(config(batch_size=1, warmup=0), 20, 8).factor(0) == 1
    constant = Schedule(config(batch_size=1, warmup=0.2, decay="constant"), 20, 8)
    assert [constant.factor(update) for update in range(20)] == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 17])


def test_memory_counts_weights_gradients_moments_and_logits() -> None:
    sizes = {"student": 1000, "trained": 100, "teacher": 2000, "original": 4000, "vocabulary": 50, "sequence_length": 8}
    assert full_memory(config(), **sizes) == 4 * (1000 + 300 + 2000 + 3 * 8 * 50)
    assert full_memory(config(teacher="cached"), **sizes) == 4 * (1000 + 300 + 2 * 8 * 50)
    assert full_memory(config(nll_share=1), **sizes) == 4 * (1000 + 300 + 2 * 8 * 50)
    assert full_memory(config(teacher="cached", prompt_length=4), **sizes) == 4 * 4000  # it writes the responses
    two = config(processes=2, micro_batch_size=4)
    assert full_memory(two, **sizes) == 2 * 4 * (1000 + 300 + 2000 + 3 * 4 * 8 * 50)
    divided = 4 * (1000 + 300 + 2000) + 2 * 4 * (70 + 3 * 4 * 8 * 50)
    assert full_memory(two, **sizes, gathered=70) == divided
    assert full_memory(two, **sizes, gathered=70, devices=2) == divided / 2
    asked = two.model_copy(update={"prompt_length": 4})
    large = sizes | {"original": 20_000}
    assert full_memory(asked, **large, gathered=70, devices=2) == 4 * 20_000, "one device alone writes the responses"
    packed = two.model_copy(update={"teacher": "nf4"})  # which every process has
    assert full_memory(packed, **sizes, gathered=70) == divided + 4 * 2000


def test_an_nf4_teacher_counts_the_packed_matrices_of_its_layers() -> None:
    model = tiny_model()
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.ndim > 1)
    whole = sum(p.numel() for p in model.parameters())
    assert teacher_floats(config(), model) == whole
    assert teacher_floats(config(teacher="nf4"), model) == pytest.approx(whole - matrices + matrices * 4.5 / 32)


def test_a_long_curve_is_thinned_to_its_ends_and_what_lies_between() -> None:
    curve = [{"update": update} for update in range(1001)]
    assert thinned(curve[:50]) == curve[:50]
    short = [entry["update"] for entry in thinned(curve)]
    assert len(short) == 100
    assert (short[0], short[-1]) == (0, 1000)
    assert max(after - before for before, after in pairwise(short)) <= 11


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"mode": "layerwise", "temperature": 2.0}, "steps.1.temperature: has no effect"),
        ({"mode": "layerwise", "teacher": "cached"}, "steps.1.teacher: has no effect"),
        ({"inputs": "teacher"}, "steps.1.inputs: has no effect"),
        ({"top_logits": 5}, "steps.1.top_logits: has no effect"),
        ({"nll_share": 1.0, "temperature": 2.0}, "steps.1.temperature: has no effect"),
        ({"nll_share": 1.0, "teacher": "nf4"}, "steps.1.teacher: has no effect"),
        ({"nll_share": 1.0, "teacher": "cached", "top_logits": 8}, "steps.1.top_logits: has no effect"),
        ({"prompt_length": 4096}, "leave no room for a response in sequences of"),
        ({"data": {"dataset": "reference", "sequence_length": 8}, "prompt_length": 8}, "in sequences of 8"),
        ({"stage": "on_policy"}, "needs `mode: full` and a `prompt_length`"),
        ({"stage": "on_policy", "prompt_length": 8, "teacher": "cached"}, "what is sampled is not known before"),
        ({"stage": "on_policy", "prompt_length": 8, "nll_share": 0.5}, "steps.1.nll_share: has no effect"),
        ({"mode": "layerwise", "prompt_length": 8}, "steps.1.prompt_length: has no effect"),
        ({"sampling_temperature": 2.0}, "steps.1.sampling_temperature: has no effect"),
        ({"balance_alpha": 1.0}, "steps.1.balance_alpha: has no effect"),
        ({"expert_balance_alpha": 1.0}, "steps.1.expert_balance_alpha: has no effect"),
        ({"target_skip": 1.0}, "target_skip"),
        ({"batch_size": 6, "processes": 4}, "multiple of micro_batch_size x processes"),
        ({"teacher": "cached", "hidden_weight": 1.0}, "hidden_weight needs"),
        ({"trainable": ["all", "norms"]}, "once, or `all` alone"),
        ({"trainable": ["router"]}, "did you mean `routers`"),
        ({"learning_rate": 0.0}, "learning_rate"),
    ],
)
def test_settings_that_do_not_fit_are_said(step: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe(PRUNE, {"op": "distill"} | step), runnable=True)
    assert said in str(error.value)


def test_the_first_step_needs_another_teacher() -> None:
    with pytest.raises(RecipeError, match=r"steps\.0\.op: has no effect: no step before it"):
        load_recipe(recipe({"op": "distill"}))
    load_recipe(recipe({"op": "distill", "teacher_model": "reference"}))


def test_quantized_experts_are_not_trained() -> None:
    with pytest.raises(RecipeError, match="must be the last step"):
        load_recipe(recipe({"op": "quantize", "method": "rtn", "bits": 4}, {"op": "distill"}), runnable=True)


def test_own_data_needs_no_calibration() -> None:
    data = {"dataset": "reference", "num_samples": 4, "sequence_length": 32}
    step = {"op": "distill", "teacher_model": "reference"}
    load_recipe({"model": "reference", "steps": [step | {"data": data}]})
    with pytest.raises(RecipeError, match="calibration: missing"):
        load_recipe({"model": "reference", "steps": [step]})


@pytest.mark.parametrize("step", [{}, {"mode": "layerwise"}, {"teacher": "cached", "data": {"dataset": "reference"}}])
def test_a_dumped_recipe_reads_back_equal(step: dict[str, Any], tmp_path: Any) -> None:
    loaded = load_recipe(recipe(PRUNE, {"op": "distill"} | step))
    (tmp_path / "dumped.yaml").write_text(dump_recipe(loaded))
    assert load_recipe(tmp_path / "dumped.yaml") == loaded


def test_parts_of_a_model() -> None:
    model = tiny_model("qwen3_moe")
    found = parts.parts(dict(model.named_parameters()), find_moe_layers(model))
    inside = {name.removeprefix("model.layers.1."): part for name, part in found.items() if ".layers.1." in name}
    assert inside == {
        "self_attn.q_proj.weight": "others",
        "self_attn.k_proj.weight": "others",
        "self_attn.v_proj.weight": "others",
        "self_attn.o_proj.weight": "others",
        "self_attn.q_norm.weight": "norms",
        "self_attn.k_norm.weight": "norms",
        "mlp.experts.gate_up_proj": "experts",
        "mlp.experts.down_proj": "experts",
        "mlp.gate.weight": "routers",
        "input_layernorm.weight": "norms",
        "post_attention_layernorm.weight": "norms",
    }
    outside = {name: part for name, part in found.items() if ".layers." not in name}
    assert outside == {"model.embed_tokens.weight": "others", "model.norm.weight": "norms", "lm_head.weight": "others"}
    assert Counter(found.values())["routers"] == 2
    assert parts.chosen(found, ["all"]) == list(found)
    assert parts.chosen(found, ["routers"]) == ["model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"]
    with pytest.raises(UsageError, match="residuals, but this checkpoint has none; only tied"):
        parts.chosen(found, ["routers", "residuals"])


def test_a_bank_that_layers_share_is_trained_once_at_a_lower_rate() -> None:
    model = tiny_model("qwen3_moe", num_hidden_layers=3)
    layers: Any = model.model.layers  # type: ignore[union-attr]
    layers[1].mlp.experts = layers[2].mlp.experts = layers[0].mlp.experts
    every = dict(model.named_parameters())
    found = parts.parts(every, find_moe_layers(model))
    names = parts.chosen(found, ["experts", "routers"])
    banks = ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]
    assert [name for name in names if "experts" in name] == banks
    made = parts.groups({name: every[name] for name in names}, found, parts.users(model), 0.0)
    scales = {id(parameter): group["scale"] for group in made for parameter in group["params"]}
    assert scales[id(every[banks[0]])] == pytest.approx(3**-0.5)
    assert scales[id(every["model.layers.1.mlp.gate.weight"])] == 1
    assert parts.aliases(model)["model.layers.2.mlp.experts.down_proj"] == banks[1]


def test_vectors_do_not_decay() -> None:
    parameters = {"a": nn.Parameter(torch.ones(2, 2)), "b": nn.Parameter(torch.ones(2))}
    made = parts.groups(parameters, {"a": "others", "b": "norms"}, {}, 0.1)
    assert [(len(group["params"]), group["weight_decay"]) for group in made] == [(1, 0.1), (1, 0.0)]
