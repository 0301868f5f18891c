"""The packaged evaluation and calibration data: what is held out was never shown, and the tasks run offline."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_compress.reference import corpus, export_data, skills
from moe_compress.reference.train import END, ROWS, SEQUENCE_LENGTH

ROOT = Path(export_data.__file__).parent
TEXTS = ("code", "documentation")


def records(name: str) -> list[dict[str, Any]]:
    with (ROOT / name).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def task(name: str) -> list[dict[str, Any]]:
    return records(f"tasks/data/{name}.jsonl")


@pytest.fixture(scope="module")
def training() -> str:
    """Everything of the training side that this Python still has, and the packaged calibration texts."""
    sources = [*corpus.stdlib_code(), *corpus.stdlib_documentation()]
    texts = [text for name, text in sources if not corpus.is_heldout(name)]
    return "\n".join(texts + [record["text"] for record in records("calibration.jsonl")])


@pytest.fixture(scope="module")
def asked() -> set[str]:
    """Every prompt in the packaged calibration texts."""
    texts = (record["text"] for record in records("calibration.jsonl"))
    return {prompt for text in texts for prompt in re.findall(r"Question: .*\nAnswer:", text)}


@pytest.mark.parametrize("name", TEXTS)
def test_heldout_texts_were_never_trained_on(name: str, training: str) -> None:
    pieces = task(name)
    assert 50_000 < sum(len(piece["text"].encode()) for piece in pieces) < 70_000
    shown = set(export_data.telling_lines(training))
    for piece in pieces:
        assert corpus.is_heldout(piece["source"])
        assert len(piece["text"].encode()) <= 1_500
        assert piece["text"].strip() not in training
        lines = export_data.telling_lines(piece["text"])
        assert sum(line in shown for line in lines) <= 0.25 * len(lines), piece["source"]


def test_texts_of_the_two_tasks_differ() -> None:
    assert not {piece["source"] for piece in task("code")} & {piece["source"] for piece in task("documentation")}


@pytest.mark.parametrize("skill", skills.REASONING)
def test_instances_are_of_the_test_side(skill: str, asked: set[str]) -> None:
    instances = task(skill)
    assert len({instance["prompt"] for instance in instances}) == 200
    assert instances == [{"prompt": q.prompt, "answer": q.answer} for q in skills.test_set(skill)]
    rng = random.Random("any other seed")
    trained = {skills.draw(skill, rng, test=False).prompt for _ in range(3_000)}
    for instance in instances:
        assert skills.is_test(skills.Question(instance["prompt"], instance["answer"]))
        assert instance["prompt"] not in asked and instance["prompt"] not in trained


def test_facts_are_asked_in_words_of_their_own(asked: set[str]) -> None:
    instances = task("facts")
    world = {fact.name: fact for fact in skills.facts()}
    assert len(instances) == len(world) == 400
    assert len(asked) > 1_000
    positions = [0] * 4
    for instance in instances:
        (fact,) = [fact for name, fact in world.items() if f" {name}" in instance["prompt"]]
        assert instance["choices"][instance["label"]] == fact.value
        assert len(set(instance["choices"])) == 4 and set(instance["choices"]) <= set(skills.ATTRIBUTES[fact.attribute])
        assert instance["prompt"] not in asked
        positions[instance["label"]] += 1
    assert min(positions) > 70  # always the same letter would be no question


def test_calibration_is_the_training_mixture() -> None:
    texts = records("calibration.jsonl")
    size = {kind: sum(len(r["text"].encode()) for r in texts if r["kind"] == kind) for kind in ROWS}
    assert set(size) == {record["kind"] for record in texts}
    assert 550_000 < sum(size.values()) < 700_000
    tokens = {kind: size[kind] / export_data.BYTES_PER_TOKEN[kind] for kind in ROWS}
    for kind, rows in ROWS.items():
        assert tokens[kind] / sum(tokens.values()) == pytest.approx(rows / sum(ROWS.values()), rel=0.1)
    assert sum(tokens.values()) > 128 * SEQUENCE_LENGTH
    assert [record["kind"] for record in texts] != sorted(record["kind"] for record in texts)
    statement = {fact.name for fact in skills.facts()}
    for record in texts:
        if record["kind"] in ("facts", "reasoning"):
            for document in record["text"].split(END):
                assert document.endswith("\n")
                question = skills.Question(document.partition("\nAnswer:")[0] + "\nAnswer:", "")
                assert record["kind"] == "facts" or not skills.is_test(question)
                assert record["kind"] == "reasoning" or any(name in document for name in statement)


def test_pieces_are_cut_at_blank_lines() -> None:
    table = "\n".join(["x = 1"] * 30)
    text = f"    first\n    line\n\n\nsecond\n\n{table}\n\nthird\nline\n  \n    fourth\n"
    found = list(export_data.pieces(text, (5, 40)))
    assert found == ["    first\n    line\n\n\nsecond\n", "third\nline\n  \n    fourth\n"]
    assert list(export_data.pieces(text, (5, 25))) == [
        "    first\n    line\n",
        "second\n",
        "third\nline\n  \n    fourth\n",
    ]
    assert list(export_data.pieces(text, (30, 40))) == []
    assert list(export_data.pieces(text, (5, 10_000))) == [text]


def test_export_is_reproducible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the same from the same sources; the questions are those that are packaged, on any Python."""
    sources = {
        "code": "def f():\n    return 1\n\n" * 40,
        "documentation": "Some words.\n\n" * 60,
        "prose": "A.\n\n" * 900,
    }
    monkeypatch.setattr(export_data, "documents", lambda *_: {kind: [text] for kind, text in sources.items()})
    monkeypatch.setattr(export_data, "CALIBRATION_BYTES", 20_000)
    export_data.export(tmp_path, tmp_path / "a")
    export_data.export(tmp_path, tmp_path / "b")
    names = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.jsonl")]
    assert len(names) == 9
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        if name.stem not in (*TEXTS, "calibration"):
            assert (tmp_path / "a" / name).read_bytes() == (ROOT / name).read_bytes()


