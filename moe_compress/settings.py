"""Reading settings: a YAML file with the line of each setting, `key=value` overrides, and every mistake as a sentence.

It knows pydantic models, but no recipe: which settings there are and how they depend on each other is `recipe.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, PlainSerializer, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails

from moe_compress.errors import Problem, RecipeError, UsageError

Key = str | int
Location = tuple[Key, ...]
Config = TypeVar("Config", bound=BaseModel)

MOST_BUDGETS = 1000  # of a range
MAX_SHOWN = 60  # characters of a wrong value that a message repeats


@dataclass
class Document:
    """Settings as they were given, the line of each in its file, and what was wrong before they were even read."""

    values: dict[str, Any]
    lines: dict[Location, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def problem(self, path: Location, message: str) -> None:
        """Add a mistake at `path`, with its line; something missing gets the line of the nearest mapping around it."""
        around = (path[:depth] for depth in range(len(path), -1, -1))
        nearest = path if self.holds(path) else next((place for place in around if place in self.lines), path)
        self.problems.append(Problem(dotted(path), message, self.lines.get(nearest)))

    def holds(self, path: Location) -> bool:
        """Whether there is a value at `path`."""
        here: Any = self.values
        for key in path:
            if not (isinstance(here, dict) and key in here) and not (isinstance(here, list) and isinstance(key, int)):
                return False
            here = here[key]  # type: ignore[index]
        return True

    def set(self, path: Location, value: object) -> None:
        """Put one value in; its line is forgotten, since the file no longer says it. LookupError: no such place."""
        parent: Any = self.values
        for depth, key in enumerate(path):
            if isinstance(parent, list):
                if not isinstance(key, int) or key >= len(parent):
                    raise LookupError(f"`{dotted(path[:depth])}` is a list of {len(parent)}, counted from 0")
            elif isinstance(parent, dict):
                key = str(key)
                if depth < len(path) - 1 and parent.get(key) is None:
                    parent[key] = {}
            else:
                raise LookupError(f"`{dotted(path[:depth])}` is {shown(parent)} and holds no settings")
            if depth == len(path) - 1:
                parent[key] = plain(value)
            else:
                parent = parent[key]
        for place in [place for place in self.lines if place[: len(path)] == path]:
            del self.lines[place]

    def override(self, texts: Sequence[str]) -> None:
        """Apply dotted `key=value` texts in order, each value read as YAML."""
        for text in texts:
            name, equals, value = text.partition("=")
            if not equals or not name:
                message = f"`{text}` is not an override; write key=value, such as `steps.0.keep=0.5`"
                self.problems.append(Problem("", message))
                continue
            try:
                path: Location = tuple(int(part) if part.isdecimal() else part for part in name.split("."))
                self.set(path, yaml.load(value, Loader))
            except yaml.YAMLError:
                self.problems.append(Problem(name, f"`{value}` is not a YAML value; quote it"))
            except LookupError as error:
                self.problems.append(Problem(name, str(error.args[0])))

    def validate(self, config: type[Config]) -> Config | None:
        """The settings as `config`; None after adding every mistake to `problems`.

        A complaint about a whole mapping or list gives way to those about what it holds: they say more.
        """
        try:
            return config.model_validate(self.values, strict=True)
        except ValidationError as error:
            details = error.errors(include_url=False)
        found: dict[Location, list[ErrorDetails]] = {}
        for detail in details:
            found.setdefault(_place(self.values, detail), []).append(detail)
        wrong_kinds = {path[:-1] for path in found if path[-1:] == ("op",)}
        schema = _schema(config)
        known = [problem.path for problem in self.problems] + [dotted(path) for path in found]
        for path, errors in found.items():
            inside = any(place.startswith(f"{dotted(path)}.") for place in known)
            if inside and isinstance(errors[0]["input"], dict | list):
                continue
            if any(path[: len(item)] == item and path != (*item, "op") for item in wrong_kinds):
                continue  # settings of another op
            self.problem(path, _sentence(path, errors, schema))
        return None

    def check(self) -> None:
        """Raise `RecipeError` with all problems, in the order of the file, when there are any."""
        if self.problems:
            unique = dict.fromkeys(self.problems)
            raise RecipeError(sorted(unique, key=lambda problem: (problem.line is None, problem.line or 0)))


class Loader(yaml.SafeLoader):
    """YAML in which `1e-4` is a number, as in YAML 1.2 and everywhere else; YAML 1.1 takes it for a text."""


class Dumper(yaml.SafeDumper):
    """Writes what `Loader` reads back the same."""


EXPONENTIAL = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")
for _kind in (Loader, Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENTIAL, list("-+.0123456789"))


def read_yaml(path: Path) -> Document:
    """Parse a YAML file of settings; `RecipeError` when it is no YAML or no mapping."""
    try:
        loader = Loader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        document = Document({})
        if root is not None:
            _walk(root, (), document, ())
        document.check()
        document.values = loader.construct_document(root) if root is not None else {}
    except UnicodeDecodeError:
        raise RecipeError([Problem("", "is not a text file")]) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or getattr(error, "reason", "unreadable")
        raise RecipeError([Problem("", f"not YAML: {reason}", mark.line + 1 if mark else None)]) from None
    if not isinstance(document.values, dict):
        raise RecipeError([Problem("", "should be a mapping of settings, such as `model: reference`", 1)])
    return document


def dotted(path: Location) -> str:
    """`steps.0.keep` for ("steps", 0, "keep")."""
    return ".".join(map(str, path))


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """`; did you mean `x`?` for the nearest known word, or nothing."""
    near = get_close_matches(word.lower(), known, n=1)
    return f"; did you mean `{near[0]}`?" if near else ""


def shown(value: object) -> str:
    """A wrong value as a message repeats it."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return f"`{text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + '...'}`"


