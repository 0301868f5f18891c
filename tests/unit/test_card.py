"""The model card: what its front matter claims, what its body says, and that no figure in it is invented."""

from __future__ import annotations

import copy
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from typer.testing import CliRunner

from moe_compress import pipeline
from moe_compress.cli import app
from moe_compress.compress.distill import config as distill
from moe_compress.compress.merge import config as merge
from moe_compress.compress.prune import config as prune
from moe_compress.compress.prune.config import PruneConfig
from moe_compress.compress.quantize import config as quantize
from moe_compress.compress.skip import config as skip
from moe_compress.compress.tie import config as tie
from moe_compress.compress.topk import config as topk
from moe_compress.compress.zero_experts import config as zero_experts
from moe_compress.eval.config import EvalConfig
from moe_compress.recipe import dump_recipe, load_recipe
from moe_compress.report import tables
from moe_compress.report.build import build_report
from moe_compress.report.card import LOCATION, inherited_fields, model_card, published
from moe_compress.report.citations import BIBLIOGRAPHY, papers
from moe_compress.report.scores import eval_results, write_eval_results
from moe_compress.report.tables import MISSING
from tests.hub_rules import mistakes
from tests.unit.test_report import CHECKS, draw, metric, model

ROOT = Path(__file__).parents[2]
COMMIT = "c0ffee" * 6 + "c0de"
PRUNE = {"op": "prune", "criterion": "reap", "keep": 0.75}
QUANTIZE = {"op": "quantize", "method": "gptq", "bits": 4}
CALIBRATION = {"dataset": "allenai/c4", "config_name": "en", "num_samples": 128, "sequence_length": 2048}
EVALUATION = {"tasks": ["arc_easy", "code"], "limit": 200, "num_fewshot": 5}


def part(dataset: str, **counts: Any) -> dict[str, Any]:
    return {"dataset": dataset, "split": "train"} | counts


SETTINGS: dict[str, Any] = {
    "model": "org/model",
    "criterion": "reap",
    "steps": [PruneConfig(**PRUNE).model_dump()],  # type: ignore[arg-type]
    "calibration": {
        "calibration_tokens": 262144,
        "fewest_tokens_per_expert": 311,
        "starved": [[3, 17]],
        "data": [
            part("allenai/c4", config_name="en", sequences=96, documents=301, tokens=196608),
            part("chats.jsonl", config_name=None, sequences=32, documents=71, tokens=65536),
        ],
    },
    "eval": {
        "limit": 200,
        "num_fewshot": {"arc_easy": 5, "code": 0},
        "datasets": {
            "arc_easy": {"path": "allenai/ai2_arc", "name": "ARC-Easy", "split": "test"},
            "code": {"path": None, "name": None, "split": "test"},
        },
    },
    "versions": {"torch": "2.13.0", "transformers": "5.23.0", "lm_eval": "0.4.13"},
    "hardware": {"machine": "x86_64", "threads": 7},
}  # fmt: skip


@pytest.fixture
def report() -> dict[str, Any]:
    draws = [draw(0, 1.9, 0.61), draw(1, 2.1, 0.70), draw(2, 2.3, 0.52)]
    return build_report(model(), model(0.75), draws, CHECKS, SETTINGS)


def recipe(*steps: dict[str, Any], **settings: Any) -> str:
    content = {"model": "org/model", "calibration": CALIBRATION, "steps": list(steps or [PRUNE]), "eval": EVALUATION}
    return dump_recipe(load_recipe(content | settings))


def card(report: dict[str, Any], recipe_yaml: str | None = None, **more: Any) -> str:
    arguments: dict[str, Any] = {
        "base_model": "org/model",
        "revision": COMMIT,
        "inherited": {"license": "apache-2.0", "language": ["en", "de"]},
    }
    return model_card(report, recipe() if recipe_yaml is None else recipe_yaml, **(arguments | more))


def front_matter(text: str) -> dict[str, Any]:
    _, content, _ = text.split("---\n", 2)
    return dict(yaml.safe_load(content))


