"""The figures of a model: costs derived from its configuration, tasks and speed measured, kept on disk and reused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_compress.calibrate.scores import Scores
from moe_compress.checkpoint.index import TensorIndex
from moe_compress.checkpoint.rewrite import dense_config
from moe_compress.checkpoint.source import Checkpoint
from moe_compress.checkpoint.writer import write_json
from moe_compress.compress.quantize.sizes import active_bytes, active_shares
from moe_compress.compress.surroundings import Surroundings
from moe_compress.errors import MeasurementError
from moe_compress.eval.config import EvalConfig
from moe_compress.eval.cost import cost, dense_targets, stored_by_part
from moe_compress.manifest import describe_source, library_versions
from moe_compress.models.layers import PACKED, SECTION, decoder_layers, find_moe_layers, owners
from moe_compress.models.skeleton import build_skeleton
from moe_compress.progress import Stage
from moe_compress.recipe import Recipe
from moe_compress.steps import FIRST_SCORES, make_step, run_step


def measure(
    original: Checkpoint | None, compressed: Checkpoint, config: EvalConfig, folder: Path | None, around: Surroundings
) -> list[dict[str, Any]]:
    """Tasks and speed of the original (when wanted) and the compressed checkpoint; kept in `folder` and reused.

    What cannot be measured costs no result: `not_measured` says why, {"tasks": why, "speed": why}.
    """
    wanted = {"baseline": original if config.baseline else None, "compressed": compressed}
    measured: dict[str, dict[str, Any]] = {"baseline": {}, "compressed": {}}
    for name, checkpoint in wanted.items():
        if checkpoint is not None:
            file = folder / f"{name}.json" if folder is not None else None
            subject = evaluated(checkpoint, config, around)
            found = known(file, subject)
            if found is None:
                found = evaluate(checkpoint, config, around, name)
                if "not_measured" not in found:
                    keep(file, subject, found)
            measured[name] = found
    if config.speed:
        from moe_compress.eval.speed import measure_speed

        folders = {name: checkpoint.folder for name, checkpoint in wanted.items() if checkpoint is not None}
        with around.progress.stage("speed", 1, "measurement") as stage:
            for name, speed in measure_speed(folders, device=around.device).items():
                reasons = measured[name].get("not_measured", {}) | speed.get("not_measured", {})
                measured[name] |= speed | ({"not_measured": reasons} if reasons else {})
            stage.advance()
    return [measured["baseline"], measured["compressed"]]


def known(file: Path | None, subject: dict[str, Any]) -> dict[str, Any] | None:
    """What `keep` wrote to `file`, if it was found on the same subject."""
    content = json.loads(file.read_text(encoding="utf-8")) if file is not None and file.exists() else None
    if not isinstance(content, dict) or content.get("subject") != json.loads(json.dumps(subject)):
        return None
    found: dict[str, Any] = content["found"]
    return found


def keep(file: Path | None, subject: dict[str, Any], found: dict[str, Any]) -> None:
    """Note what was found, and on what."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"subject": subject, "found": found})


def evaluated(checkpoint: Checkpoint, config: EvalConfig, around: Surroundings) -> dict[str, Any]:
    """All that decides the results of `evaluate`."""
    versions = library_versions()
    return {
        "checkpoint": describe_source(checkpoint),
        "eval": config.model_dump(mode="json", exclude={"baseline", "random_baselines", "speed"}),
        "device": around.device,
        "versions": {name: versions[name] for name in ("torch", "transformers", "lm_eval")},
    }


def evaluate(checkpoint: Checkpoint, config: EvalConfig, around: Surroundings, name: str) -> dict[str, Any]:
    """Tasks and settings as the harness returns them, or why there are none; nothing when no task is wanted."""
    from moe_compress.eval.harness import evaluate as run_tasks

    if not config.tasks:
        return {}
    stage: Stage | None = None
    shown = announced = 0
    with ExitStack() as opened:

        def tell(done: int, total: int) -> None:
            nonlocal stage, shown, announced
            if total > announced:  # requests of another kind begin, at another speed
                opened.close()
                stage = opened.enter_context(around.progress.stage(f"eval {name}", total - announced, "request"))
                announced = total
            while stage is not None and shown < done:
                shown += 1
                stage.advance()

        try:
            return run_tasks(checkpoint.folder, config, around.device, tell)
        except MeasurementError as error:
            return {"not_measured": {"tasks": str(error)}}


def model_figures(checkpoint: Checkpoint, measured: dict[str, Any]) -> dict[str, Any]:
    """M of `report.json`: costs derived from the configuration, the rest as measured."""
    config = dense_config(checkpoint.config)
    costs = cost(config, stored_bytes=checkpoint.index.nbytes)
    figures = cost_figures(costs.to_dict()) | {"bytes_by_part": stored_by_part(config, checkpoint.index)}
    if is_quantized(checkpoint.config):
        figures["active_bytes_per_token"] -= saved_per_token(config, checkpoint.index)
    return figures | {key: value for key, value in measured.items() if key != "settings"}


