"""`README.md` of a compressed checkpoint, the model card of the Hub. Every figure in it stands in `report.json`.

The card is written before anyone knows where the checkpoint will be published: its snippets name `LOCATION`, which
`published` replaces by a repository. It says nothing that its owner alone can know (intended use, contact, risks).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import ModelCard, ModelCardData

from moe_compress import __version__
from moe_compress.recipe import OPERATIONS
from moe_compress.report.citations import papers
from moe_compress.report.markdown import check_table, comparison_table, headline, limits, random_section
from moe_compress.report.scores import is_hub_id, model_index
from moe_compress.settings import Loader

LOCATION = "path/to/this/folder"
TAGS = ["moe", "mixture-of-experts", "moe-compress"]
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
# What `moe-compress eval` does unless told otherwise.
EVAL_DEFAULTS = {"apply_chat_template": False, "batch_size": "auto", "seed": 0}
EVAL_SETTINGS = ("include_path", "batch_size", "num_fewshot", "apply_chat_template", "max_gen_toks", "seed")


def model_card(
    report: Mapping[str, Any],
    recipe_yaml: str,
    *,
    base_model: str,
    revision: str | None = None,
    inherited: Mapping[str, Any] | None = None,
    tier: Literal["stock", "plugin"] = "stock",
) -> str:
    """The card of a checkpoint.

    `base_model` is a Hub id when `revision` (its resolved commit) is given, else a local folder, of which only the
    last part is shown. `inherited` are the base model's fields, as `inherited_fields` reads them, left out when
    unknown.
    """
    on_hub = revision is not None
    name = base_model if on_hub else Path(base_model).name
    title = f"{Path(name).name}, compressed"
    source = (
        f"[{name}](https://huggingface.co/{name}) at revision `{revision}`" if on_hub else f"the local model `{name}`"
    )
    steps = _steps(report)
    ops = [step["op"] for step in steps]
    recipe = _parsed(recipe_yaml)
    citations = [paper.bibtex for paper in papers(steps)]
    sections = [
        ("Cost and quality", [*comparison_table(report), *_measured_with(report)]),
        ("How to load", _loading_lines(tier, _relation(steps) == "quantized")),
        ("What was done", _step_lines(steps)),
        ("Calibration", _calibration_lines(report)),
        random_section(report),
        ("Verification", check_table(report)),
        ("Commands", _command_lines(recipe, name, revision)),
        ("Limits", [f"* {limit}" for limit in limits(report)]),
        ("Recipe", ["```yaml", recipe_yaml.rstrip(), "```"]),
        ("Citation", ["```bibtex", "\n\n".join(citations), "```"] if citations else []),
    ]
    lines = [
        f"# {title}",
        "",
        f"Made from {source} with moe-compress ({', '.join(ops) or 'no transformation'}).",
        "",
        headline(report),
    ]
    for heading, body in sections:
        lines += ["", f"## {heading}", "", *body] if body else []
    data = _front_matter(report, title, name if on_hub else None, inherited or {}, tier)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"))


def published(card: str, repo_id: str, revision: str | None = None) -> str:
    """The card with this repository in the place of `LOCATION`; a branch other than `main` is named beside it."""
    branch = "" if revision is None else f', revision="{revision}"'
    option = "" if revision is None else f" --revision {revision}"
    return card.replace(f'"{LOCATION}"', f'"{repo_id}"{branch}').replace(LOCATION, f"{repo_id}{option}")


def inherited_fields(folder: Path) -> dict[str, Any]:
    """What the model card in `folder` says of licence, language and task, for the card of what is made of it."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    _, opened, rest = text.partition("---\n")
    try:
        found = yaml.safe_load(rest.partition("\n---")[0]) if opened and text.startswith("---\n") else None
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict):
        return {}
    fields = {key: found[key] for key in INHERITED if isinstance(found.get(key), str)}
    languages = found.get("language")
    if isinstance(languages, list) and all(isinstance(language, str) for language in languages):
        fields["language"] = languages
    return fields


def _front_matter(
    report: Mapping[str, Any], title: str, base_model: str | None, inherited: Mapping[str, Any], tier: str
) -> ModelCardData:
    """Only what is known."""
    steps = _steps(report)
    datasets = [part["dataset"] for part in _calibration_data(report) if is_hub_id(part["dataset"])]
    return ModelCardData(
        base_model=base_model,
        base_model_relation=_relation(steps) if base_model else None,
        library_name="transformers",
        **{"pipeline_tag": "text-generation"} | dict(inherited),
        tags=TAGS + [tag for step in steps for tag in OPERATIONS[step["op"]].tags(step, tier)],
        datasets=list(dict.fromkeys(datasets)) or None,
        model_name=title,
        eval_results=model_index(report) or None,
    )


