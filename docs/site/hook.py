"""What mkdocs does not find in `docs/`: pages that lie elsewhere in the repository, and pages made of code and results.

Called by mkdocs (`hooks` in `mkdocs.yml`) when the site is built from the repository's root, as `make docs` does.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs.site.recipe_reference import recipe_reference
from docs.site.results import result_pages

ROOT = Path(__file__).parents[2]
# Pages outside `docs/`: where they lie in the repository, and where on the site.
ELSEWHERE = {
    "benchmarks/README.md": "benchmarks/index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
RESULTS = "benchmarks/results/"
REFERENCE = "<!-- recipe reference -->"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)#\s]+)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of all results below the benchmarks."""
    section: list[Any] = next(entry["Benchmarks"] for entry in config.nav or [] if "Benchmarks" in entry)
    section += [{name: f"benchmarks/{name}.md"} for name in result_pages()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what does not lie in `docs/`."""
    for source, target in ELSEWHERE.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    for name, text in result_pages().items():
        files.append(File.generated(config, f"benchmarks/{name}.md", content=text))
    for file in sorted((ROOT / RESULTS).iterdir()):
        files.append(File.generated(config, f"{RESULTS}{file.name}", abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the recipe reference, and lead links to where things are on the site."""
    here = next((source for source, target in ELSEWHERE.items() if target == page.file.src_uri), None)
    here = here or f"docs/{page.file.src_uri}"
    if here.startswith("docs/benchmarks/"):
        return markdown  # made here, with links of the site

    def lead(found: re.Match[str]) -> str:
        meant = posixpath.normpath(posixpath.join(posixpath.dirname(here), found[1]))
        target = ELSEWHERE.get(meant, meant if meant.startswith(RESULTS) else meant.removeprefix("docs/"))
        return posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")

    markdown = LINK.sub(lead, markdown)
    return markdown.replace(REFERENCE, recipe_reference()) if REFERENCE in markdown else markdown
