"""Verbs that compress: score, plan, run, demo."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_compress.errors import NoAllocationError, UsageError, VerificationError
from moe_compress.verbs.base import (
    COMPRESS,
    AsJson,
    Debug,
    Device,
    Force,
    Hours,
    Overrides,
    RecipeArgument,
    Resume,
    ScoresOption,
    Work,
    examples,
    guarded,
    interruptible,
)

verbs = typer.Typer()


@verbs.command(
    rich_help_panel=COMPRESS,
    epilog=examples(
        "moe-compress score prune-reap-25 scores",
        "moe-compress score mine.yaml scores calibration.num_samples=512",
        "moe-compress run mine.yaml out --scores scores steps.0.keep=0.5",
    ),
)
@guarded
def score(
    recipe: RecipeArgument,
    work: Annotated[Path, typer.Argument(help="Folder for the scores.", metavar="WORK")],
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Start over, whatever scores are in WORK.")] = False,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Measure every expert on the calibration tokens, once for all later plans and runs."""
    from moe_compress import console, pipeline
    from moe_compress.progress import progress_for_terminal
    from moe_compress.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    again = ["moe-compress", "score", recipe, str(work), *(overrides or ())]
    again += ["--device", device] * (device != "auto")
    with interruptible(work, f"continue with: {shlex.join(again)}"):
        scores = pipeline.score(loaded, work, force=force, device=device, progress=progress_for_terminal())
    console.print_score_summary(scores.summary())
    command = shlex.join(["moe-compress", "plan", recipe, "--scores", str(work), *(overrides or ())])
    typer.echo(f"scores are in {work}; next: {command}")


@verbs.command(
    rich_help_panel=COMPRESS,
    epilog=examples(
        "moe-compress plan prune-reap-25",
        "moe-compress plan prune-reap-25 --scores scores steps.0.keep=0.5",
        "moe-compress plan mine.yaml --scores scores steps.0.scope=global --json",
        "moe-compress plan mine.yaml model=./only-a-config-json --hours",
    ),
)
@guarded
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    scores: Annotated[
        Path | None, typer.Option(help="Folder that `score` wrote; without it only sizes are predicted.")
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            help="All budgets from A to B in steps of C, as `average_bits=1.6:4:0.2`.", metavar="BUDGET=A:B:C"
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="File for what --sweep finds, JSON or CSV (default: frontier.json in the folder of the scores)."
        ),
    ] = None,
    hours: Hours = False,
    device: Device = "auto",
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what would happen to every expert, with the predicted sizes; touches no weights."""
    from moe_compress import console, pipeline
    from moe_compress.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    if sweep is not None:
        from moe_compress.settings import parse_range

        if scores is None:
            raise UsageError("--sweep needs the costs that `moe-compress score` measures; name them with --scores.")
        if hours:
            raise UsageError("--hours has no effect with --sweep.")
        setting, values = parse_range(sweep)
        found = pipeline.sweep(loaded, scores, setting, values, output or scores / "frontier.json")
        console.print_json(found) if json else console.print_frontier(setting, found)
        if all(entry["infeasible"] for entry in found):
            raise NoAllocationError("no budget of the sweep can be met; raise its end.")
        return
    if output is not None:
        raise UsageError("--output has no effect without --sweep.")
    planned = pipeline.plan(loaded, scores=scores, device=device, clocked_at=Path.cwd() if hours else None)
    console.print_json(planned) if json else console.print_plan(planned)


@verbs.command(
    rich_help_panel=COMPRESS,
    epilog=examples(
        "moe-compress run prune-reap-25 out",
        "moe-compress run prune-reap-25 out model=./checkpoint steps.0.keep=0.5",
        "moe-compress run prune-reap-25 out 'eval.tasks=[gsm8k, arc_easy]'",
        "moe-compress run mine.yaml out --scores scores --dry-run",
        "moe-compress run mine.yaml out --resume",
    ),
)
@guarded
def run(
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Argument(help="Folder for the new checkpoint and its report.", metavar="OUT")],
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and plan, write nothing.")] = False,
    hours: Hours = False,
    resume: Resume = False,
    force: Force = False,
    work: Work = None,
    keep_steps: Annotated[
        bool, typer.Option("--keep-steps", help="Keep the checkpoint after each step in the work folder.")
    ] = False,
    scores: ScoresOption = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Compress, verify, evaluate and report, start to finish."""
    from moe_compress.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or (), runnable=True)
    options: dict[str, Any] = {"resume": resume, "force": force, "keep_steps": keep_steps, "scores": scores}
    if dry_run:
        from moe_compress import console, pipeline

        console.print_plan(pipeline.dry_run(loaded, out, work=work, **options, device=device, hours=hours))
        typer.echo(f"a dry run: nothing was written to {out}.")
        return
    if hours:
        raise UsageError("--hours has no effect without --dry-run.")
    again = ["moe-compress", "run", recipe, str(out), *(overrides or ()), "--resume", *["--force"] * force]
    again += ["--work", str(work)] * (work is not None) + ["--keep-steps"] * keep_steps
    again += ["--scores", str(scores)] * (scores is not None) + ["--device", device] * (device != "auto")
    run_recipe(loaded, out, again, work=work, **options, device=device)


def run_recipe(loaded: Any, out: Path, again: list[str], *, work: Path | None = None, **options: Any) -> None:
    """Run a loaded recipe and print its report; an interrupt says how to continue (`again`)."""
    from moe_compress import console, workspace
    from moe_compress.progress import progress_for_terminal

    state = workspace.places(out, work)[1]
    try:
        with interruptible(state, f"continue with: {shlex.join(again)}"):
            from moe_compress import pipeline

            report = pipeline.run(loaded, out, work=work, progress=progress_for_terminal(), **options)
    except VerificationError as error:
        console.print_checks(error.checks)
        raise
    console.print_report(report)
    typer.echo(f"checkpoint: {out}\nreport: {out / 'report.html'}, as text in {out / 'report.md'}")


@verbs.command(
    rich_help_panel=COMPRESS,
    epilog=examples("moe-compress demo", "moe-compress demo demo-out --force"),
)
@guarded
def demo(
    out: Annotated[Path, typer.Argument(help="Folder for the result.", metavar="[OUT]")] = Path("demo-out"),
    resume: Resume = False,
    force: Force = False,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Prune the built-in model to 75 % of its experts and show what that cost; offline, in minutes."""
    from moe_compress.recipe import load_recipe

    again = ["moe-compress", "demo", str(out), "--resume", *["--force"] * force]
    again += ["--device", device] * (device != "auto")
    run_recipe(load_recipe("demo", runnable=True), out, again, resume=resume, force=force, device=device)
