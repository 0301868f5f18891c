"""Recipes: schema, overrides, and every mistake at once with its path, line and hint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from moe_compress.errors import RecipeError, UsageError
from moe_compress.recipe import (
    Recipe,
    check_tier,
    dump_recipe,
    load_eval_config,
    load_recipe,
    packaged_recipes,
    random_word,
    recipe_file,
    recipe_schema,
)
from moe_compress.settings import format_size, parse_size
from moe_compress.steps import make_step

PRUNE = {"op": "prune", "criterion": "reap", "keep": 0.75}
RECIPE: dict[str, Any] = {"model": "org/model", "calibration": {"dataset": "reference"}, "steps": [PRUNE]}


def mistakes(source: Any, *overrides: str, runnable: bool = False) -> dict[str, tuple[int | None, str]]:
    """Path -> (line, message) of every mistake in a recipe."""
    if isinstance(source, str):
        source = Path(source)
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides, runnable=runnable)
    return {problem.path: (problem.line, problem.message) for problem in caught.value.problems}


def write(folder: Path, text: str) -> str:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "1.e-4", "+.1e-3", "0.0001"])
def test_exponents_need_no_point(number: str, tmp_path: Path) -> None:
    """As in YAML 1.2; YAML 1.1 takes most of these for texts."""
    settings = "op: distill, teacher_model: b, data: {dataset: a, num_samples: 8, sequence_length: 16}"
    file = write(tmp_path, f"model: a\nsteps: [{{{settings}, learning_rate: {number}}}]\n")
    for recipe in (load_recipe(file), load_recipe(file, [f"steps.0.learning_rate={number}"])):
        assert recipe.steps[0].learning_rate == 1e-4  # type: ignore[union-attr]
        assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe
    named = load_recipe({"model": number})
    assert load_recipe(write(tmp_path, dump_recipe(named))).model == number, "a text that looks like a number is quoted"


@pytest.mark.parametrize("name", ["demo", "prune-man-50", "prune-reap-25"])
def test_packaged_recipes_are_valid_described_and_survive_a_round_trip(name: str) -> None:
    recipe = load_recipe(name, runnable=True)
    assert load_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe
    assert len(dict(packaged_recipes())[name]) > 20
    assert recipe_file(name).read_text().splitlines()[1].startswith("# yaml-language-server: $schema=")
    assert recipe.eval.tasks == (["reference"] if name == "demo" else []), "its tasks fit no other model"


def test_demo_is_what_the_command_promises() -> None:
    demo = load_recipe("demo")
    assert (demo.model, demo.steps[0].criterion, demo.steps[0].keep) == ("reference", "reap", 0.75)
    parts = [(part.dataset, part.config_name, part.weight) for part in demo.calibration.parts]
    assert parts == [("reference", "text", 4), ("reference", "skills", 1)] and demo.calibration.num_samples == 64
    assert (demo.eval.tasks, demo.eval.random_baselines) == (["reference"], 3)


def test_all_mistakes_at_once_with_path_line_and_hint(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """\
model: org/model
revsion: auto
calibration:
  dataset: reference
  num_samples: 12.5
steps:
  - op: prune
    criterion: rape
    keep: 1.5
    scoop: layer
