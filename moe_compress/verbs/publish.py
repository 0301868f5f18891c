"""The verb that publishes: push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moe_compress.verbs.base import (
    PUBLISH,
    Debug,
    complain,
    examples,
    guarded,
)

verbs = typer.Typer()


@verbs.command(
    rich_help_panel=PUBLISH,
    epilog=examples(
        "moe-compress push out me/olmoe-48 --dry-run",
        "moe-compress push out me/olmoe-48 --private",
        "moe-compress push out me/olmoe-48 --revision keep-75",
    ),
)
@guarded
def push(
    out: Annotated[Path, typer.Argument(help="A folder that `run` wrote.", metavar="OUT")],
    repo_id: Annotated[str, typer.Argument(help="The repository on the Hub: owner/name.", metavar="REPO_ID")],
    private: Annotated[bool, typer.Option("--private", help="Make the new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to push to; it is made when missing.", show_default="main")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace weights of another origin; they stay in the history.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and say what would be uploaded; send nothing.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Publish a result on the Hub, as one commit, if it is the one that was verified.

    Log in with `hf auth login`, or set HF_TOKEN. A push that broke off goes on when it is repeated.
    """
    from moe_compress import console
    from moe_compress.progress import progress_for_terminal
    from moe_compress.publish import push as publishing
    from moe_compress.publish.hub import Hub

    hub, progress = Hub(), progress_for_terminal()
    options: dict[str, Any] = {"private": private, "revision": revision, "force": force, "dry_run": dry_run}
    planned = publishing.prepare(out, repo_id, hub, **options, progress=progress)
    console.print_push(planned.to_json(), hub.url)
    if dry_run:
        typer.echo("a dry run: nothing was sent.")
        return
    try:
        done = publishing.upload(planned, hub, progress)
    except KeyboardInterrupt:
        complain(
            "interrupted; unless the commit was made nothing is visible yet, and what arrived whole is not sent again; "
            "repeat it."
        )
        raise typer.Exit(130) from None
    typer.echo(f"{done['url']}\ncommit: {done['commit']}")