def _steps(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The resolved settings of every step."""
    return list(report["settings"].get("steps") or ())


def _relation(steps: Sequence[Mapping[str, Any]]) -> str | None:
    """What the result is to its source: the last word that a step has for it."""
    words = [OPERATIONS[step["op"]].RELATION for step in steps]
    return next((word for word in reversed(words) if word is not None), None)


def _loading_lines(tier: str, quantized: bool) -> list[str]:
    if tier == "stock":
        first = [
            "Plain transformers loads it; no other package is needed"
            + (" but `compressed-tensors`, which unpacks the weights." if quantized else "."),
        ]
        imports = []
        last = [
            "",
            "vLLM and SGLang read this format where they know the architecture; that was not tried here:",
            "",
            "```bash",
            f"vllm serve {LOCATION}",
            "```",
        ]
    else:
        first = ["It needs the package `moe-compress`; other runtimes (vLLM, SGLang, llama.cpp) cannot read it."]
        imports = ["import moe_compress  # pip install moe-compress"]
        last = [
            "",
            "Without that import, `trust_remote_code=True` (for the tokenizer too) finds the package where it is "
            "installed, and says what is missing where it is not.",
        ]
        if quantized:
            last += ["", "Experts stay packed in memory; `dequantize=True` unpacks them on loading."]
    return [
        *first,
        "",
        "```python",
        *imports,
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{LOCATION}")',
        f'model = AutoModelForCausalLM.from_pretrained("{LOCATION}", dtype="auto")',
        "```",
        *last,
    ]


def _step_lines(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line per step: its settings, and its papers by the keys they have in the section of citations."""
    lines = []
    for number, step in enumerate(steps, start=1):
        settings = ", ".join(
            f"{key} {_word(value)}" for key, value in step.items() if key != "op" and value is not None
        )
        keys = ", ".join(paper.key for paper in papers([step]))
        lines.append(f"{number}. **{step.get('op')}**: {settings}." + (f" Papers: `{keys}`." if keys else ""))
    return lines


def _calibration_lines(report: Mapping[str, Any]) -> list[str]:
    """What the experts were measured on."""
    calibration = report["settings"].get("calibration") or {}
    lines = []
    for part in _calibration_data(report):
        subset = f", {part['config_name']}" if part.get("config_name") else ""
        documents = "1 document" if part["documents"] == 1 else f"{part['documents']:,} documents"
        counts = f"{part['sequences']:,} sequences, {part['tokens']:,} tokens from {documents}"
        lines.append(f"* `{part['dataset']}`{subset} ({part['split']}): {counts}")
    if "fewest_tokens_per_expert" in calibration:
        lines.append(f"* the least used expert was routed {calibration['fewest_tokens_per_expert']:,} tokens")
    return lines


def _calibration_data(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list((report["settings"].get("calibration") or {}).get("data") or ())


def _measured_with(report: Mapping[str, Any]) -> list[str]:
    """The versions and the machine behind the measured figures."""
    settings = report["settings"]
    versions, machine = settings.get("versions") or {}, settings.get("hardware") or {}
    parts = [f"{name} {versions[name]}" for name in ("lm_eval", "transformers", "torch") if name in versions]
    parts += [str(machine[name]) for name in ("gpu", "machine") if name in machine][:1]
    parts += [f"threads: {machine['threads']}"] if "threads" in machine and "gpu" not in machine else []
    return ["", f"Measured with {', '.join(parts)}."] if parts else []


def _command_lines(recipe: Mapping[str, Any], base_model: str, revision: str | None) -> list[str]:
    """The commands that make, check and evaluate the checkpoint again, `out` being a folder with its files."""
    settings = recipe.get("eval") or {}
    evaluate = ["moe-compress", "eval", "out"]
    if settings.get("tasks"):
        evaluate += ["--baseline", base_model] if settings.get("baseline", True) else []
        evaluate += ["--tasks", ",".join(settings["tasks"])]
        evaluate += ["--limit", str(settings["limit"])] if settings.get("limit") is not None else []
        given = {key: settings.get(key) for key in EVAL_SETTINGS}
        evaluate += [
            f"{key}={_word(value)}" for key, value in given.items() if value not in (None, EVAL_DEFAULTS.get(key))
        ]
    made_from = f" revision={revision}" if revision else ""
    lines = [
        f"pip install moe-compress=={__version__}",
        f"moe-compress run recipe.yaml out{made_from}  # the recipe is one of the files",
        "moe-compress verify out",
        *([shlex.join(evaluate)] if settings.get("tasks") else []),
    ]
    return [
        "In a folder with the recipe (local models and texts are named without their place):",
        "",
        *("```bash", *lines, "```"),
    ]


def _parsed(recipe_yaml: str) -> Mapping[str, Any]:
    recipe = yaml.load(recipe_yaml, Loader)
    return recipe if isinstance(recipe, dict) else {}


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_word(item)}" for key, item in value.items() if item is not None) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_word, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)