export: {tier: stok, max_shard_size: 4QB}
eval: {limit: -1, tasks: [a]}
num_samples: 3
""",
    )
    found = mistakes(file)
    expected = {
        "revsion": (2, "did you mean `revision`?"),
        "calibration.num_samples": (5, "whole number, got `12.5`"),
        "steps.0.criterion": (8, "did you mean `reap`?"),
        "steps.0.keep": (9, "1.5"),
        "steps.0.scoop": (10, "did you mean `scope`?"),
        "export.tier": (11, "did you mean `stock`?"),
        "export.max_shard_size": (11, "`4GB`"),
        "eval.limit": (12, "greater than or equal to 1"),
        "num_samples": (13, "did you mean `calibration.num_samples`"),
    }
    assert set(found) == set(expected)
    for path, (line, hint) in expected.items():
        assert found[path][0] == line
        assert hint in found[path][1]


def test_mistakes_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, "modle: x\ncalibration: {datset: reference}\nsteps: []\n"), ["eval.limt=3"])
    lines = [problem.line for problem in caught.value.problems]
    assert lines == [1, 1, 2, 2, None]  # what is missing has the line of the mapping around it
    assert str(caught.value).splitlines()[0] == "line 1: model: missing"


def test_an_unknown_op_hides_the_settings_of_that_op() -> None:
    found = mistakes(RECIPE | {"steps": [{"op": "prun", "bits": 4}]})
    known = "distill, merge, prune, quantize, skip, tie, topk, zero_experts"
    assert found == {"steps.0.op": (None, f"unknown value `prun`; did you mean `prune`? (one of: {known})")}


def test_a_step_needs_its_op() -> None:
    assert mistakes(RECIPE | {"steps": [{"criterion": "reap", "keep": 1}]}) == {"steps.0.op": (None, "missing")}


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"model": "reference", "revision": "main"}, "revision"),
        ({"steps": [PRUNE | {"seed": 0}]}, "steps.0.seed"),
        ({"calibration": {"dataset": [{"dataset": "a"}, {"dataset": "b"}], "split": "test"}}, "calibration.split"),
        ({"calibration": {"dataset": [{"dataset": "a"}], "text_field": "x"}}, "calibration.text_field"),
        ({"calibration": {"dataset": [{"dataset": "a", "weight": 2.0}]}}, "calibration.dataset.0.weight"),
        ({"eval": {"random_baselines": 3}}, "eval.random_baselines"),
        ({"eval": {"random_baselines": 3, "tasks": ["a"]}, "steps": []}, "eval.random_baselines"),
        ({"eval": {"limit": 10}}, "eval.limit"),
        ({"eval": {"tasks": [], "num_fewshot": 5}}, "eval.num_fewshot"),
    ],
)
def test_a_setting_without_effect_is_a_mistake(changes: dict[str, Any], path: str) -> None:
    found = mistakes(RECIPE | changes)
    assert list(found) == [path]
    assert found[path][1].startswith("has no effect: ")


def test_a_revision_of_a_folder_has_no_effect(tmp_path: Path) -> None:
    assert "no Hub id" in mistakes(RECIPE | {"model": str(tmp_path), "revision": "main"})["revision"][1]


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": [PRUNE | {"criterion": "random", "seed": 3}]},
        {"revision": "main"},
        {"calibration": {"dataset": [{"dataset": "a", "weight": 2}, {"dataset": "b", "split": "test"}]}},
        {"eval": {"tasks": ["a"], "random_baselines": 3, "limit": 10}},
        {"eval": {"random_baselines": 0}},
    ],
)
def test_the_same_settings_are_welcome_where_they_act(changes: dict[str, Any]) -> None:
    recipe = load_recipe(RECIPE | changes, runnable=True)
    assert load_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


def test_a_calibration_without_steps_serves_scores_but_no_run() -> None:
    idle = {"calibration": (None, "has no effect: there are no steps, so no expert is measured")}
    recipe = RECIPE | {"steps": []}
    assert mistakes(recipe, runnable=True) == idle
    assert load_recipe(recipe).calibration.dataset == "reference"
    assert set(mistakes(recipe | {"step": [PRUNE]}, runnable=True)) == {"step"}
    identity = load_recipe({"model": "org/model", "steps": []}, runnable=True)
    assert load_recipe(yaml.safe_load(dump_recipe(identity)), runnable=True) == identity


def test_a_misspelt_setting_does_not_make_others_useless() -> None:
    assert set(mistakes(RECIPE | {"eval": {"task": ["a"], "limit": 5}})) == {"eval.task"}


def test_identity_needs_no_calibration_but_steps_do() -> None:
    assert load_recipe({"model": "reference", "steps": []}).steps == []
    assert "missing" in mistakes({"model": "reference", "steps": [PRUNE]})["calibration"][1]


def test_global_scope_is_refused_in_tier_stock_by_step_and_reason() -> None:
    spread = RECIPE | {"steps": [PRUNE, PRUNE | {"scope": "global"}]}
    recipe = load_recipe(spread)  # it may be planned
    with pytest.raises(
        RecipeError,
        match=r"steps\.1\.scope: step 1 \(prune\): the tier `stock` cannot hold a different number of experts",
    ):
        check_tier(recipe)
    assert "tier `stock`" in mistakes(spread, runnable=True)["steps.1.scope"][1]


def test_tier_plugin_holds_what_stock_cannot() -> None:
    spread = RECIPE | {"steps": [{"op": "prune", "criterion": "reap", "keep": 0.5, "scope": "global"}]}
    assert mistakes(spread, runnable=True).keys() == {"steps.0.scope"}
    assert load_recipe(spread | {"export": {"tier": "plugin"}}, runnable=True).export.tier == "plugin"


def test_tier_mistakes_stand_beside_others(tmp_path: Path) -> None:
    text = "model: 3\nsteps: [{op: prune, criterion: reap, keep: 1, scope: global}]\ncalibration: {dataset: a}\n"
    found = mistakes(write(tmp_path, text), runnable=True)
    assert {path: line for path, (line, _) in found.items()} == {"model": 1, "steps.0.scope": 2}


def test_precedence_is_command_line_then_keywords_then_recipe_then_default(tmp_path: Path) -> None:
    file = write(tmp_path, "model: a\nrevision: a1\ncalibration: {dataset: a, num_samples: 7}\n")
    assert load_recipe(file).export.max_shard_size == 4 * 10**9
    assert load_recipe(file).revision == "a1"
    assert load_recipe(file, (), {"revision": "b2", "model": Path("b")}).revision == "b2"
    last = load_recipe(file, ["revision=c3", "revision=d4"], {"revision": "b2"})
    assert (last.revision, last.model, last.calibration.num_samples) == ("d4", "a", 7)


def test_overrides_are_yaml_and_reach_into_lists_and_absent_sections() -> None:
    recipe = load_recipe(RECIPE, ["steps.0.keep=12", "eval.tasks=[gsm8k, arc_easy]", "eval.limit=null", "model=./x"])
    assert (recipe.steps[0].keep, recipe.eval.tasks, recipe.model) == (12, ["gsm8k", "arc_easy"], "./x")
    assert load_recipe(RECIPE, ["steps.0={op: prune, criterion: man, keep: 0.5}"]).steps[0].criterion == "man"
    assert load_recipe(RECIPE, ["export.max_shard_size=500MB"]).export.max_shard_size == 500 * 10**6


def test_a_falsy_override_wins() -> None:
    source = RECIPE | {"eval": {"speed": True, "tasks": ["a"], "seed": 3}}
    found = load_recipe(source, ["eval.speed=false", "eval.seed=0"]).eval
    assert (found.speed, found.seed) == (False, 0)


def test_wrong_overrides_are_all_reported(tmp_path: Path) -> None:
    file = write(tmp_path, "model: a\nsteps: []\nexport: {tier: stock}\n")
    found = mistakes(file, "keep", "steps.0.keep=1", "model.x=1", "revision=[", "export.tier=stok", "evil.limit=3")
    assert found[""] == (None, "`keep` is not an override; write key=value, such as `steps.0.keep=0.5`")
    assert found["steps.0.keep"][1] == "`steps` is a list of 0, counted from 0"
    assert found["model.x"][1] == '`model` is `"a"` and holds no settings'
    assert "is not a YAML value" in found["revision"][1]
    assert found["export.tier"][0] is None  # the file's line 3 is not where it went wrong
    assert "did you mean `stock`?" in found["export.tier"][1]
    assert "did you mean `eval`?" in found["evil"][1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [\n", "not YAML"),
        ("- a\n", "should be a mapping of settings"),
        ("", "model: missing"),
        ("model: a\nmodel: b\n", "line 2: model: given twice, first on line 1"),
        ("model: &a [*a]\n", "an alias that holds itself"),
        ("model: a\n1: b\n", "line 2: 1: the name of a setting should be a text"),
        ("model: !!python/object:os.system x\n", "not YAML"),
        ("model: a\nsteps: reap\n", 'line 2: steps: should be a list, got `"reap"`'),
        ("model: a\nsteps: [prune]\ncalibration: {dataset: b}\n", "line 2: steps.0: should be a mapping of settings"),
        ("model: a\neval: null\n", "line 2: eval: should be a mapping of settings, got `null`"),
        ("model: 12\n", "line 1: model: should be a text (quote it), got `12`"),
        ("model: a\ncalibration: {dataset: [{dataset: b, slpit: c}]}\n", "did you mean `split`?"),
        (
            "model: a\ncalibration: {dataset: 5}\n",
            "calibration.dataset: should be a text (quote it) or a list, got `5`",
        ),
    ],
)
def test_a_broken_file_gets_one_clear_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))
    assert len(caught.value.problems) == 1
    assert message in str(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not a text file"):
        load_recipe(tmp_path / "recipe.yaml")


def test_no_coercion_of_wrong_types() -> None:
    evaluation = {"tasks": ["a"], "apply_chat_template": "yes"}
    calibration = {"dataset": "a", "num_samples": True, "seed": "1"}
    wrong = {"eval.apply_chat_template", "calibration.num_samples", "calibration.seed"}
    assert set(mistakes(RECIPE | {"eval": evaluation, "calibration": calibration})) == wrong


def test_code_that_comes_with_a_checkpoint_cannot_be_trusted() -> None:
    assert set(mistakes(RECIPE | {"trust_remote_code": True})) == {"trust_remote_code"}


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean `prune-reap-25`"):
        load_recipe("prune-reap-52")
    with pytest.raises(UsageError, match="packaged are budget-joint, demo, differences-50, mc-2"):
        load_recipe("nowhere")


def test_models_and_dicts_are_recipes_too() -> None:
    recipe = load_recipe(RECIPE)
    assert load_recipe(recipe) == recipe
    assert load_recipe(recipe, ["steps.0.keep=0.5"]).steps[0].keep == 0.5
    assert load_recipe(RECIPE | {"steps": recipe.steps, "calibration": recipe.calibration}) == recipe
    assert RECIPE["steps"] == [PRUNE]


def test_eval_settings_alone() -> None:
    config = load_eval_config({"tasks": ["a"]}, ["num_fewshot=5"])
    assert (config.tasks, config.num_fewshot) == (["a"], 5)
    with pytest.raises(RecipeError, match="did you mean `num_fewshot`"):
        load_eval_config({"tasks": ["a"]}, ["num_fewshots=5"])
    with pytest.raises(RecipeError, match=r"^random_baselines: has no effect: no step chooses"):
        load_eval_config({"tasks": ["a"]}, ["random_baselines=3"])
    with pytest.raises(RecipeError, match=r"^limit: has no effect"):
        load_eval_config({"limit": 10})


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4 * 10**9), ("500MB", 5 * 10**8), ("1.5 GiB", 3 * 2**29), ("12", 12), (12, 12), ("3kb", 3000), ("7B", 7)],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-4GB", "4XB", "0", "4 G", True, None, "1e9", [4]])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ValueError, match="should be a size such as"):
        parse_size(text)


@given(st.integers(min_value=1, max_value=10**15))
def test_a_formatted_size_reads_back(size: int) -> None:
    assert parse_size(format_size(size)) == size


def test_every_setting_is_described_frozen_and_closed() -> None:
    def walk(model: type[BaseModel]) -> None:
        assert (model.model_config.get("extra"), model.model_config.get("frozen")) == ("forbid", True), model
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name} has no description"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                walk(field.annotation)

    walk(Recipe)
    with pytest.raises(ValidationError):
        load_recipe(RECIPE).model = "other"


def test_the_schema_knows_every_section() -> None:
    schema = recipe_schema()
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert list(schema["properties"]) == list(Recipe.model_fields)
    assert {"PruneConfig", "CalibrationConfig", "EvalConfig", "ExportConfig"} <= set(schema["$defs"])


@pytest.mark.parametrize(
    ("steps", "word"),
    [
        ([], None),
        ([{"op": "quantize", "bits": 4}], None),
        ([{"op": "merge", "grouping": "hc", "keep": 0.5}], None),
        ([PRUNE, PRUNE, {"op": "quantize", "bits": 4}], "pruning"),
        ([{"op": "quantize", "average_bits": 2.5}], "bit allocation"),
        ([PRUNE, {"op": "quantize", "average_bits": 2.5}], "pruning and bit allocation"),
    ],
)
def test_random_baselines_need_a_choice_that_can_be_drawn(steps: list[dict[str, Any]], word: str | None) -> None:
    assert random_word(steps) == word
    recipe = RECIPE | {"steps": steps, "eval": {"tasks": ["a"], "random_baselines": 3}, "export": {"tier": "plugin"}}
    if word is None:
        assert list(mistakes(recipe)) == ["eval.random_baselines"]
    for step, config in zip(steps, load_recipe(recipe, [] if word else ["eval.random_baselines=0"]).steps, strict=True):
        drawn = make_step(config).at_random(7)
        assert (drawn is not None) == (random_word([step]) is not None), "`chance` says what `at_random` does"
        assert drawn is None or drawn.config.seed == 7


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "nf4", "attention": 4},
        {"method": "nf4", "embeddings": 4},
        {"average_bits": 2.5, "options": 3},
        {"bits": 4, "attention": {"bits": [3]}},
    ],
)
def test_settings_of_a_wrong_type_are_mistakes_like_others(wrong: dict[str, Any]) -> None:
    named = next(key for key in ("attention", "embeddings", "options") if key in wrong)
    assert any(f"steps.0.{named}" in path for path in mistakes(RECIPE | {"steps": [{"op": "quantize"} | wrong]}))
