"""Evaluation through lm-eval, against the same figures computed by hand on a tiny random model."""

from __future__ import annotations

import json
import logging
import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import tqdm
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from moe_compress.calibrate.config import CalibrationConfig
from moe_compress.checkpoint.source import open_checkpoint
from moe_compress.errors import DataError, MeasurementError, UnknownDataError, UsageError
from moe_compress.eval import harness, memory, precision
from moe_compress.eval.config import EvalConfig
from moe_compress.eval.harness import batch_size, check_tasks, evaluate, flatten
from moe_compress.measure import measure
from moe_compress.progress import SilentProgress
from moe_compress.report.build import build_report
from moe_compress.report.markdown import limits
from moe_compress.steps import Surroundings
from tests.byte_tokenizer import byte_tokenizer
from tests.matrix.families import save as save_family
from tests.matrix.families import tiny_config, tiny_model

PROMPTS = [f"Say the {word} again:" for word in ("red", "green", "blue", "seventh")]
CHOICES = ["one", "two", "three"]
TEXTS = ["A first text to be read.", "And a second, longer one: it has more bytes.", "ä, ö, ü"]
TASKS = {
    "text": """
task: text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "choice": """
task: choice
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}]
""",
    "echo": """
task: echo
output_type: generate_until
doc_to_text: prompt
doc_to_target: answer
target_delimiter: ""
generation_kwargs: {until: ["never"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "missing": """
task: missing
dataset_path: nobody/has-this
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}]
""",
}
GROUP = "group: everything\ntask: [text, choice, echo]\n"


class Tiny:
    """A checkpoint folder with its model, and tasks on what that model says."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tasks = folder / "model", folder / "tasks"
        self.tokenizer = byte_tokenizer()
        config = AutoConfig.for_model(
            "qwen3_moe", vocab_size=258, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, head_dim=8,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
            max_position_embeddings=64, eos_token_id=256, pad_token_id=256, initializer_range=0.3, dtype=torch.float32,
        )  # fmt: skip
        torch.manual_seed(0)
        self.model: Any = AutoModelForCausalLM.from_config(config).eval()
        self.model.save_pretrained(self.folder)
        self.tokenizer.save_pretrained(self.folder)
        self.labels = [0, 1, 2, 0]
        self.answers = [self.continuation(prompt, 5) for prompt in PROMPTS[:3]] + ["nothing of the kind"]
        choice = [{"prompt": p, "choices": CHOICES, "label": i} for p, i in zip(PROMPTS, self.labels, strict=True)]
        echo = [{"prompt": p, "answer": a} for p, a in zip(PROMPTS, self.answers, strict=True)]
        self.tasks.mkdir()
        for name, rows in (("text", [{"text": text} for text in TEXTS]), ("choice", choice), ("echo", echo)):
            data = self.tasks / f"{name}.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
            source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
            (self.tasks / f"{name}.yaml").write_text(TASKS[name].lstrip() + source)
        (self.tasks / "missing.yaml").write_text(TASKS["missing"].lstrip() + "test_split: test\n")
        (self.tasks / "everything.yaml").write_text(GROUP)

    def log_probability(self, context: str, text: str) -> float:
        """Natural logarithm of the probability of `text` after `context`; an empty context is the end token."""
        before = self.tokenizer(context)["input_ids"] or [256]
        ids = before + self.tokenizer(text)["input_ids"]
        with torch.no_grad():
            logits = self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return sum(float(logits[i - 1, ids[i]]) for i in range(len(before), len(ids)))

    def continuation(self, prompt: str, tokens: int) -> str:
        ids = self.tokenizer(prompt)["input_ids"]
        for _ in range(tokens):
            with torch.no_grad():
                ids.append(int(self.model(torch.tensor([ids])).logits[0, -1].argmax()))
        return str(self.tokenizer.decode(ids[-tokens:], skip_special_tokens=True))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def found(tiny: Tiny) -> dict[str, Any]:
    return evaluate(tiny.folder, settings(tiny, tasks=["everything"]))


@pytest.fixture(autouse=True)
def _only_own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own 13,000 task files take long to index, and no test here needs them."""
    manager = harness._manager
    monkeypatch.setattr(harness, "_manager", lambda paths, include_defaults: manager(paths, include_defaults=False))


def settings(tiny: Tiny, **changes: Any) -> EvalConfig:
    return EvalConfig.model_validate({"include_path": str(tiny.tasks)} | changes)


def test_bits_per_byte_is_that_of_the_whole_corpus(tiny: Tiny, found: dict[str, Any]) -> None:
    nats = -sum(tiny.log_probability("", text) for text in TEXTS)
    expected = nats / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    score = found["tasks"]["text"]["bits_per_byte"]
    assert score["value"] == pytest.approx(expected, rel=1e-5)
    assert score["higher_is_better"] is False and score["stderr"] is None


def test_accuracy_counts_the_likeliest_choice(tiny: Tiny, found: dict[str, Any]) -> None:
    best = [max(range(3), key=lambda i: tiny.log_probability(prompt, f" {CHOICES[i]}")) for prompt in PROMPTS]
    expected = sum(b == label for b, label in zip(best, tiny.labels, strict=True)) / len(PROMPTS)
    score = found["tasks"]["choice"]["acc"]
    assert score["value"] == expected
    assert score["higher_is_better"] is True
    assert score["stderr"] == pytest.approx(math.sqrt(expected * (1 - expected) / (len(PROMPTS) - 1)))


def test_generation_is_greedy_and_padded_batches_do_not_change_it(found: dict[str, Any]) -> None:
    assert found["tasks"]["echo"]["exact_match"]["value"] == 0.75


def test_a_group_without_aggregates_is_no_task(found: dict[str, Any]) -> None:
    assert list(found["tasks"]) == ["text", "choice", "echo"]


def test_settings_say_how_it_was_measured(found: dict[str, Any]) -> None:
    recorded = found["settings"]
    assert recorded["lm_eval"] and recorded["transformers"] and recorded["torch"]
    assert recorded["batch_size"] == 32 and recorded["context_length"] == 64
    assert recorded["max_gen_toks"] == {"echo": 5}
    assert recorded["num_fewshot"] == {"text": 0, "choice": 0, "echo": 0}
    assert recorded["num_documents"] == {"text": 3, "choice": 4, "echo": 4}
    assert (recorded["limit"], recorded["seed"], recorded["dtype"], recorded["device"]) == (None, 0, "float32", "cpu")
    assert recorded["apply_chat_template"] is False
    json.dumps(found)


def test_the_same_again_silently_with_progress(
    tiny: Tiny,
    found: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # not a repository, which git would complain about
    seen: list[tuple[int, int]] = []
    create, level = vars(tqdm.tqdm)["__init__"], logging.getLogger("lm_eval").level
    config = settings(tiny, tasks=["everything"])
    again = evaluate(tiny.folder, config, progress=lambda done, total: seen.append((done, total)))
    assert again == found
    assert capfd.readouterr() == ("", "")
    sizes = [3, 4 * 3, 4]
    ends = [sum(sizes[:number]) for number in range(4)]
    # each kind of request begins by raising the total, before its first answer
    assert seen == [(done, end) for start, end in pairwise(ends) for done in range(start, end + 1)]
    assert vars(tqdm.tqdm)["__init__"] is create and logging.getLogger("lm_eval").level == level


def test_limit_and_answer_length_reach_lm_eval(tiny: Tiny) -> None:
    limited = evaluate(tiny.folder, settings(tiny, tasks=["echo"], limit=2, max_gen_toks=3, batch_size=1))
    assert limited["settings"]["num_documents"] == {"echo": 2}
    assert limited["settings"]["max_gen_toks"] == {"echo": 3}
    assert limited["settings"]["batch_size"] == 1
    assert limited["tasks"]["echo"]["exact_match"]["value"] == 0  # three tokens of five


def test_tasks_from_a_file_and_a_folder(tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "copy.yaml"
    file.write_text((tiny.tasks / "text.yaml").read_text().replace("task: text", "task: copy"))
    for name in (file, tmp_path):
        assert list(evaluate(tiny.folder, EvalConfig(tasks=[str(name)], limit=1))["tasks"]) == ["copy"]


def test_a_folder_that_is_called_like_a_task_is_not_taken_for_it(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hellaswag").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no evaluation task `hellaswag`"):
        evaluate(tiny.folder, settings(tiny, tasks=["hellaswag"]))


def test_no_tasks_need_no_model(tmp_path: Path) -> None:
    assert evaluate(tmp_path / "absent", EvalConfig())["tasks"] == {}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tasks": ["chioce"]}, UnknownDataError, "did you mean `choice`"),
        ({"tasks": ["text", "xyzzy"]}, UnknownDataError, "no evaluation task `xyzzy`"),
        ({"tasks": ["missing"]}, DataError, "Task `missing` cannot be loaded"),
        ({"tasks": ["text"], "include_path": "absent"}, UnknownDataError, "absent does not exist"),
        ({"tasks": ["choice"], "apply_chat_template": True}, UsageError, "no chat template"),
        ({"tasks": ["echo"], "max_gen_toks": 64}, UsageError, "context of the model is 64"),
    ],
)
def test_mistakes_are_one_sentence(tiny: Tiny, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        evaluate(tiny.folder, settings(tiny, **changes))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["chioce"]}, "did you mean `choice`"),
        ({"tasks": ["missing"]}, "Task `missing` cannot be loaded"),
        ({"tasks": ["choice"], "apply_chat_template": True}, "no chat template"),
        ({"tasks": ["echo"], "max_gen_toks": 64}, "context of the model is 64"),
    ],
)
def test_mistakes_are_known_without_weights(tiny: Tiny, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    for file in tiny.folder.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, tmp_path / file.name)
    check_tasks(tmp_path, settings(tiny, tasks=["everything"]))
    with pytest.raises((DataError, UsageError), match=message):
        check_tasks(tmp_path, settings(tiny, **changes))


