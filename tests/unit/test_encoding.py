"""Texts are read and written as UTF-8, whatever the locale says. ruff sees only calls on what it knows is a path."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import moe_compress

BINARY = ("os.open", "tarfile.open")
ROOT = Path(moe_compress.__file__).parents[1]


def without_encoding(source: str) -> Iterator[int]:
    """The lines of calls that leave the encoding of a text to the locale."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg in ("encoding", None) for keyword in node.keywords):
            continue
        method = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        modes = [word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
        opens = method == "open" and not (isinstance(node.func, ast.Attribute) and ast.unparse(node.func) in BINARY)
        if method in ("read_text", "write_text") or (opens and not any("b" in mode for mode in modes)):
            yield node.lineno


def test_the_scan_sees_what_it_is_for() -> None:
    source = 'a.read_text()\nb.write_text("x")\nopen("c")\nd.open("w")\nopen("c", "rb")\nos.open("c", 1)\n'
    assert list(without_encoding(source + 'a.read_text(encoding="utf-8")\n')) == [1, 2, 3, 4]


def test_every_text_has_an_encoding() -> None:
    files = [*(ROOT / "moe_compress").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    found = {str(file.relative_to(ROOT)): list(without_encoding(file.read_text(encoding="utf-8"))) for file in files}
    assert {name for name, lines in found.items() if lines} == set()