def is_quantized(config: Any) -> bool:
    """Whether the checkpoint stores weights in fewer bits than its dtype has."""
    return PACKED in (getattr(config, SECTION, None) or {}) or getattr(config, "quantization_config", None) is not None


def saved_per_token(config: Any, index: TensorIndex) -> int:
    """Bytes that a token no longer reads because weights are packed; a layer's experts are taken to be used alike.

    What the model does not know, prediction heads for instance, is read by no token.
    """
    skeleton: Any = build_skeleton(config, dtype=config.get_text_config().dtype)
    layers = {layer.layer: layer for layer in find_moe_layers(skeleton)}
    borrowed = owners(config)
    dense = {id(tensor): tensor.nbytes for tensor in skeleton.state_dict(keep_vars=True).values()}
    saved_experts = {}
    for number, layer in layers.items():
        if number not in borrowed:
            saved_experts[number] = sum(dense.pop(id(tensor)) for tensor in layer.expert_tensors().values())
    saved: int = sum(dense.values()) - _saved_lookups(skeleton, index)
    prefix = f"{decoder_layers(skeleton)[0]}."
    for name, target in dense_targets(skeleton, index).items():
        # the tier `plugin` calls experts' matrices what the model calls them
        places = [place for place in (target, name) if place.startswith(prefix)]
        numbers = [int(place.removeprefix(prefix).partition(".")[0]) for place in places]
        inside = [n for n, place in zip(numbers, places, strict=True)
                  if n in saved_experts and place.startswith(f"{layers[n].experts_name}.")]  # fmt: skip
        if inside:
            saved_experts[inside[0]] -= index[name].nbytes
        elif target:
            saved -= index[name].nbytes
    return round(saved + active_bytes(saved_experts, active_shares(layers.values(), borrowed)))


def _saved_lookups(skeleton: Any, index: TensorIndex) -> int:
    """Bytes saved in embeddings that are only looked up, which a token does not read."""
    embeddings = skeleton.get_input_embeddings()
    if embeddings.weight is skeleton.get_output_embeddings().weight:
        return 0
    path = next(name for name, module in skeleton.named_modules() if module is embeddings)
    stored = sum(info.nbytes for name, info in index.items() if name.startswith(f"{path}."))
    return int(embeddings.weight.nbytes) - stored


def cost_figures(costs: dict[str, Any]) -> dict[str, Any]:
    """The costs that `report.json` holds of a model."""
    keys = ("total_params", "active_params", "stored_bytes", "active_bytes_per_token", "flops_per_token",
            "decode_flops_per_token", "expert_flops_per_token", "kv_bytes_per_token", "context", "notes")  # fmt: skip
    by_part = {"params_by_part": costs["params"], "flops_by_part": costs["prefill_flops"]}
    figures = {key: costs[key] for key in keys} | {"experts_per_token_mean": costs["experts_per_token"]}
    return figures | {key: {part: n for part, n in parts.items() if n} for key, parts in by_part.items()}


def random_baselines(recipe: Recipe, source: Checkpoint, work: Path, around: Surroundings) -> Iterator[dict[str, Any]]:
    """The evaluation of the recipe with its choices drawn at random, at its own budgets, one per seed.

    The first step takes the scores of the run, which say what super experts are. Experts that saw few tokens are no
    reason to refuse what was drawn.
    """
    steps = {"steps": [step.model_dump(mode="json") for step in recipe.steps]}
    subject = evaluated(source, recipe.eval, around) | steps
    lenient = around.calibration.model_copy(update={"min_tokens_per_expert": 0})
    around = replace(around, calibration=lenient, original=source)
    for seed in range(recipe.eval.random_baselines):
        file = work / "eval" / f"random-{seed}.json"
        figures = known(file, subject)
        if figures is None:
            title, current = f"random seed {seed}", source
            for number, settings in enumerate(recipe.steps):
                folder, step = work / f"random-{seed}-{number}", make_step(settings)
                if number == 0 and (work / FIRST_SCORES / "scores.json").exists():
                    scores = Scores.load(work / FIRST_SCORES)
                    replace(scores, min_tokens_per_expert=0).save(folder / "scores")
                current = run_step(step.at_random(seed) or step, current, folder, around, title)
            found = evaluate(current, recipe.eval.model_copy(update={"speed": False}), around, title)
            figures = {"seed": seed} | model_figures(current, found)
            keep(file, subject, figures)
            for folder in work.glob(f"random-{seed}-*"):
                shutil.rmtree(folder)
        yield figures
