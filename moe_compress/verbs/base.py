"""What the verbs of the command line share: their options, how errors become sentences, how examples are shown."""

from __future__ import annotations

import functools
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from moe_compress import __version__
from moe_compress.errors import MoECompressError, RecipeError

Verb = TypeVar("Verb", bound=Callable[..., None])

LOOK, COMPRESS, MEASURE, PUBLISH = "Look", "Compress", "Measure", "Publish"  # help panels


def examples(*lines: str) -> str:
    """An epilog with one example per line; `[` is escaped, since help is rich markup."""
    return "[bold]Examples[/bold]\n" + "\n".join(f"  {line}" for line in lines).replace("[", r"\[")


def guarded(verb: Verb) -> Verb:
    """Turn what a verb raises into a sentence on stderr and an exit code; `--debug` adds the traceback.

    SIGTERM, by which schedulers end a job, is an interrupt like Ctrl-C.
    """

    @functools.wraps(verb)
    def call(*args: Any, **options: Any) -> None:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            verb(*args, **options)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            complain("interrupted.")
            raise typer.Exit(130) from None
        except Exception as error:
            if options.get("debug"):
                traceback.print_exc()
            if isinstance(error, RecipeError):
                complain(list_mistakes(error, str(options.get("recipe", "the settings"))))
            elif isinstance(error, MoECompressError):
                complain(str(error))
            else:
                advice = " (run again with --debug for the traceback)" if "debug" in options else ""
                complain(f"unexpected error: {str(error).strip() or type(error).__name__}{advice}")
            raise typer.Exit(getattr(error, "exit_code", 1)) from None
        finally:
            signal.signal(signal.SIGTERM, before)

    return call  # type: ignore[return-value]


def list_mistakes(error: RecipeError, source: str) -> str:
    """All mistakes of `source`, one on a line."""
    if len(error.problems) == 1:
        return f"{source}: {error}"
    return "".join([f"{len(error.problems)} mistakes in {source}:", *(f"\n  {problem}" for problem in error.problems)])


def complain(message: str) -> None:
    """One message on stderr."""
    typer.secho("error: ", fg=typer.colors.RED, bold=True, err=True, nl=False)
    typer.echo(message, err=True)


@contextmanager
def interruptible(place: Path, advice: str) -> Iterator[None]:
    """An interrupt says how to go on with what is kept in `place`, if anything is."""
    try:
        yield
    except KeyboardInterrupt:
        kept = f"what is done is kept in {place}; {advice}"
        complain(f"interrupted; {kept if place.exists() else 'nothing was written yet.'}")
        raise typer.Exit(130) from None


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moe-compress {__version__}")
        raise typer.Exit


Model = Annotated[str, typer.Argument(help="Hub id, folder, or `reference`.", metavar="MODEL")]
RecipeArgument = Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged recipe.", metavar="RECIPE")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings that win over the recipe's, such as `steps.0.keep=0.5`.", metavar="KEY=VALUE"),
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where tensors are computed.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue where an interrupted run stopped.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT; the old one stays until the new one is complete.")]
ScoresOption = Annotated[
    Path | None,
    typer.Option(help="Folder that `score` wrote for this model and calibration; nothing is measured anew."),
]
Hours = Annotated[bool, typer.Option("--hours", help="Look at this machine for two seconds and estimate the time.")]
Work = Annotated[Path | None, typer.Option(help="Folder for intermediate results.", show_default="OUT.work")]
