"""Changing a number in the content of a `config.json`, under whatever names a family keeps it."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_compress.models.families import OTHER_TOWERS


def with_setting(config: dict[str, Any], keys: Collection[str], before: int, after: int) -> dict[str, Any]:
    """The language model's settings `keys` changed from `before` to `after`, at any depth, in lists too.

    Also where the file left them to the default of their class so far.
    """
    new = _replaced(config, keys, before, after)
    found = _parsed(new)
    text = found.get_text_config()
    known = text.to_dict()
    unsaid = {key: after for key in keys if key in known and getattr(text, key) == before != after}
    if unsaid:
        section = next((name for name in found.sub_configs if getattr(found, name, None) is text), None)
        new = new | (unsaid if section is None else {section: (new.get(section) or {}) | unsaid})
        text = _parsed(new).get_text_config()
    values = [getattr(text, key, None) for key in keys]
    assert any(value == after or (isinstance(value, list) and set(value) == {after}) for value in values)
    return new


def _parsed(config: dict[str, Any]) -> Any:
    """The configuration as transformers reads it from a file, which may hold numbers that JSON has not."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(config), encoding="utf-8")
        return CONFIG_MAPPING[config["model_type"]].from_json_file(file)


def _replaced(config: dict[str, Any], keys: Collection[str], before: int, after: int) -> dict[str, Any]:
    def changed(key: str, value: Any) -> Any:
        if key in keys and value == before:
            return after
        if key in keys and isinstance(value, list):
            return [after if item == before else item for item in value]
        if isinstance(value, dict) and key not in OTHER_TOWERS:
            return _replaced(value, keys, before, after)
        return value

    return {key: changed(key, value) for key, value in config.items()}