def plain(value: object) -> Any:
    """The value as a YAML file would hold it: models as the settings they were given, paths as text."""

    def convert(item: object) -> object:
        return item.model_dump(exclude_unset=True) if isinstance(item, BaseModel) else str(item)

    return json.loads(json.dumps(value, default=convert))


def _walk(node: yaml.Node, path: Location, document: Document, above: tuple[yaml.Node, ...]) -> None:
    """Note the line of every setting under `node`, and what YAML itself would let pass in silence."""
    lines = document.lines
    lines.setdefault(path, node.start_mark.line + 1)
    if node in above:
        document.problem(path, "an alias that holds itself")
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*path, index), document, (*above, node))
    elif isinstance(node, yaml.MappingNode):
        seen: set[Location] = set()
        for key, value in node.value:
            place = (*path, str(key.value))
            if place in seen:
                first, lines[place] = lines[place], key.start_mark.line + 1
                document.problem(place, f"given twice, first on line {first}")
                continue
            seen.add(place)
            lines[place] = key.start_mark.line + 1
            if not key.tag.endswith((":str", ":merge")):
                document.problem(place, "the name of a setting should be a text")
            _walk(value, place, document, (*above, node))


def _place(values: Mapping[str, Any], detail: ErrorDetails) -> Location:
    """Where an error is: its `loc` without the names of union branches."""
    here: Any = values
    path: list[Key] = []
    for key in detail["loc"]:
        if (isinstance(here, dict) and key in here) or (isinstance(here, list) and isinstance(key, int)):
            path.append(key)
            here = here[key]  # type: ignore[index]
    if detail["type"] == "missing":
        path.append(detail["loc"][-1])
    if detail["type"].startswith("union_tag") and isinstance(detail["input"], dict):
        path.append(detail["ctx"]["discriminator"].strip("'"))
    return tuple(path)


