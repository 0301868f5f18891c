"""`README.md` of a compressed checkpoint, the model card of the Hub. Every figure in it stands in `report.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from moe_compress.report.markdown import check_table, comparison_table, headline, limits, random_lines

TAGS = ["moe", "mixture-of-experts", "moe-compress"]
TAGS_OF_STEPS = {"merge": "merged", "prune": "pruned", "quantize": "quantized", "tie": "tied"}


def model_card(
    report: Mapping[str, Any],
    recipe_yaml: str,
    *,
    base_model: str,
    revision: str | None = None,
    license_fields: Mapping[str, str] | None = None,
    ops: Sequence[str] = (),
    tier: Literal["stock", "plugin"] = "stock",
) -> str:
    """The card of a checkpoint.

    `base_model` is a Hub id when `revision` (its resolved commit) is given, else a local folder, of which only the
    last part is shown. `license_fields` are the base model's, as `license_fields` reads them, left out when unknown.
    `ops` are the recipe's steps by name.
    """
    on_hub = revision is not None
    name = base_model if on_hub else Path(base_model).name
    source = (
        f"[{name}](https://huggingface.co/{name}) at revision `{revision}`" if on_hub else f"the local model `{name}`"
    )
    front_matter: dict[str, Any] = {"library_name": "transformers"}
    if on_hub:
        front_matter = {"base_model": name} | front_matter
    front_matter |= license_fields or {}
    front_matter["tags"] = TAGS + [TAGS_OF_STEPS[op] for op in dict.fromkeys(ops) if op in TAGS_OF_STEPS]
    sections = [
        ("Cost and quality", comparison_table(report)),
        ("Against random pruning", random_lines(report)),
        ("Verification", check_table(report)),
        ("How to load", _loading_lines("path/to/this/folder", tier)),
        ("Limits", [f"* {limit}" for limit in limits(report)]),
        ("Recipe", ["```yaml", recipe_yaml.rstrip(), "```"]),
    ]
    lines = [
        "---",
        yaml.safe_dump(front_matter, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {Path(name).name}, compressed",
        "",
        f"Made from {source} with moe-compress ({', '.join(ops) or 'no transformation'}).",
        "",
        headline(report),
    ]
    for title, body in sections:
        lines += ["", f"## {title}", "", *body]
    return "\n".join(lines) + "\n"


def license_fields(folder: Path) -> dict[str, str]:
    """What the model card in `folder` says of its licence in its front matter, for the card of what is made of it."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    _, opened, rest = text.partition("---\n")
    try:
        found = yaml.safe_load(rest.partition("\n---")[0]) if opened and text.startswith("---\n") else None
    except yaml.YAMLError:
        found = None
    keys = ("license", "license_name", "license_link")
    return {key: found[key] for key in keys if isinstance(found.get(key), str)} if isinstance(found, dict) else {}


def _loading_lines(location: str, tier: str) -> list[str]:
    plugin = ["import moe_compress  # pip install moe-compress"] if tier == "plugin" else []
    needs = (
        "It needs the package `moe-compress`." if plugin else "Plain transformers loads it; no other package is needed."
    )
    return [
        needs,
        "",
        "```python",
        *plugin,
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{location}")',
        f'model = AutoModelForCausalLM.from_pretrained("{location}", dtype="auto")',
        "```",
    ]
