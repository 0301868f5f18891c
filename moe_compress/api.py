"""The verbs as functions: what `from moe_compress import run` gives. They raise `MoECompressError`, they print nothing.

A recipe is a YAML file, a packaged name, a dict or a `Recipe`. `overrides` are the command line's dotted `key=value`
texts; keyword arguments that are no option of the function replace top-level settings of the recipe
(`run("demo", "out", model="./mine", overrides=["steps.0.keep=0.5"])`). Overrides win over keywords, keywords over the
recipe, the recipe over defaults.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_compress.eval.config import EvalConfig
from moe_compress.progress import Progress
from moe_compress.recipe import Recipe, load_eval_config, load_recipe

if TYPE_CHECKING:
    from moe_compress.calibrate.scores import Scores

RecipeSource = str | Path | Mapping[str, Any] | Recipe


def inspect(model: str | Path, *, revision: str | None = None, scores: str | Path | None = None) -> dict[str, Any]:
    """A checkpoint's architecture, experts, parameters, bytes and FLOPs per token; reads no weights.

    With `scores` of this model its routing health too.
    """
    from moe_compress import pipeline

    return pipeline.inspect(str(model), revision=revision, scores=None if scores is None else Path(scores))


def validate(recipe: RecipeSource, overrides: Sequence[str] = (), **settings: Any) -> Recipe:
    """The recipe, resolved; `RecipeError` holds every mistake, what its export tier cannot hold included.

    A model that lies on this disk is held against the steps: `UsageError` and `UnsupportedModelError` as from `run`.
    """
    loaded = load_recipe(recipe, overrides, settings, runnable=True)
    from moe_compress import preview

    preview.foresee(loaded)
    return loaded


def score(
    recipe: RecipeSource,
    work: str | Path,
    *,
    overrides: Sequence[str] = (),
    force: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
    **settings: Any,
) -> Scores:
    """Measure every expert on the calibration tokens and keep the scores in the folder `work`.

    What an interrupted call measured is continued, unless `force` starts over.
    """
    from moe_compress import pipeline

    loaded = load_recipe(recipe, overrides, settings)
    return pipeline.score(loaded, Path(work), force=force, device=device, progress=progress)


def plan(
    recipe: RecipeSource,
    *,
    scores: str | Path | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    hours: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """What would happen to every expert, the predicted sizes, and the memory a run takes; without `scores` no names.

    With `hours` the machine is looked at for two seconds, and `time` says how long the run takes.
    """
    from moe_compress import pipeline

    loaded = load_recipe(recipe, overrides, settings)
    folder, place = None if scores is None else Path(scores), Path.cwd() if hours else None
    return pipeline.plan(loaded, scores=folder, device=device, clocked_at=place)


def run(
    recipe: RecipeSource,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    force: bool = False,
    work: str | Path | None = None,
    keep_steps: bool = False,
    scores: str | Path | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Compress, verify, evaluate and report; returns the report that is written to `out/report.json`.

    `scores` is a folder that `score` wrote for the same model and calibration: the first step takes them as they are.
    Raises `RecipeError` before anything is read, `ResumeError` when `resume` finds another run's state, and
    `VerificationError` when a check fails (`out` does not appear then).
    """
    from moe_compress import pipeline

    return pipeline.run(
        load_recipe(recipe, overrides, settings, runnable=True),
        Path(out),
        resume=resume,
        force=force,
        work=None if work is None else Path(work),
        keep_steps=keep_steps,
        scores=None if scores is None else Path(scores),
        device=device,
        progress=progress,
    )


def evaluate(
    ckpt: str | Path,
    *,
    baseline: str | Path | None = None,
    config: EvalConfig | Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Measure a checkpoint, and its original beside it; `config` and keywords are settings of a recipe's `eval`."""
    from moe_compress import pipeline

    given = config.model_dump(exclude_unset=True) if isinstance(config, EvalConfig) else dict(config or {})
    return pipeline.evaluate_checkpoint(
        str(ckpt),
        baseline=None if baseline is None else str(baseline),
        config=load_eval_config(given | settings),
        output=None if output is None else Path(output),
        device=device,
        progress=progress,
    )


def audit(
    recipe: RecipeSource,
    work: str | Path,
    *,
    overrides: Sequence[str] = (),
    experts: int | None = 8,
    layers: int | None = None,
    sequences: int = 32,
    held_out: str | None = None,
    seed: int = 0,
    scores: str | Path | None = None,
    force: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Take `experts` of each layer out one by one (all if None), and say how well every criterion ranks them by it.

    Returns what is written to `work/audit.json`; the folder `work` also serves as `scores` of a run. An interrupted
    audit goes on when the same call is made again.
    """
    from moe_compress.auditing import audit as auditing

    chosen = auditing.AuditSettings(experts, layers, sequences, held_out, seed)
    return auditing.audit(
        load_recipe(recipe, overrides, settings),
        Path(work),
        chosen,
        scores=None if scores is None else Path(scores),
        force=force,
        device=device,
        progress=progress,
    )


def write_page(*outs: str | Path, output: str | Path | None = None) -> Path:
    """Write the HTML page about one result, or comparing several, and return where it is.

    Without `output` the page of one result is `report.html` in its folder, that of several `comparison.html` in the
    current one.
    """
    from moe_compress.report import page

    return page.write_page([Path(out) for out in outs], None if output is None else Path(output))


def verify(out: str | Path, *, progress: Progress | None = None) -> dict[str, dict[str, Any]]:
    """Check a folder that `run` wrote; `VerificationError` when a check fails."""
    from moe_compress import pipeline

    return pipeline.verify(Path(out), progress=progress)


def push(
    out: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Push a folder that `run` wrote to the Hub, as one commit; a dry run only tells what would be done.

    Returns what is in `files` (bytes by name), where it went (`repo_id`, `revision`, `private`, `url`, `commit`), and
    what was removed there and left out here. `token` is the one of `hf auth login` or HF_TOKEN unless given. Raises
    `VerificationError` when the folder is not the one that was verified, `UsageError` for a repository that holds
    another checkpoint (unless `force`), `PublishError` for all that the Hub refuses.
    """
    from moe_compress.publish import push as publishing

    return publishing.push(
        Path(out),
        repo_id,
        private=private,
        revision=revision,
        force=force,
        dry_run=dry_run,
        token=token,
        progress=progress,
    )
