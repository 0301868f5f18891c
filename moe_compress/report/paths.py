"""What is published names no place on the machine that made it: of a local path only the last part is left."""

from __future__ import annotations

import re
from pathlib import Path, PurePath
from typing import Any

LOCAL = re.compile(r"(/|\.\.?(/|$)|~)")
# Two parts at least, after a space, a quote or a bracket: `tokens/s` and `a / b` are no paths.
INSIDE = re.compile(r"(?<![^\s`'\"(=])(?:~|\.{1,2})?(?:/[^\s/`'\"():,;]+){2,}")


def without_local_paths(content: Any) -> Any:
    """A copy of JSON-able content, in which every local path is shortened to its last part."""
    if isinstance(content, dict):
        return {key: without_local_paths(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_local_paths(value) for value in content]
    return _shortened(content) if isinstance(content, str) else content


def _shortened(text: str) -> str:
    if "\n" not in text and (LOCAL.match(text) or ("/" in text and _exists(text))):
        whole = PurePath(text).name
        if _exists(text) or " " not in text:
            return whole or text
    return INSIDE.sub(lambda found: PurePath(found[0]).name, text)


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False
