"""Verbs that measure and tell: eval, verify, audit, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moe_compress.errors import UsageError, VerificationError
from moe_compress.verbs.base import (
    MEASURE,
    AsJson,
    Debug,
    Device,
    Overrides,
    RecipeArgument,
    ScoresOption,
    examples,
    guarded,
    interruptible,
)

verbs = typer.Typer()


@verbs.command(
    "eval",
    rich_help_panel=MEASURE,
    epilog=examples(
        "moe-compress eval reference --tasks reference",
        "moe-compress eval out --baseline ./original --tasks gsm8k --limit 100",
        "moe-compress eval out --tasks gsm8k num_fewshot=5 --output results",
    ),
)
@guarded
def evaluate(
    ckpt: Annotated[str, typer.Argument(help="Hub id, folder, or `reference`.", metavar="CKPT")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Other settings of a recipe's `eval`, such as `num_fewshot=5`.", metavar="KEY=VALUE"),
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="The original to compare with.", metavar="MODEL")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="lm-eval tasks, comma-separated; without any, only size and speed.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents per task.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the results.")] = None,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Measure a checkpoint: accuracy, size and speed, beside its original's."""
    from moe_compress import console, pipeline
    from moe_compress.progress import progress_for_terminal
    from moe_compress.recipe import load_eval_config

    named = {"tasks": tasks and [task.strip() for task in tasks.split(",") if task.strip()], "limit": limit}
    config = load_eval_config({key: value for key, value in named.items() if value is not None}, overrides or ())
    progress = progress_for_terminal()
    console.print_report(
        pipeline.evaluate_checkpoint(
            ckpt, baseline=baseline, config=config, output=output, device=device, progress=progress
        )
    )


@verbs.command(rich_help_panel=MEASURE, epilog=examples("moe-compress verify out"))
@guarded
def verify(
    out: Annotated[Path, typer.Argument(help="A folder that `run` wrote.", metavar="OUT")], debug: Debug = False
) -> None:
    """Check a result again: hashes, keys, logits in a fresh process, coverage, target."""
    from moe_compress import console, pipeline
    from moe_compress.progress import progress_for_terminal

    try:
        checks = pipeline.verify(out, progress=progress_for_terminal())
    except VerificationError as error:
        console.print_checks(error.checks)
        raise
    console.print_checks(checks)


@verbs.command(
    rich_help_panel=MEASURE,
    epilog=examples(
        "moe-compress audit prune-reap-25 audit",
        "moe-compress audit mine.yaml audit --layers 6 --experts 12 --scores scores",
        "moe-compress audit mine.yaml audit --experts all",
        "moe-compress run mine.yaml out --scores audit steps.0.criterion=ablation",
    ),
)
@guarded
def audit(
    recipe: RecipeArgument,
    work: Annotated[Path, typer.Argument(help="Folder for the scores and what is found.", metavar="WORK")],
    overrides: Overrides = None,
    experts: Annotated[str, typer.Option(help="Experts to take out in each layer, or `all`.", metavar="N")] = "8",
    layers: Annotated[int | None, typer.Option(help="Layers to look at, spread evenly (default: all).")] = None,
    sequences: Annotated[int, typer.Option(help="Held-out sequences that the loss is measured on.")] = 32,
    held_out: Annotated[
        str | None,
        typer.Option(help="Other data for the loss (default: documents that calibration leaves).", metavar="DATASET"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sample of experts.")] = 0,
    scores: ScoresOption = None,
    force: Annotated[bool, typer.Option("--force", help="Start over, whatever is in WORK.")] = False,
    device: Device = "auto",
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Take experts out for real, and see whether any criterion knew which ones matter."""
    from moe_compress import console
    from moe_compress.auditing import audit as auditing
    from moe_compress.progress import progress_for_terminal
    from moe_compress.recipe import load_recipe

    if experts != "all" and not experts.isdecimal():
        raise UsageError(f"--experts {experts}: should be a number, or `all`.")
    settings = auditing.AuditSettings(None if experts == "all" else int(experts), layers, sequences, held_out, seed)
    loaded = load_recipe(recipe, overrides or ())
    options: dict[str, Any] = {"scores": scores, "force": force, "device": device}
    with interruptible(work, "run the same command again to go on."):
        found = auditing.audit(loaded, work, settings, **options, progress=progress_for_terminal())
    if json:
        console.print_json(found)
        return
    console.print_audit(found)
    typer.echo(f"audit: {work / 'audit.md'}; the scores there hold the measured importances too")


@verbs.command(
    rich_help_panel=MEASURE,
    epilog=examples(
        "moe-compress report out",
        "moe-compress report out --output page.html",
        "moe-compress report keep-75 keep-50 w4 --output frontier.html",
    ),
)
@guarded
def report(
    outs: Annotated[list[Path], typer.Argument(help="Folders that `run` or `eval --output` wrote.", metavar="OUT")],
    output: Annotated[
        Path | None,
        typer.Option(help="File for the page (default: report.html in OUT, or comparison.html here for several)."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write the page about one result, or one that compares several; measures nothing."""
    from moe_compress.report.page import write_page

    typer.echo(f"report: {write_page(outs, output)}")
