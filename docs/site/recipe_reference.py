"""The recipe reference: every setting, its type, default and meaning, from the schema that recipes are judged by.

It is made when the site is built and not committed: a copy would have to change with every setting, and
`moe-compress recipes schema` says the same anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from moe_compress.recipe import recipe_schema
from moe_compress.settings import format_size

Schema = Mapping[str, Any]
BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "more than {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "less than {}",
}
NAMES = {"integer": "whole number", "boolean": "`true`, `false`", "null": "`null`", "string": "text"}


def recipe_reference() -> str:
    """Markdown: the top level, then a section for every mapping that settings hold, with its settings."""
    schema = recipe_schema()
    parts = [f"## The top level\n\n{_table(schema, schema)}"]
    for name, keys in _definitions(schema).items():
        definition = schema["$defs"][name]
        paragraphs = definition.get("description", "").split("\n\n")
        text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        heading = _operation(definition) or ", ".join(f"`{key}`" for key in keys)
        parts.append(f"## {heading} {{ #{name.lower()} }}\n\n{text}\n\n{_table(definition, schema)}")
    return "\n\n".join(parts)


def _definitions(schema: Schema) -> dict[str, list[str]]:
    """The definitions in the order in which settings refer to them, and the names of these settings."""
    found: dict[str, list[str]] = {}
    waiting = [schema]
    while waiting:
        for key, field in waiting.pop(0)["properties"].items():
            for name in _references(field):
                if name not in found:
                    waiting.append(schema["$defs"][name])
                keys = found.setdefault(name, [])
                keys += [key] * (key not in keys)
    return found


def _references(field: Schema) -> Iterator[str]:
    if "$ref" in field:
        yield field["$ref"].rpartition("/")[2]
    for branch in _branches(field):
        yield from _references(branch)
    if "items" in field:
        yield from _references(field["items"])


def _branches(field: Schema) -> list[Schema]:
    return [*field.get("anyOf", ()), *field.get("oneOf", ())]


def _table(definition: Schema, schema: Schema) -> str:
    lines = ["| setting | value | default | |", "|---|---|---|---|"]
    for key, field in definition["properties"].items():
        kinds = " or ".join(dict.fromkeys(_kinds(field, schema)))
        default = "required" if key in definition.get("required", ()) else _default(field)
        cells = (f"`{key}`", kinds, default, " ".join(_about(field, schema).split()))
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def _about(field: Schema, schema: Schema) -> str:
    """What a setting is for: its own description, or that of the mapping it holds."""
    inside = next((schema["$defs"][name].get("description", "") for name in _references(field)), "")
    return field.get("description") or inside.partition("\n\n")[0]


def _kinds(field: Schema, schema: Schema) -> Iterator[str]:
    """What a setting may be, each in a few words."""
    branches = _branches(field)
    if _is_size(field):
        yield "size such as `4GB`"
        branches = [branch for branch in branches if branch.get("type") == "null"]
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        yield f"[{_operation(schema['$defs'][name]) or 'mapping'}](#{name.lower()})"
    elif "const" in field:
        yield f"`{field['const']}`"
    elif "enum" in field:
        yield ", ".join(f"`{value}`" for value in field["enum"])
    elif "items" in field:
        yield f"list of {' or '.join(dict.fromkeys(_kinds(field['items'], schema)))}"
    elif field.get("type") == "object":
        yield "mapping"
    elif "type" in field:
        bounds = ", ".join(words.format(field[key]) for key, words in BOUNDS.items() if key in field)
        yield f"{NAMES.get(field['type'], field['type'])} {bounds}".strip()
    for branch in branches:
        yield from _kinds(branch, schema)


def _is_size(field: Schema) -> bool:
    return any("pattern" in branch for branch in _branches(field))


def _default(field: Schema) -> str:
    value = field.get("default")
    if isinstance(value, dict) and value:
        return "its defaults"
    if _is_size(field) and isinstance(value, int):
        value = format_size(value)
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _operation(definition: Schema) -> str:
    """`op: prune`, for the settings of an operation."""
    op = definition["properties"].get("op", {}).get("const")
    return f"`op: {op}`" if op else ""
