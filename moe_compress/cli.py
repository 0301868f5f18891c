"""The command line: one command per verb. It parses, calls and prints; what a verb does is `pipeline.py`.

Nothing heavy is imported before a verb runs, so that `--help` answers at once. Errors are one sentence on stderr, and
the exit code is that of their class: 0 done, 1 failed, 2 wrong arguments or recipe, 3 a check failed, 130 interrupted.
"""

from __future__ import annotations

from typing import Annotated

import typer

from moe_compress.verbs import compress, look, measure, publish, recipes
from moe_compress.verbs.base import LOOK, print_version

app = typer.Typer(
    name="moe-compress",
    help="Make Mixture-of-Experts checkpoints smaller, and show what it cost.",
    epilog="Start with [bold]moe-compress demo[/bold]: a built-in model, offline, in minutes.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """Make Mixture-of-Experts checkpoints smaller, and show what it cost."""


for panel in (look, compress, measure, publish):
    app.add_typer(panel.verbs)
app.add_typer(recipes.verbs, name="recipes", rich_help_panel=LOOK)