def with_steps(report: dict[str, Any], *steps: dict[str, Any]) -> dict[str, Any]:
    """The report of a run that had these steps."""
    dumped = [load_recipe({"model": "a/b", "calibration": CALIBRATION, "steps": [step]}).steps[0] for step in steps]
    settings = report["settings"] | {"steps": [step.model_dump(mode="json") for step in dumped]}
    return report | {"settings": settings}


# front matter


def test_front_matter(report: dict[str, Any]) -> None:
    matter = front_matter(card(report))
    assert matter["base_model"] == "org/model"
    assert (matter["license"], matter["language"]) == ("apache-2.0", ["en", "de"])
    assert (matter["library_name"], matter["pipeline_tag"]) == ("transformers", "text-generation")
    assert matter["tags"] == ["moe", "mixture-of-experts", "moe-compress", "pruned", "reap"]
    assert matter["datasets"] == ["allenai/c4"]  # the local file is none of the Hub's
    assert "license" not in front_matter(card(report, inherited=None))
    assert front_matter(card(report, inherited={"pipeline_tag": "image-text-to-text"}))["pipeline_tag"] == (
        "image-text-to-text"
    )
    assert ModelCard(card(report)).content == card(report)


def test_a_relation_is_claimed_only_where_the_hub_has_a_word_for_it(report: dict[str, Any]) -> None:
    assert "base_model_relation" not in front_matter(card(report))
    both = with_steps(report, PRUNE, QUANTIZE)
    assert front_matter(card(both))["base_model_relation"] == "quantized"
    local = front_matter(card(both, base_model="/home/someone/mine", revision=None))
    assert "base_model" not in local and "base_model_relation" not in local


def test_the_format_is_named_where_others_can_read_it(report: dict[str, Any]) -> None:
    both = with_steps(report, PRUNE | {"criterion": "random"}, QUANTIZE)
    stock, plugin = card(both), card(both, tier="plugin")
    assert front_matter(stock)["tags"][3:] == ["pruned", "quantized", "compressed-tensors"]
    assert "`compressed-tensors`, which unpacks" in stock and "compressed-tensors" not in card(report)
    assert front_matter(plugin)["tags"][3:] == ["pruned", "quantized"]


def test_model_index_holds_the_reports_scores(report: dict[str, Any]) -> None:
    found = ModelCard(card(report)).data.eval_results
    claimed = {(entry.dataset_name, entry.metric_type): entry.metric_value for entry in found}
    tasks = report["compressed"]["tasks"]
    assert claimed == {
        (task, name): values["value"] for task, metrics in tasks.items() for name, values in metrics.items()
    }
    assert {entry.dataset_type for entry in found} == {"allenai/ai2_arc", "code"}
    names = {entry.metric_name for entry in found}
    assert "arc_easy acc (5-shot, first 200 documents)" in names
    assert {entry.metric_type for entry in found} == {"acc", "acc_norm", "bits_per_byte"}
    bare = build_report({}, {"stored_bytes": 12_345})
    assert "model-index" not in front_matter(card(bare))


def test_scores_without_a_value_are_no_claims() -> None:
    acc_norm = metric(0.71, 0.0093)
    tasks = {"code": {"bits_per_byte": metric(math.nan)}, "arc_easy": {"acc": metric(math.nan), "acc_norm": acc_norm}}
    report = build_report(model(), model(tasks=tasks), settings=SETTINGS)
    (found,) = ModelCard(card(report)).data.eval_results
    assert (found.metric_type, found.metric_value) == ("acc_norm", 0.71)
    assert list(eval_results(report)) == ["arc_easy.yaml"]
    (entry,) = parse_eval_result_entries(yaml.safe_load(eval_results(report)["arc_easy.yaml"]))
    assert entry.value == 0.71 and entry.notes.startswith("acc_norm, ")


