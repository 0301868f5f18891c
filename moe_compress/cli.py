"""The command line: one command per verb. It parses, calls and prints; what a verb does is `pipeline.py`.

Nothing heavy is imported before a verb runs, so that `--help` answers at once. Errors are one sentence on stderr, and
the exit code is that of their class: 0 done, 1 failed, 2 wrong arguments or recipe, 3 a check failed, 130 interrupted.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_compress.cli_base import (
    COMPRESS,
    LOOK,
    MEASURE,
    PUBLISH,
    AsJson,
    Debug,
    Device,
    Force,
    Hours,
    Model,
    Overrides,
    RecipeArgument,
    Resume,
    ScoresOption,
    Work,
    complain,
    examples,
    guarded,
    print_version,
)
from moe_compress.errors import NoAllocationError, UsageError, VerificationError

app = typer.Typer(
    name="moe-compress",
    help="Make Mixture-of-Experts checkpoints smaller, and show what it cost.",
    epilog="Start with [bold]moe-compress demo[/bold]: a built-in model, offline, in minutes.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="List, read and copy the packaged recipes.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes", rich_help_panel=LOOK)


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """Make Mixture-of-Experts checkpoints smaller, and show what it cost."""


@app.command(
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


@recipes_app.command("ls", epilog=examples("moe-compress recipes ls"))
@guarded
def recipes_ls() -> None:
    """List the packaged recipes."""
    from moe_compress import console
    from moe_compress.recipe import packaged_recipes

    console.print_table([["recipe", "what it does"], *map(list, packaged_recipes())])


@recipes_app.command("show", epilog=examples("moe-compress recipes show prune-reap-25"))
@guarded
def recipes_show(name: Annotated[str, typer.Argument(help="A packaged recipe.")]) -> None:
    """Print a packaged recipe."""
    from moe_compress.recipe import recipe_file

    typer.echo(recipe_file(name).read_text(encoding="utf-8"), nl=False)


@recipes_app.command("cp", epilog=examples("moe-compress recipes cp prune-reap-25 mine.yaml"))
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


@recipes_app.command("schema", epilog=examples("moe-compress recipes schema > recipe.schema.json"))
@guarded
def recipes_schema() -> None:
    """Print the JSON schema of recipes, for completion in an editor."""
    from moe_compress import console
    from moe_compress.recipe import recipe_schema

    console.print_json(recipe_schema())


@app.command(
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


@app.command(
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
    try:
        scores = pipeline.score(loaded, work, force=force, device=device, progress=progress_for_terminal())
    except KeyboardInterrupt:
        again = ["moe-compress", "score", recipe, str(work), *(overrides or ())] + ["--device", device] * (
            device != "auto"
        )
        kept = f"what is done is kept in {work}; continue with: {shlex.join(again)}"
        complain(f"interrupted; {kept if work.exists() else 'nothing was written yet.'}")
        raise typer.Exit(130) from None
    console.print_score_summary(scores.summary())
    command = shlex.join(["moe-compress", "plan", recipe, "--scores", str(work), *(overrides or ())])
    typer.echo(f"scores are in {work}; next: {command}")


@app.command(
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


@app.command(
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
    from moe_compress import console
    from moe_compress.progress import progress_for_terminal

    try:
        from moe_compress import pipeline

        report = pipeline.run(loaded, out, work=work, progress=progress_for_terminal(), **options)
    except KeyboardInterrupt:
        state = work or out.with_name(f"{out.name}.work")
        kept = f"what is done is kept in {state}; continue with: {shlex.join(again)}"
        complain(f"interrupted; {kept if state.exists() else 'nothing was written yet.'}")
        raise typer.Exit(130) from None
    except VerificationError as error:
        console.print_checks(error.checks)
        raise
    console.print_report(report)
    typer.echo(f"checkpoint: {out}\nreport: {out / 'report.html'}, as text in {out / 'report.md'}")


@app.command(
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


@app.command(
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


@app.command(rich_help_panel=MEASURE, epilog=examples("moe-compress verify out"))
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


@app.command(
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
    seed: Annotated[int, typer.Option(help="Seed of the sample of experts.")] = 0,
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
    try:
        found = auditing.audit(loaded, work, settings, **options, progress=progress_for_terminal())
    except KeyboardInterrupt:
        kept = f"what is done is kept in {work}; run the same command again to go on."
        complain(f"interrupted; {kept if work.exists() else 'nothing was written yet.'}")
        raise typer.Exit(130) from None
    if json:
        console.print_json(found)
        return
    console.print_audit(found)
    typer.echo(f"audit: {work / 'audit.md'}; the scores there hold the measured importances too")


@app.command(
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


@app.command(
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
        complain("interrupted; nothing is visible yet, and files that arrived whole are not sent again; repeat it.")
        raise typer.Exit(130) from None
    typer.echo(f"{done['url']}\ncommit: {done['commit']}")
