"""Verbs that look: inspect, validate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_compress.verbs.base import LOOK, AsJson, Debug, Model, Overrides, RecipeArgument, examples, guarded

verbs = typer.Typer()


@verbs.command(
    rich_help_panel=LOOK,
    epilog=examples(
        "moe-compress inspect reference",
        "moe-compress inspect allenai/OLMoE-1B-7B-0924 --revision main",
        "moe-compress inspect ./checkpoint --json",
        "moe-compress inspect ./checkpoint --scores scores",
    ),
)
@guarded
def inspect(
    model: Model,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    scores: Annotated[Path | None, typer.Option(help="Folder that `score` wrote: shows routing health too.")] = None,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show a checkpoint's architecture, experts, parameters, bytes and FLOPs per token."""
    from moe_compress import console, pipeline

    facts = pipeline.inspect(model, revision=revision, scores=scores)
    console.print_json(facts) if json else console.print_inspection(facts)


@verbs.command(
    rich_help_panel=LOOK,
    epilog=examples(
        "moe-compress validate prune-reap-25",
        "moe-compress validate mine.yaml model=./checkpoint steps.0.keep=0.5",
    ),
)
@guarded
def validate(recipe: RecipeArgument, overrides: Overrides = None, debug: Debug = False) -> None:
    """Show every mistake in a recipe at once; reads no weights.

    If there is none and the model lies on this disk, its configuration is held against the steps.
    """
    from moe_compress.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or (), runnable=True)
    from moe_compress import preview

    for warning in preview.foresee(loaded):
        typer.echo(f"warning: {warning}")
    steps = [step.op for step in loaded.steps]
    typer.echo(f"{recipe} is valid: {' -> '.join(steps) or 'no steps, the checkpoint is copied unchanged'}.")