def test_a_folder_without_a_model_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match="cannot be loaded"):
        evaluate(tmp_path, settings(tiny, tasks=["text"]))


def test_a_model_without_a_causal_auto_class_is_evaluated(tiny: Tiny, tmp_path: Path) -> None:
    config: Any = tiny_config("mistral4")
    config.get_text_config().vocab_size = 258
    model = tiny_model(config)
    assert type(model.config) not in AutoModelForCausalLM._model_mapping
    save_family(model, tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    found = evaluate(tmp_path, settings(tiny, tasks=["text"]))
    assert found["tasks"]["text"]["bits_per_byte"]["value"] > 0


def test_a_model_larger_than_memory_is_not_loaded(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1)
    with pytest.raises(MeasurementError, match="GB of memory"):
        evaluate(tiny.folder, settings(tiny, tasks=["text"]))


def test_an_evaluation_that_fails_costs_no_result(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason takes the place of the figures, for the speed as for the tasks, and is not kept for a resumed run."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1)
    config = settings(tiny, tasks=["text"]).model_copy(update={"speed": True})
    checkpoint = open_checkpoint(str(tiny.folder))
    around = Surroundings(CalibrationConfig(dataset="reference"), 10**9, "cpu", SilentProgress())
    original, compressed = measure(checkpoint, checkpoint, config, tmp_path / "eval", around)
    assert set(original["not_measured"]) == {"tasks", "speed"} == set(compressed["not_measured"])
    assert not (tmp_path / "eval").exists()
    report = build_report(original, compressed, settings={"model": "m"})
    assert "not_measured" not in report["provenance"]
    said = [limit for limit in limits(report) if "not measured" in limit]
    assert len(said) == 4 and said[0].startswith("Tasks of the baseline model: not measured: the whole model takes")


def test_a_group_of_tasks_from_elsewhere_needs_the_whole_index(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "mixed.yaml").write_text("group: mixed\ntask: [text, hellaswag]\n")
    manager = harness._manager((str(tiny.tasks), str(tmp_path)), include_defaults=False)
    assert harness._self_contained("everything", manager.task_index)
    assert not harness._self_contained("mixed", manager.task_index)
    assert not harness._self_contained("hellaswag", manager.task_index)


def test_names_carry_their_filter_only_among_several() -> None:
    results = {
        "configs": {"one": {}, "two": {}},
        "results": {
            "one": {"alias": "one", "acc,strip": 0.5, "acc_stderr,strip": 0.1, "sample_len": 4},
            "two": {"exact_match,strict": 0.2, "exact_match_stderr,strict": "N/A", "exact_match,loose": 0.4},
            "sum": {"acc,none": 0.3, "acc_stderr,none": "N/A"},
            "bare": {"alias": "bare"},
        },
        "groups": {"sum": {"acc,none": 0.3}},
        "higher_is_better": {"one": {"acc": False}, "two": {"exact_match": None}, "sum": {}},
    }
    assert flatten(results) == {
        "one": {"acc": {"value": 0.5, "stderr": 0.1, "higher_is_better": False}},
        "two": {  # a direction that lm-eval does not know is not made up
            "exact_match,strict": {"value": 0.2, "stderr": None, "higher_is_better": None},
            "exact_match,loose": {"value": 0.4, "stderr": None, "higher_is_better": None},
        },
        "sum": {"acc": {"value": 0.3, "stderr": None, "higher_is_better": None}},
    }


def test_automatic_batches_bound_the_logits() -> None:
    small = AutoConfig.for_model("qwen3_moe", vocab_size=4096, max_position_embeddings=512)
    large = AutoConfig.for_model("qwen3_moe", vocab_size=151_936, max_position_embeddings=32_768)
    assert batch_size(EvalConfig(), small, "cpu") == 32
    assert batch_size(EvalConfig(), large, "cpu") == 1
    assert 1 < batch_size(EvalConfig(), large, "cuda") < 32
    assert batch_size(EvalConfig(batch_size=7), large, "cpu") == 7


def test_bfloat16_is_computed_only_where_it_is_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = {dtype: AutoConfig.for_model("qwen3_moe", dtype=dtype) for dtype in (torch.bfloat16, torch.float16)}
    for flags, expected in (("fpu avx2", torch.float32), ("fpu avx2 avx512_bf16", torch.bfloat16)):
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: {flags}\nbugs : none\n")
        monkeypatch.setattr(precision, "CPU_INFO", tmp_path / "cpuinfo")
        precision.cpu_has_bf16_units.cache_clear()
        assert precision.compute_dtype(stored[torch.bfloat16], "cpu") == expected
        assert precision.compute_dtype(stored[torch.float16], "cpu") == torch.float32
        assert precision.compute_dtype(stored[torch.float16], "cuda") == torch.float16
    precision.cpu_has_bf16_units.cache_clear()


def test_settings_are_checked() -> None:
    for wrong in ({"task": ["a"]}, {"limit": 0}, {"batch_size": "large"}, {"random_baselines": -1}, {"seed": -1}):
        with pytest.raises(ValidationError):
            EvalConfig.model_validate(wrong)
    assert all(field.description for field in EvalConfig.model_fields.values())
