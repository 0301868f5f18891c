"""Every command in the documents and in `--help` can be given as it stands, and every recipe in them is one.

Nothing is run: the command line parses each command, and recipes and overrides are checked as `validate` does.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import typer
import yaml
from typer.core import TyperGroup

from benchmarks.tables import documents
from moe_compress.cli import app
from moe_compress.errors import MoECompressError
from moe_compress.recipe import load_recipe, packaged_recipes

COMMAND: Any = typer.main.get_command(app)
PACKAGED = [name for name, _ in packaged_recipes()]
FENCED = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:^    .*\n(?:\n(?=    ))?)+", re.MULTILINE)


def code_blocks(text: str) -> list[str]:
    """Fenced and indented code of a document."""
    indented = INDENTED.findall(FENCED.sub("", text + "\n"))
    return [*FENCED.findall(text), *map(textwrap.dedent, indented)]


def commands(code: str) -> Iterator[list[str]]:
    """The arguments of each `moe-compress`; `a | b` stands for two subcommands, what follows `>` is the shell's."""
    for line in code.replace("\\\n", " ").splitlines():
        if line.startswith("moe-compress "):
            verb, *others = shlex.split(line.partition(" > ")[0], comments=True)[1:]
            choices = [list(part) for part in _split(others, "|")]
            yield from ([verb, *choice] for choice in choices)


def _split(words: list[str], mark: str) -> Iterator[list[str]]:
    while mark in words:
        yield words[: words.index(mark)]
        words = words[words.index(mark) + 1 :]
    yield words


def recipes(code: str) -> Iterator[dict[str, Any]]:
    """The recipe, the list of steps or the single step that a piece of code is; `...` stands for what is left out."""
    try:
        found = yaml.safe_load(code)
    except yaml.YAMLError:
        return
    found = [found] if isinstance(found, dict) and "op" in found else found
    recipe = {"steps": found} if isinstance(found, list) else found
    if isinstance(recipe, dict) and all(isinstance(step, dict) and "op" in step for step in recipe.get("steps") or [0]):
        steps = [{key: value for key, value in step.items() if key != "..."} for step in recipe["steps"]]
        yield {"model": "org/model", "calibration": {"dataset": "./texts.jsonl"}} | recipe | {"steps": steps}


def is_valid(recipe: Any, overrides: list[str] | None = None) -> bool:
    """Whether `run` takes it in one of the tiers."""
    for tier in ("plugin", "stock"):
        try:
            load_recipe(recipe, [*(overrides or ()), f"export.tier={tier}"], runnable=True)
        except MoECompressError:
            continue
        return True
    return False


TEXTS = {path.name: path.read_text(encoding="utf-8") for path in documents()}
CODE = {name: code_blocks(text) for name, text in TEXTS.items()}
HELP = [
    line.strip().replace(r"\[", "[")
    for group in (COMMAND, COMMAND.commands["recipes"])
    for verb in group.commands.values()
    for line in (verb.epilog or "").splitlines()
]
BLOCKS = [block for blocks in CODE.values() for block in blocks]
GIVEN = [list(found) for found in dict.fromkeys(tuple(found) for code in [*BLOCKS, *HELP] for found in commands(code))]
WRITTEN = [found for block in BLOCKS for found in recipes(block)]


def parse(arguments: list[str]) -> dict[str, Any]:
    """The settings of a verb as the command line understands them; nothing is called."""
    command: Any = COMMAND
    context = command.make_context("moe-compress", list(arguments))
    while isinstance(command, TyperGroup):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
    return dict(context.params)


@pytest.mark.parametrize("arguments", GIVEN, ids=" ".join)
def test_commands_can_be_given(arguments: list[str]) -> None:
    given = parse(arguments)
    prefix = "" if "recipe" in given else "eval."
    overrides = [prefix + override for override in given.get("overrides") or ()]
    if given.get("recipe") in PACKAGED:
        assert is_valid(given["recipe"], overrides)
    elif overrides:
        assert any(is_valid(known, overrides) for known in [*WRITTEN, "budget-joint"])


@pytest.mark.parametrize("name", TEXTS)
def test_commands_in_sentences_exist(name: str) -> None:
    """Their verbs, their options, and the packaged recipes they name."""
    for words in (found.split() for found in re.findall(r"`moe-compress ([^`]+)`", TEXTS[name])):
        verb = COMMAND.commands.get(words[0])
        assert verb is not None or words[0] == "VERB", words
        options = {option for one in (verb.params if verb else ()) for option in one.opts} | {"--help"}
        assert {word for word in words if word.startswith("--")} <= options, words
        assert words[0] != "run" or not words[1:] or words[1] in ("RECIPE", "mine.yaml", *PACKAGED), words


@pytest.mark.parametrize("name", TEXTS)
def test_recipes_are_valid(name: str) -> None:
    """As a whole, or step by step where a list shows several ways to write one."""
    inline = re.findall(r"`(\{op: [^`]+\})`", TEXTS[name])
    for recipe in (found for code in [*CODE[name], *inline] for found in recipes(code)):
        each = [recipe | {"steps": [step]} for step in recipe["steps"]]
        assert is_valid(recipe) or (len(each) > 1 and all(map(is_valid, each))), recipe


def test_there_is_something_to_check() -> None:
    assert len(GIVEN) > 50 and len(WRITTEN) > 8
    assert parse(["run", "a.yaml", "out", "x=1"])["overrides"] == ["x=1"]
    with pytest.raises(Exception, match="No such option: --dryrun"):
        parse(["run", "prune-reap-25", "out", "--dryrun"])
    assert not is_valid("prune-reap-25", ["steps.0.kep=0.5"])
