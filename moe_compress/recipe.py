"""What a recipe is, and how one is read: YAML file, packaged name or dict, overrides on top, every mistake at once.

A mistake is an unknown key, a wrong value, or a setting that would have no effect; each is reported with its dotted
path and its line in the file. Whether a model or a data set exists is not checked here: no weights, no
network, no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field

from moe_compress.calibrate.config import CalibrationConfig
from moe_compress.compress.distill import config as distill
from moe_compress.compress.distill.config import DistillConfig
from moe_compress.compress.merge import config as merge
from moe_compress.compress.merge.config import MergeConfig
from moe_compress.compress.prune import config as prune
from moe_compress.compress.prune.config import PruneConfig
from moe_compress.compress.quantize import config as quantize
from moe_compress.compress.quantize.config import QuantizeConfig
from moe_compress.compress.skip import config as skip
from moe_compress.compress.skip.config import SkipConfig
from moe_compress.compress.tie import config as tie
from moe_compress.compress.tie.config import TieConfig
from moe_compress.compress.topk import config as topk
from moe_compress.compress.topk.config import TopkConfig
from moe_compress.compress.zero_experts import config as zero_experts
from moe_compress.compress.zero_experts.config import ZeroExpertsConfig
from moe_compress.errors import UsageError
from moe_compress.eval.config import EvalConfig
from moe_compress.settings import Document, Dumper, Location, Size, did_you_mean, plain, read_yaml

RECIPES = Path(__file__).parent / "recipes"
REFERENCE = "reference"
TASK_SETTINGS = ("include_path", "limit", "batch_size", "num_fewshot", "apply_chat_template", "max_gen_toks", "seed")


class OperationSettings(Protocol):
    """What the `config.py` of an operation has besides its settings.

    Rules judge a step as it is written; what is said of it in public is read from its resolved settings.
    """

    LAST: str | None  # why no step may follow, if none may
    RELATION: str | None  # the Hub's word for what the result is to its source, where it has one

    def leaves_banks(self, step: Mapping[str, Any]) -> bool:
        """Whether routers choose among more experts than are stored afterwards; then only `distill` and
        `quantize` may follow."""

    def chance(self, step: Mapping[str, Any]) -> str | None:
        """What the step would be with its choice drawn at random (`Step.at_random`), such as `pruning`; None where
        nothing is drawn."""

    def needs_tokens(self, step: Mapping[str, Any]) -> bool:
        """Whether calibration tokens pass through the model."""

    def idle(self, step: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Every setting (`name`, or `name.inner`) that is given and would change nothing, with the reason."""

    def beyond_stock(self, step: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Settings whose result plain transformers cannot load, or loads wrong without a word, with the reason."""

    def tags(self, step: Mapping[str, Any], tier: str) -> list[str]:
        """What the result is found by on the Hub."""

    def papers(self, step: Mapping[str, Any]) -> list[str]:
        """The arXiv numbers of what the step follows; `report/citations.py` has a line for each."""


OPERATIONS: dict[str, OperationSettings] = {
    "distill": distill,
    "merge": merge,
    "prune": prune,
    "quantize": quantize,
    "skip": skip,
    "tie": tie,
    "topk": topk,
    "zero_experts": zero_experts,
}


def random_word(steps: Sequence[Mapping[str, Any]]) -> str | None:
    """What these steps are with their choices drawn at random, such as `pruning`; None where nothing is drawn."""
    found = dict.fromkeys(operation.chance(step) for step in steps if (operation := _operation(step)) is not None)
    return " and ".join(word for word in found if word is not None) or None


class ExportConfig(BaseModel):
    """How the result is written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tier: Literal["stock", "plugin"] = Field(
        default="stock",
        description="`stock`: plain transformers loads it. `plugin`: needs this package to be loaded.",
    )
    max_shard_size: Size = Field(default=4 * 10**9, description="Largest safetensors file, such as `4GB` or `500MB`.")


class Recipe(BaseModel):
    """What to do to which checkpoint, and how to measure it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1, description="Hub id, folder, or `reference` (the model inside this package).")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a Hub id.")
    calibration: CalibrationConfig = Field(
        default=CalibrationConfig(dataset=REFERENCE),
        description="The tokens that experts are measured on; required when there are steps.",
    )
    steps: list[
        Annotated[
            DistillConfig
            | MergeConfig
            | PruneConfig
            | QuantizeConfig
            | SkipConfig
            | TieConfig
            | TopkConfig
            | ZeroExpertsConfig,
            Discriminator("op"),
        ]
    ] = Field(default=[], description="Transformations in order; none copies the checkpoint unchanged.")
    export: ExportConfig = Field(default=ExportConfig(), description="How the result is written.")
    eval: EvalConfig = Field(default=EvalConfig(), description="How the result is measured.")


def load_recipe(
    source: str | Path | Mapping[str, Any] | Recipe,
    overrides: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    *,
    runnable: bool = False,
) -> Recipe:
    """Read a recipe from a YAML file, a packaged recipe's name, a dict or a `Recipe`.

    `settings` replace top-level keys; `overrides` are dotted `key=value` texts (`steps.0.keep=0.5`), their values read
    as YAML, the last one winning over all else. With `runnable`, what `check_tier` refuses is among the mistakes.
    Raises `RecipeError` with every mistake, `UsageError` when there is no such file or packaged recipe.
    """
    document = _read(source)
    for key, value in (settings or {}).items():
        document.set((key,), value)
    document.override(overrides)
    for path, why in _incomplete(document.values):
        document.problem(path, why)
    for path, why in _idle(document.values):
        document.problem(path, f"has no effect: {why}")
    if runnable:
        for path, why in [*_beyond_tier(document.values), *_impossible(document.values)]:
            document.problem(path, why)
        for path, why in _uncalibrated(document.values):
            document.problem(path, f"has no effect: {why}")
    recipe = document.validate(Recipe)
    document.check()
    assert recipe is not None
    return recipe


def load_eval_config(settings: Mapping[str, Any], overrides: Sequence[str] = ()) -> EvalConfig:
    """An `EvalConfig` of `settings` with `key=value` overrides on top; `RecipeError` with every mistake."""
    document = Document(plain(settings))
    document.override(overrides)
    for path, why in _idle_evaluation(document.values, can_draw=False):
        document.problem(path[1:], f"has no effect: {why}")
    config = document.validate(EvalConfig)
    document.check()
    assert config is not None
    return config


def check_tier(recipe: Recipe) -> None:
    """Raise `RecipeError` when a step makes what the recipe's export tier may not hold, or cannot be run at all."""
    document = Document(recipe.model_dump())
    for path, why in [*_beyond_tier(document.values), *_impossible(document.values)]:
        document.problem(path, why)
    document.check()


def packaged_recipes() -> list[tuple[str, str]]:
    """Name and description (its first comment line) of each recipe in the package."""
    files = sorted(RECIPES.glob("*.yaml"))
    return [(file.stem, file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")) for file in files]


def recipe_file(name: str) -> Path:
    """The file of a packaged recipe; `UsageError` with the nearest name when there is none."""
    names = [known for known, _ in packaged_recipes()]
    if name not in names and (Path(name).suffix in (".yaml", ".yml") or len(Path(name).parts) > 1):
        raise UsageError(f"the recipe file {name} does not exist.")
    if name not in names:
        hint = did_you_mean(name, names) or f"; packaged are {', '.join(names)}."
        raise UsageError(f"`{name}` is neither a recipe file nor a packaged recipe{hint}")
    return RECIPES / f"{name}.yaml"


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Recipe.model_json_schema()


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every default that has an effect written out; `load_recipe` reads it back equal."""
    values = recipe.model_dump(mode="json")
    for path, _ in dict.fromkeys([*_idle(values), *_uncalibrated(values)]):
        parent: Any = values
        for key in path[:-1]:
            parent = parent[key]
        parent.pop(path[-1], None)
    text: str = yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)
    return text


def _read(source: str | Path | Mapping[str, Any] | Recipe) -> Document:
    if isinstance(source, Recipe):
        return Document(source.model_dump(exclude_unset=True))
    if isinstance(source, Mapping):
        return Document(plain(source))
    path = Path(source)
    return read_yaml(path if path.is_file() else recipe_file(str(source)))


# Rules between settings. They judge the document as given, so that they are reported beside other mistakes.


def _incomplete(values: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    """Every setting that another one needs."""
    if "calibration" not in values and any(map(_needs_tokens, _steps(values))):
        yield ("calibration",), "missing: the steps measure experts on it; give it a `dataset`"


def _steps(values: Mapping[str, Any]) -> list[Any]:
    steps = values.get("steps")
    return steps if isinstance(steps, list) else []


def _needs_tokens(step: Any) -> bool:
    """Whether a step runs calibration tokens through the model; one that is misspelt may."""
    operation = _operation(step)
    return operation is None or operation.needs_tokens(step)


def _operation(step: Any) -> OperationSettings | None:
    """The settings module of a step's operation, where it names one."""
    op = step.get("op") if isinstance(step, dict) else None
    return OPERATIONS.get(op) if isinstance(op, str) else None


def _idle(values: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    """Every setting that is given and would change nothing, with the reason."""
    model, calibration, evaluation = values.get("model"), values.get("calibration"), values.get("eval")
    if values.get("revision") is not None and isinstance(model, str) and (model == REFERENCE or Path(model).is_dir()):
        yield ("revision",), f"`{model}` is no Hub id"
    if isinstance(calibration, dict):
        yield from _idle_calibration(calibration)
    operations = [_operation(step) for step in _steps(values)]
    for index, (step, operation) in enumerate(zip(_steps(values), operations, strict=True)):
        for key, why in operation.idle(step) if operation is not None else ():
            yield ("steps", index, *key.split(".")), why
    if operations and operations[0] is distill and not _steps(values)[0].get("teacher_model"):
        why = (
            "no step before it has changed the model, so it would learn from itself; put it after one, or name another "
        )
        yield ("steps", 0, "op"), why + "`teacher_model`"
    if isinstance(evaluation, dict):
        yield from _idle_evaluation(evaluation, None in operations or random_word(_steps(values)) is not None)


def _idle_calibration(calibration: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    parts = calibration.get("dataset")
    if not isinstance(parts, list):
        return
    for key in ("split", "text_field", "config_name"):
        if key in calibration:
            yield ("calibration", key), "each item of the `dataset` list has its own"
    if len(parts) == 1 and isinstance(parts[0], dict) and "weight" in parts[0]:
        yield ("calibration", "dataset", 0, "weight"), "there is one data set only"


def _idle_evaluation(evaluation: Mapping[str, Any], can_draw: bool) -> Iterator[tuple[Location, str]]:
    draws = evaluation.get("random_baselines")
    draws_some = isinstance(draws, int) and draws > 0
    misspelt = set(evaluation) - set(EvalConfig.model_fields)  # perhaps `tasks` itself
    if not evaluation.get("tasks") and not misspelt:
        for key in TASK_SETTINGS:
            if key in evaluation:
                yield ("eval", key), "`eval.tasks` is empty"
        if draws_some:
            yield ("eval", "random_baselines"), "`eval.tasks` is empty"
    if draws_some and not can_draw:
        yield ("eval", "random_baselines"), "no step chooses what could be drawn at random, such as experts to drop"


def _uncalibrated(values: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    """The calibration of a run that measures nothing; `score` needs no steps."""
    if "calibration" in values and not values.get("steps") and not set(values) - set(Recipe.model_fields):
        yield ("calibration",), "there are no steps, so no expert is measured"


def _impossible(values: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    """Every step that no model could be run through, with the reason."""
    for index, step in enumerate(_steps(values)):
        found: Iterable[tuple[str, str]] = ()
        if _operation(step) is quantize:
            found = quantize.impossible(step)
        elif _operation(step) is distill:
            found = distill.impossible(step, values.get("calibration"))
        for key, why in found:
            yield ("steps", index, *([key] if key else [])), why


def _beyond_tier(values: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    """Every step, or the tier itself, that cannot be exported as asked, with the reason."""
    export, steps = values.get("export"), _steps(values)
    operations = [_operation(step) for step in steps]
    for index, operation in enumerate(operations[:-1]):
        if operation is not None and operation.LAST is not None:
            yield ("steps", index, "op"), f"`{steps[index]['op']}` must be the last step: {operation.LAST}"
    banked: int | None = None  # the step that left banks
    for index, (step, operation) in enumerate(zip(steps, operations, strict=True)):
        if banked is not None and operation not in (None, distill, quantize):
            why = f"step {banked} leaves routers that choose among more experts than are stored; put it after this one"
            yield ("steps", index, "op"), why
        if operation is not None and operation.leaves_banks(step):
            banked = index
    if isinstance(export, dict) and export.get("tier") == "plugin":
        return
    for index, (step, operation) in enumerate(zip(steps, operations, strict=True)):
        for key, why in operation.beyond_stock(step) if operation is not None else ():
            yield ("steps", index, key), f"step {index} ({step['op']}): {why}; set `export.tier: plugin`"