@cache
def _schema(config: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a model, which takes long to make."""
    return config.model_json_schema()


def _sentence(path: Location, errors: Sequence[ErrorDetails], schema: Mapping[str, Any]) -> str:
    """What is wrong at `path`; `errors` are the branches of a union there."""
    kinds = {error["type"]: error for error in errors}
    value = errors[0]["input"]
    if "extra_forbidden" in kinds:
        return _unknown_key(path, schema)
    if "missing" in kinds:
        return "missing"
    if "union_tag_not_found" in kinds:
        return "missing" if isinstance(value, dict) else f"should be a mapping of settings, got {shown(value)}"
    if "union_tag_invalid" in kinds:
        context = kinds["union_tag_invalid"]["ctx"]
        known = re.findall(r"'([^']*)'", context["expected_tags"])
        return f"unknown value `{context['tag']}`{did_you_mean(context['tag'], known)} (one of: {', '.join(known)})"
    if "literal_error" in kinds and isinstance(value, str):
        known = re.findall(r"'([^']*)'", kinds["literal_error"]["ctx"]["expected"])
        return f"unknown value `{value}`{did_you_mean(value, known)} (one of: {', '.join(known)})"
    wanted = " or ".join(dict.fromkeys(map(_wanted, errors))).replace(" or should be ", " or ")
    return wanted if "value_error" in kinds else f"{wanted}, got {shown(value)}"


def _wanted(error: ErrorDetails) -> str:
    """Pydantic's message in this program's words."""
    if error["type"] in ("model_type", "dict_type", "model_attributes_type"):
        return "should be a mapping of settings"
    if error["type"] == "string_type" and not isinstance(error["input"], dict | list | None):
        return "should be a text (quote it)"
    message = re.sub(r"^(Value error, |Input )", "", error["msg"])
    return message.replace("valid string", "text").replace("a valid integer", "a whole number").replace("valid ", "")


def _unknown_key(path: Location, schema: Mapping[str, Any]) -> str:
    """Name the place where this very key belongs, or the nearest key of the same mapping."""
    key = str(path[-1])
    settings = list(dict.fromkeys(_settings(schema, schema, ())))
    shape = tuple("N" if isinstance(part, int) else part for part in path[:-1])
    siblings = [place[-1] for place in settings if place[:-1] == shape]
    homes = [".".join(place) for place in settings if place[-1] == key]
    hint = f"; did you mean `{'` or `'.join(homes)}`?" if homes else did_you_mean(key, siblings)
    return f"unknown key{hint}" + ("" if hint else f" (known: {', '.join(siblings)})")


def _settings(node: Mapping[str, Any], schema: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The path of every setting that a JSON schema knows, list items as `N`."""
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    for branch in [*node.get("anyOf", ()), *node.get("oneOf", ())]:
        yield from _settings(branch, schema, path)
    if "items" in node:
        yield from _settings(node["items"], schema, (*path, "N"))
    for key, value in node.get("properties", {}).items():
        yield (*path, key)
        yield from _settings(value, schema, (*path, key))


_UNITS = {"B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power}


def parse_size(value: object) -> int:
    """Bytes of `4GB`, `500MB`, `1.5GiB` or a plain number (GB is 10^9, GiB 2^30 bytes); otherwise ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B)?", str(value).strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[(match[2] or "B").upper()]) if match else 0
    if size < 1:
        raise ValueError(f"should be a size such as `4GB` or `500MB`, got `{value}`")
    return size


def format_size(size: int) -> str:
    """The shortest exact form that `parse_size` reads back: `4GB`, `1500MB`, `12345B`."""
    unit = next(unit for unit in ("TB", "GB", "MB", "KB", "B") if size % _UNITS[unit] == 0)
    return f"{size // _UNITS[unit]}{unit}"


def shown_size(size: float, *, up: bool = False) -> str:
    """`12.34MB`: four digits, rounded down, or with `up` so that asking for it is enough; `parse_size` reads it."""
    unit = next(unit for unit in ("TB", "GB", "MB", "KB", "B") if size >= _UNITS[unit] or unit == "B")
    value = Decimal(size * (1 - 1e-12) if up and isinstance(size, float) else size) / _UNITS[unit]
    step = Decimal(1).scaleb(value.adjusted() - 3) if unit != "B" and value else Decimal(1)
    return f"{value.quantize(step, ROUND_CEILING if up else ROUND_FLOOR).normalize():f}{unit}"


def shown_budget(name: str, value: float, *, up: bool = False) -> str:
    """A budget as a person writes it: bits in four digits, all else in bytes; with `up` never less than it is."""
    if name != "average_bits":
        return shown_size(value, up=up)
    if not up or value == 0:
        return f"{value:.6g}"
    step = 10.0 ** (math.floor(math.log10(value)) - 3)
    return f"{math.ceil(value / step - 1e-6) * step:.4g}"


Size = Annotated[
    int,
    BeforeValidator(parse_size),
    PlainSerializer(format_size, when_used="json"),
    WithJsonSchema({"anyOf": [{"type": "string", "pattern": r"^\d+(\.\d+)?\s*([KMGT]i?)?B$"}, {"type": "integer"}]}),
]


def parse_range(text: str) -> tuple[str, list[float]]:
    """The name and the values of `name=A:B:C`, from A to B (included) in steps of C, in the units of `parse_size`."""
    match = re.fullmatch(r"(\w+)=([^:]+):([^:]+):([^:]+)", text.strip())
    try:
        assert match is not None
        first, last, step = (_number(part) for part in match.groups()[1:])
        assert step > 0 and last >= first
    except (AssertionError, ValueError):
        raise UsageError(
            f"`{text}` is no range; write it as `average_bits=1.6:4:0.2` or `stored_bytes=8GB:16GB:1GB`."
        ) from None
    count = int((last - first) / step + 1e-9) + 1
    if count > MOST_BUDGETS:
        raise UsageError(f"`{text}` are {count:,} budgets, each an optimum to be found; take {MOST_BUDGETS} at most.")
    return match[1], [round(first + step * number, 9) for number in range(count)]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float(parse_size(text))
