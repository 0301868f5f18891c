"""The scores of a report in the Hub's two forms: `model-index` of a card, and `.eval_results/*.yaml`.

Only what `report.json` holds of the compressed model is written, as it stands there: no rounding, no percent. The
second form, which feeds leaderboards, is written for tasks whose documents come from a dataset of the Hub; its
`task_id` is lm-eval's name of the task, so a benchmark that calls it otherwise does not list it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from moe_compress.report.build import headline_metric

FOLDER = ".eval_results"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
TASK_TYPE = "text-generation"


def is_hub_id(name: object) -> bool:
    """Whether this can be `owner/name` on the Hub; reports name local files without their folder."""
    return isinstance(name, str) and HUB_ID.fullmatch(name) is not None


def model_index(report: Mapping[str, Any]) -> list[EvalResult]:
    """Every metric of every task, each with the setup it was measured in."""
    return [
        EvalResult(
            task_type=TASK_TYPE,
            task_name="Text Generation",
            dataset_type=dataset["path"] if is_hub_id(dataset.get("path")) else task,
            dataset_name=task,
            dataset_config=dataset.get("name"),
            dataset_split=dataset.get("split"),
            metric_type=metric.partition(",")[0],
            metric_name=f"{task} {metric}{_setup(report, task)}",
            metric_value=values["value"],
        )
        for task, metrics, dataset in _tasks(report)
        for metric, values in metrics.items()
    ]


def eval_results(report: Mapping[str, Any]) -> dict[str, str]:
    """The files of `.eval_results` by name: for each task on a dataset of the Hub, the metric that stands for it."""
    files = {}
    for task, metrics, dataset in _tasks(report):
        if not is_hub_id(dataset.get("path")):
            continue
        metric = headline_metric(metrics)
        entry = EvalResultEntry(
            dataset_id=dataset["path"],
            task_id=task,
            value=metrics[metric]["value"],
            notes=f"{metric}, {dataset.get('split')} split, lm-eval task {task}{_setup(report, task)}",
        )
        name = re.sub(r"[^\w.-]", "_", task)
        files[f"{name}.yaml"] = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    return files


def write_eval_results(folder: Path, report: Mapping[str, Any]) -> None:
    """Make `.eval_results` of a checkpoint folder hold what this report says, and nothing of an earlier one."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    for name, text in eval_results(report).items():
        (folder / FOLDER).mkdir(exist_ok=True)
        (folder / FOLDER / name).write_text(text, encoding="utf-8")


def _tasks(report: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], Mapping[str, Any]]]:
    """Each task of the compressed model that has a value, its metrics that have one, and its dataset."""
    datasets = (report["settings"].get("eval") or {}).get("datasets", {})
    for task, metrics in report["compressed"].get("tasks", {}).items():
        known = {name: values for name, values in metrics.items() if values["value"] is not None}
        if known:
            yield task, known, datasets.get(task, {})


def _setup(report: Mapping[str, Any], task: str) -> str:
    """` (0-shot, first 200 documents)`: what the reader of a bare number has to know."""
    settings = report["settings"].get("eval") or {}
    shots = settings.get("num_fewshot")
    shots = shots.get(task) if isinstance(shots, Mapping) else shots
    parts = [] if shots is None else [f"{shots}-shot"]
    parts += [f"first {settings['limit']} documents"] if settings.get("limit") else []
    parts += ["chat template"] if settings.get("apply_chat_template") else []
    return f" ({', '.join(parts)})" if parts else ""