def test_eval_results_are_for_datasets_of_the_hub(report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / ".eval_results").mkdir()
    (tmp_path / ".eval_results" / "earlier.yaml").write_text("[]")
    write_eval_results(tmp_path, report)
    (file,) = (tmp_path / ".eval_results").iterdir()
    assert file.name == "arc_easy.yaml"
    (entry,) = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert (entry.dataset_id, entry.task_id) == ("allenai/ai2_arc", "arc_easy")
    assert entry.value == report["compressed"]["tasks"]["arc_easy"]["acc"]["value"]
    assert entry.notes == "acc, test split, lm-eval task arc_easy (5-shot, first 200 documents)"
    report["settings"]["eval"].pop("datasets")
    write_eval_results(tmp_path, report)
    assert not (tmp_path / ".eval_results").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# Model\n", {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: tongyi\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "tongyi", "license_link": "LICENSE"},
        ),
        ("---\nlanguage:\n- en\n- de\npipeline_tag: text-generation\n---\n",
         {"language": ["en", "de"], "pipeline_tag": "text-generation"}),
        ("---\nlanguage: [1]\nlicense: [mit, apache-2.0]\n---\n", {}),
        ("---\nlicense: {\n---\n", {}),
        ("---\njust a text\n---\n", {}),
        ("# Model\n\n---\nlicense: mit\n---\n", {}),
        (None, {}),
    ],
)  # fmt: skip
def test_what_is_inherited_from_the_source(text: str | None, expected: dict[str, str], tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert inherited_fields(tmp_path) == expected


@pytest.mark.parametrize("tier", ["stock", "plugin"])
@pytest.mark.parametrize("steps", [[], [PRUNE], [PRUNE, QUANTIZE]])
def test_the_hub_accepts_the_front_matter(report: dict[str, Any], steps: list[dict[str, Any]], tier: str) -> None:
    for arguments in ({}, {"base_model": "./mine", "revision": None, "inherited": None}):
        assert mistakes(card(with_steps(report, *steps), tier=tier, **arguments)) == []
        assert mistakes(card(with_steps(build_report({}, {}), *steps), tier=tier, **arguments)) == []


# body


def test_a_local_base_model_is_named_without_its_path(report: dict[str, Any]) -> None:
    report["settings"]["model"] = "/home/someone/models/mine"
    text = card(report, base_model="/home/someone/models/mine", revision=None)
    assert "base_model" not in front_matter(text)
    assert "`mine`" in text
    assert "/home/someone" not in text


def test_how_to_load_follows_the_tier(report: dict[str, Any]) -> None:
    stock, plugin = card(report), card(with_steps(report, QUANTIZE), tier="plugin")
    assert "import moe_compress" not in stock and "vllm serve" in stock
    assert "import moe_compress" in plugin and "vllm serve" not in plugin
    assert "trust_remote_code=True" in plugin and "dequantize=True" in plugin
    assert "dequantize" not in card(report, tier="plugin")


def test_a_published_card_names_its_repository(report: dict[str, Any]) -> None:
    for tier in ("stock", "plugin"):
        text = published(card(report, tier=tier), "me/small")
        assert LOCATION not in text
        assert 'AutoTokenizer.from_pretrained("me/small")' in text
        assert 'AutoModelForCausalLM.from_pretrained("me/small", dtype="auto")' in text
    assert "vllm serve me/small\n" in published(card(report), "me/small")
    branch = published(card(report), "me/small", "keep-75")
    assert 'AutoModelForCausalLM.from_pretrained("me/small", revision="keep-75", dtype="auto")' in branch
    assert "vllm serve me/small --revision keep-75\n" in branch


def test_the_commands_do_what_the_recipe_did(report: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def evaluate(ckpt: str, **options: Any) -> dict[str, Any]:
        seen.update(options, ckpt=ckpt)
        return build_report({}, {})

    monkeypatch.setattr(pipeline, "evaluate_checkpoint", evaluate)
    settings = EVALUATION | {"max_gen_toks": 64, "seed": 3, "batch_size": 4, "apply_chat_template": True}
    commands = re.search(r"## Commands.*?```bash\n(.*?)```", card(report, recipe(eval=settings)), re.DOTALL)
    assert commands is not None
    install, run, verify, again = commands[1].splitlines()
    assert install.startswith("pip install moe-compress==") and verify == "moe-compress verify out"
    assert shlex.split(run, comments=True) == ["moe-compress", "run", "recipe.yaml", "out", f"revision={COMMIT}"]
    done = CliRunner().invoke(app, shlex.split(again)[1:])
    assert done.exit_code == 0, done.stderr
    assert (seen["ckpt"], seen["baseline"]) == ("out", "org/model")
    assert seen["config"] == EvalConfig(**settings)
    assert "moe-compress eval" not in card(report, recipe(eval={}))


def test_steps_and_data_are_told(report: dict[str, Any]) -> None:
    text = card(report)
    assert "1. **prune**: criterion reap, keep 0.75, " in text and "Papers: `lasby2025reap, su2025super`" in text
    assert "* `allenai/c4`, en (train): 96 sequences, 196,608 tokens from 301 documents" in text
    assert "* `chats.jsonl` (train): 32 sequences" in text
    assert "Measured with lm_eval 0.4.13, transformers 5.23.0, torch 2.13.0, x86_64, threads: 7." in text
    nothing = card(build_report({}, {}))
    assert "(no transformation)" in nothing
    assert "## What was done" not in nothing and "## Calibration" not in nothing and "## Citation" not in nothing


# figures


def leaves(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
        yield len(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def words(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for item in value.values():
            yield from words(item)
    elif isinstance(value, list):
        for item in value:
            yield from words(item)
    elif isinstance(value, str):
        yield value


NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)*(?:e[+-]?\d+)?")
# Not the report's: the legend's unit, a step's number, this package's version, the keys of papers, names and commits.
NO_FIGURES = re.compile(
    r"10\^9|1 GB|^\d+\. |moe-compress==\S+|Papers: `.*?`|revision=\w+|revision `\w+`|apache-2.0", re.MULTILINE
)


def figures(text: str) -> set[str]:
    """All numbers of a card but those of the recipe and of the citations, both of which are quoted whole."""
    text = re.sub(r"```(yaml|bibtex)\n.*?```", "", text, flags=re.DOTALL)
    return set(NUMBER.findall(NO_FIGURES.sub("", text)))


def known_figures(report: dict[str, Any]) -> set[str]:
    formats = [
        tables.format_bytes,
        tables.format_count,
        tables.format_flops,
        tables.format_number,
        tables.format_percent,
        tables.format_score,
        lambda value: f"{value:,}",
        str,
    ]
    known = {number for leaf in leaves(report) for form in formats for number in NUMBER.findall(form(leaf))}
    return known | {number for word in words(report) for number in NUMBER.findall(word)}


def test_no_figure_in_the_card_is_absent_from_the_report(report: dict[str, Any]) -> None:
    for tier in ("stock", "plugin"):
        shown = figures(card(report, tier=tier))
        assert len(shown) > 40
        assert shown <= known_figures(report)
    text = eval_results(report)["arc_easy.yaml"]
    assert set(NUMBER.findall(text)) <= known_figures(report) | {"2"}  # of ai2_arc
    bare = build_report({}, {"stored_bytes": 12_345})
    assert figures(card(bare, recipe(eval={}), revision=None)) == {"12.3"}


def test_figures_of_the_card_follow_the_report(report: dict[str, Any]) -> None:
    changed = copy.deepcopy(report)
    changed["compressed"]["stored_bytes"] = 7_777_777
    changed["compressed"]["tasks"]["arc_easy"]["acc"]["value"] = 0.4321
    del changed["compressed"]["speed"], changed["ratio"]["speed"]
    text = card(changed)
    assert "7.78 MB" in text
    assert "10.4 GB" not in text
    assert text.count("0.4321") == 3 and MISSING in text  # the front matter, both tables
    assert figures(text) <= known_figures(changed)


# citations


def test_papers_are_those_that_the_documentation_names() -> None:
    pruning = (ROOT / "docs" / "pruning.md").read_text(encoding="utf-8")
    rows = dict(reversed(re.findall(r"^\| `(\w+)` \|.*\|([^|]*)\|$", pruning, re.MULTILINE)))  # the first of each
    assert {"reap", "random", "frequency"} <= rows.keys()
    named = {name: re.findall(r"arXiv (\d{4}\.\d{5})", source) for name, source in rows.items()}
    assert {name: [number] for name, number in prune.CRITERIA.items()} == {k: v for k, v in named.items() if v}
    code = (ROOT / "moe_compress" / "runtime" / "bnb.py").read_text(encoding="utf-8")
    quantization = (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
    for method, number in quantize.METHODS.items():
        assert re.search(rf"`?{method}`? \(arXiv {number}\)", code + quantization), method
    assert f"arXiv {quantize.MIXTURE_COMPRESSOR}" in quantization
    skipping = (ROOT / "docs" / "expert_skipping.md").read_text(encoding="utf-8")
    for number in (skip.NAEE, skip.ODP, topk.K1_K2, topk.ALLOC_MOE, zero_experts.ZEDA, zero_experts.ADAMOE):
        assert re.search(rf"arXiv {number}|, {number}", skipping), number
    assert f"arXiv {prune.SUPER_EXPERTS}" in pruning and prune.SUPER_EXPERTS == quantize.SUPER_EXPERTS


def test_only_what_was_used_is_cited(report: dict[str, Any]) -> None:
    def cited(*steps: dict[str, Any]) -> list[str]:
        return [paper.arxiv for paper in papers(with_steps(report, *steps)["settings"]["steps"])]

    unprotected = {"protect_super_experts": False}
    assert cited(PRUNE | {"criterion": "mone"}) == ["2507.00390", "2507.23279"]
    assert cited(PRUNE | {"criterion": "mone"} | unprotected) == ["2507.00390"]
    assert cited(PRUNE | {"criterion": {"b": 1, "alpha": 0, "beta": 2}})[0] == "2606.15716"
    assert cited(PRUNE | {"criterion": "frequency"} | unprotected) == []
    assert cited(QUANTIZE) == ["2210.17323"]
    assert cited(QUANTIZE | {"method": "rtn"}) == []
    budget = {"op": "quantize", "average_bits": 3.0}
    assert cited(budget) == ["2210.17323", "2410.06270", "2507.23279"]
    assert cited(budget | {"allocation": "layer"} | unprotected) == ["2210.17323"]
    assert cited({"op": "quantize", "method": "nf4"}) == ["2305.14314"]
    assert cited(PRUNE, PRUNE, budget) == ["2510.13999", "2507.23279", "2210.17323", "2410.06270"]
    assert cited({"op": "skip", "target_skip": 0.5}) == ["2402.14800"]
    assert cited({"op": "skip", "target_skip": 0.5, "protect": 0.02}) == ["2402.14800", "2410.06270"]
    assert cited({"op": "topk", "k": 2, "normalise_over": "kept"}) == []
    assert cited({"op": "topk", "k": 2, "allocation": "per_layer"}) == ["2609.04575", "2604.08133"]
    assert cited({"op": "zero_experts"}, {"op": "zero_experts", "init": "tile"}) == ["2605.18643", "2406.13233"]
    assert cited() == []


def test_citations_are_whole(report: dict[str, Any]) -> None:
    known = {*prune.CRITERIA.values(), prune.FAMILY, prune.SUPER_EXPERTS}
    known |= {*quantize.METHODS.values(), quantize.MIXTURE_COMPRESSOR}
    known |= {skip.NAEE, skip.ODP, topk.K1_K2, topk.ALLOC_MOE, zero_experts.ZEDA, zero_experts.ADAMOE}
    known |= {*merge.GROUPINGS.values(), merge.DIFFERENCES, tie.TYING, distill.HINTON}
    assert BIBLIOGRAPHY.keys() == known
    assert len({paper.key for paper in BIBLIOGRAPHY.values()}) == len(BIBLIOGRAPHY)
    shown = re.search(r"```bibtex\n(.*?)```", card(report), re.DOTALL)
    assert shown is not None
    assert re.findall(r"eprint = {(.*?)}", shown[1]) == ["2510.13999", "2507.23279"]
    assert "year = {2025}" in shown[1]
