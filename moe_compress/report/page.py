"""`report.html`: one self-contained page about one result, or comparing several.

It loads nothing, and is rendered from the records in the folders and nothing else, so it can be made again at any time.
Names and texts in the records are other people's: each is escaped, and the page's policy runs no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from moe_compress import __version__
from moe_compress.checkpoint.durable import replace_durably
from moe_compress.errors import UsageError
from moe_compress.report.comparison import comparison
from moe_compress.report.result import Result, load_result, names_apart
from moe_compress.report.single import single

PAGE_FILE = "report.html"
COMPARISON_FILE = "comparison.html"
NO_BREAK = "\u00a0"
UNIT = re.compile(r"(?<=\d) (?=[%±A-Za-z])|(?<=±) (?=\d)")
PAUSE = re.compile(r"([_/.])")
GENERATOR = '<meta name="generator" content="moe-compress'


def write_page(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page of these results, whole or not at all, and return where it is.

    Without `output`, the page of one result lies in its folder, that of several in the current one. Raises `UsageError`
    when a folder holds no report or is named twice, or `output` cannot be written or is no page of this program.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError("a folder is named twice; each result can be compared once.")
    file = output or (folders[0] / PAGE_FILE if len(folders) == 1 else Path(COMPARISON_FILE))
    results = [load_result(folder) for folder in folders]
    _refuse_foreign(file)
    page = render(results, names_apart(folders))
    temporary = file.with_name(f"{file.name}.part")
    temporary.write_text(page, encoding="utf-8")
    replace_durably(temporary, file)
    return file


def render(results: Sequence[Result], names: Sequence[str]) -> str:
    """The page as HTML; with several results the first names the model."""
    environment = Environment(
        loader=PackageLoader("moe_compress.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str]] = {"plain": plain, "words": words, "tight": tight, "breakable": breakable}
    environment.filters |= filters
    style = Markup(environment.get_template("style.css").render())
    script = Markup(environment.get_template("page.js").render())
    own = {"version": __version__, "style": style, "script": script}
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    if len(results) == 1:
        view: Mapping[str, Any] = single(results[0])
        return environment.get_template("single.html").render(view, policy=policy, **own)
    return environment.get_template("comparison.html").render(comparison(results, names), policy=policy, **own)


def plain(value: float) -> str:
    """A number as a reader takes it in: whole ones in full, others with five digits."""
    if isinstance(value, int) or value.is_integer():
        return f"{value:,.0f}"
    return f"{value:,.5g}" if abs(value) < 1e5 else f"{value:,.0f}"


def words(value: Any) -> str:
    """A setting as a reader takes it in: `yes`, `none`, a list with commas."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {words(item)}" for key, item in value.items() if item is not None) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(words, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def tight(text: str) -> str:
    """The text with numbers that no line break parts from their units and errors."""
    return UNIT.sub(NO_BREAK, text)


def breakable(text: str) -> Markup:
    """A long name that may be broken after an underscore, a slash or a dot."""
    return Markup(PAUSE.sub(r"\1<wbr>", str(escape(text))))  # escaped before


def _hash(text: str) -> str:
    """What a content security policy calls this inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _refuse_foreign(file: Path) -> None:
    """Raise `UsageError` when a page cannot be written here, or would replace something else."""
    if not file.parent.is_dir():
        raise UsageError(f"the folder {file.parent} does not exist; create it first.")
    if file.is_dir():
        raise UsageError(f"{file} is a folder; name a file, such as {file / COMPARISON_FILE}.")
    if file.exists() and GENERATOR not in file.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise UsageError(f"{file} exists and is no page of moe-compress; choose another name.")