RUN_TASKS = """
import json, logging, socket, sys
from pathlib import Path

def refuse(*_):
    raise AssertionError("the network was used")

socket.socket.connect = socket.getaddrinfo = refuse

import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_compress.reference
from tests.byte_tokenizer import byte_tokenizer

torch.manual_seed(0)
config = Qwen3MoeConfig(
    vocab_size=258, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, intermediate_size=16, max_position_embeddings=512,
)
model = HFLM(Qwen3MoeForCausalLM(config), tokenizer=byte_tokenizer(), batch_size=8, max_length=512)
folder = Path(moe_compress.reference.__file__).parent / "tasks"
manager = TaskManager(include_path=str(folder), include_defaults=False)
results = simple_evaluate(
    model, tasks=["reference"], task_manager=manager, limit=2, bootstrap_iters=0, log_samples=True
)
samples = {name: items[0] for name, items in results["samples"].items()}
print("RESULTS" + json.dumps({
    "results": results["results"],
    "arguments": {name: item["arguments"] for name, item in samples.items()},
    "targets": {name: item["target"] for name, item in samples.items()},
    "counts": {name: len(task.eval_docs) for name, task in manager.load(["reference"])["tasks"].items()},
}, default=str))
"""


def test_tasks_run_offline_from_anywhere(tmp_path: Path) -> None:
    """All eight tasks load and run in another directory, without a cache and without a network."""
    environment = os.environ | {"PYTHONPATH": str(ROOT.parents[1]), "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", RUN_TASKS]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.rpartition("RESULTS")[2])
    results, arguments = answer["results"], answer["arguments"]
    metrics = {"reference_facts": "acc,none"} | {f"reference_{name}": "bits_per_byte,none" for name in TEXTS}
    metrics |= {f"reference_{name}": "exact_match,strip" for name in skills.REASONING}
    for name, metric in metrics.items():
        value = results[name][metric]
        assert 6 < value < 10 if "bits" in metric else 0 <= value <= 1, (name, value)  # 8 bits: nothing was learnt
        assert answer["counts"][name] == len(task(name.removeprefix("reference_")))

    # What the model is shown is what training shows: prompt, one space, answer.
    shown = arguments["reference_facts"]
    first = task("facts")[0]
    assert shown == [[first["prompt"], f" {choice}"] for choice in first["choices"]]
    for skill in skills.REASONING:
        instance = task(skill)[0]
        ((prompt, settings),) = arguments[f"reference_{skill}"]
        assert prompt == instance["prompt"]
        assert settings["until"] == ["\n"] and settings["max_gen_toks"] == 16
        assert answer["targets"][f"reference_{skill}"] == instance["answer"]
    for name in TEXTS:
        assert arguments[f"reference_{name}"] == [[task(name)[0]["text"]]]
