"""`recipes ls`, `show`, `cp`, `schema`: the packaged recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_compress.errors import UsageError
from moe_compress.verbs.base import examples, guarded

verbs = typer.Typer(help="List, read and copy the packaged recipes.", no_args_is_help=True)


@verbs.command("ls", epilog=examples("moe-compress recipes ls"))
@guarded
def recipes_ls() -> None:
    """List the packaged recipes."""
    from moe_compress import console
    from moe_compress.recipe import packaged_recipes

    console.print_table([["recipe", "what it does"], *map(list, packaged_recipes())])


@verbs.command("show", epilog=examples("moe-compress recipes show prune-reap-25"))
@guarded
def recipes_show(name: Annotated[str, typer.Argument(help="A packaged recipe.")]) -> None:
    """Print a packaged recipe."""
    from moe_compress.recipe import recipe_file

    typer.echo(recipe_file(name).read_text(encoding="utf-8"), nl=False)


@verbs.command("cp", epilog=examples("moe-compress recipes cp prune-reap-25 mine.yaml"))
@guarded
def recipes_cp(
    name: Annotated[str, typer.Argument(help="A packaged recipe.")],
    dest: Annotated[Path, typer.Argument(help="The new file, or the folder to put it in.")],
) -> None:
    """Copy a packaged recipe, to change it and keep it."""
    from moe_compress.recipe import recipe_file

    source = recipe_file(name)
    target = dest / source.name if dest.is_dir() else dest
    if target.exists():
        raise UsageError(f"{target} exists already; remove it or choose another name.")
    if not target.parent.is_dir():
        raise UsageError(f"the folder {target.parent} does not exist; create it first.")
    target.write_bytes(source.read_bytes())
    typer.echo(f"{target}\nfor completion in an editor: moe-compress recipes schema > recipe.schema.json")


@verbs.command("schema", epilog=examples("moe-compress recipes schema > recipe.schema.json"))
@guarded
def recipes_schema() -> None:
    """Print the JSON schema of recipes, for completion in an editor."""
    from moe_compress import console
    from moe_compress.recipe import recipe_schema

    console.print_json(recipe_schema())
