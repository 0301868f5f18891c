"""Quality: any lm-eval task on a checkpoint folder, through lm-eval's own Python API, unmodified tasks and metrics.

The same folder, settings and machine give the same figures: seeds are set, the batch size is fixed, documents are taken
in order. Log-probabilities are computed in float32. `reference` names the packaged task group of the reference model.

Not covered: models that are not causal language models on one device, and tasks that run code the model wrote unless
HF_ALLOW_CODE_EVAL=1 says so.
"""

from __future__ import annotations

import difflib
import gc
import importlib.metadata
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig

from moe_compress.errors import DataError, MeasurementError, MoECompressError, UnknownDataError, UsageError
from moe_compress.eval.config import EvalConfig
from moe_compress.eval.memory import require_memory
from moe_compress.eval.precision import compute_dtype
from moe_compress.models.skeleton import model_class
from moe_compress.text import first_line

REFERENCE_TASKS = Path(__file__).parents[1] / "reference" / "tasks"
LOGITS_BYTES = {"cpu": 1 << 30, "cuda": 4 << 30}  # of one batch in float32, for `batch_size: auto`
MAX_BATCH_SIZE = 32
BOOTSTRAP_ITERATIONS = 1000

Metrics = dict[str, dict[str, Any]]


def evaluate(
    folder: Path, config: EvalConfig, device: str = "cpu", progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Run the tasks of `config` on the checkpoint in `folder`; `progress(done, total)` counts lm-eval's requests.

    Returns {"tasks": {task: {metric: {"value", "stderr", "higher_is_better"}}}, "settings": {...}}: every subtask by
    itself, and a group only where it defines an aggregate. A metric's name carries its filter
    (`exact_match,strict-match`) only where a task has several. Raises `DataError` for unknown tasks and data that
    cannot be had, `UsageError` for settings that this model or task does not allow, `MeasurementError` when the model
    does not load or does not run.
    """
    settings: dict[str, Any] = {name: importlib.metadata.version(name) for name in ("lm_eval", "transformers", "torch")}
    settings |= {"device": device, "limit": config.limit, "seed": config.seed}
    if not config.tasks:
        return {"tasks": {}, "settings": settings}
    with _quiet():
        loaded, manager = _load_tasks(config)
        model = _load_model(folder.resolve(), config, device, progress)
        _check(loaded, model, config)
        import lm_eval

        with _own_errors("the evaluation failed", MeasurementError):
            results: Any = lm_eval.simple_evaluate(
                model,
                tasks=[*loaded.values()],
                task_manager=manager,
                num_fewshot=config.num_fewshot,
                limit=config.limit,
                apply_chat_template=config.apply_chat_template,
                fewshot_as_multiturn=config.apply_chat_template,
                gen_kwargs={"max_gen_toks": config.max_gen_toks} if config.max_gen_toks is not None else None,
                bootstrap_iters=BOOTSTRAP_ITERATIONS,
                log_samples=False,
                random_seed=config.seed,
                numpy_random_seed=config.seed,
                torch_random_seed=config.seed,
                fewshot_random_seed=config.seed,
                confirm_run_unsafe_code=os.environ.get("HF_ALLOW_CODE_EVAL") == "1",
            )
        settings |= {
            "dtype": str(model.model.dtype).removeprefix("torch."),
            "batch_size": model.batch_size,
            "context_length": model.max_length,
            "apply_chat_template": config.apply_chat_template,
            "max_gen_toks": _generation_lengths(results["configs"], model),
            "num_fewshot": {task: results["n-shot"][task] for task in results["configs"]},
            "num_documents": {task: count["effective"] for task, count in results["n-samples"].items()},
            "task_versions": {task: results["versions"][task] for task in results["configs"]},
            "datasets": {task: _dataset(content) for task, content in results["configs"].items()},
        }
        del model
        gc.collect()
    return {"tasks": flatten(results), "settings": settings}


def check_tasks(folder: Path, config: EvalConfig) -> None:
    """Raise what `evaluate` would raise about the tasks of `config`, without the weights of the model in `folder`.

    The tasks' data is read (and downloaded), the model's configuration and tokenizer too.
    """
    if config.tasks:
        with _quiet():
            loaded, _ = _load_tasks(config)
            from moe_compress.eval._lm import WithoutWeights

            _check(loaded, WithoutWeights(folder), config)


def flatten(results: Mapping[str, Any]) -> dict[str, Metrics]:
    """lm-eval's results as {task: {metric: {"value", "stderr", "higher_is_better"}}}."""
    tasks: dict[str, Metrics] = {}
    for task, row in results["results"].items():
        if task not in results["configs"] and task not in results.get("groups", {}):
            continue  # a group that defines no aggregate
        scores = {key: value for key, value in row.items() if "," in key and "_stderr," not in key}
        filters = {key.partition(",")[2] for key in scores}
        tasks[task] = {}
        for key, value in scores.items():
            metric, _, name = key.partition(",")
            stderr = row.get(f"{metric}_stderr,{name}")
            higher = results["higher_is_better"].get(task, {}).get(metric)
            tasks[task][key if len(filters) > 1 else metric] = {
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, (int, float)) else None,
                "higher_is_better": None if higher is None else bool(higher),
            }
    return tasks


def _dataset(task: Mapping[str, Any]) -> dict[str, Any]:
    """Where a task's documents come from, as its configuration names it to `datasets`."""
    local = task.get("custom_dataset") is not None or (task.get("dataset_kwargs") or {}).get("data_files") is not None
    return {
        "path": None if local else task.get("dataset_path"),
        "name": task.get("dataset_name"),
        "split": task.get("test_split") or task.get("validation_split"),
    }


def _load_tasks(config: EvalConfig) -> tuple[dict[str, Any], Any]:
    """lm-eval's task and group objects by name, with their data, and the manager that made them."""
    folders = [REFERENCE_TASKS, *([Path(config.include_path)] if config.include_path else [])]
    folders += [Path(name) for name in config.tasks if _is_folder(name)]
    for folder in folders[1:]:
        if not folder.is_dir():
            raise UnknownDataError(f"The task folder {folder} does not exist.")
    paths = tuple(str(folder.resolve()) for folder in folders)
    manager = _manager(paths, include_defaults=False)
    names = [name for entry in config.tasks for name in _expand(entry, manager)]
    if not all(_self_contained(name, manager.task_index) for name in names):
        manager = _manager(paths, include_defaults=True)
        names = [name for entry in config.tasks for name in _expand(entry, manager)]
    for name in names:
        if name not in manager.task_index and not _is_file(name):
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean `{close[0]}`?" if close else "`lm-eval ls tasks` lists those that lm-eval brings."
            raise UnknownDataError(f"There is no evaluation task `{name}`; {hint}")
    loaded: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        with _own_errors(f"Task `{name}` cannot be loaded"):
            content = manager.load([name])
        members = {member for group in content["groups"].values() for member in group.child_names}
        loaded |= {key: group for key, group in content["groups"].items() if key not in members}
        in_groups = {task.task_name for group in content["groups"].values() for task in group.get_all_tasks()}
        loaded |= {key: task for key, task in content["tasks"].items() if key not in in_groups}
    return loaded, manager


@lru_cache(maxsize=4)
def _manager(paths: tuple[str, ...], *, include_defaults: bool) -> Any:
    """An index of tasks; that of lm-eval's own 13,000 files takes many seconds, so it is made only when needed."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(paths), include_defaults=include_defaults)


def _expand(entry: str, manager: Any) -> list[str]:
    """The task names that one entry of `eval.tasks` stands for."""
    if entry in manager.task_index:
        return [entry]
    if _is_folder(entry):
        root = Path(entry).resolve()
        return [
            name
            for name in manager.all_subtasks
            if (path := manager.task_index[name].yaml_path) is not None and path.is_relative_to(root)
        ]
    if any(character in entry for character in "*?["):
        return manager.match_tasks([entry]) or [entry]
    return [entry]


def _is_folder(entry: str) -> bool:
    """Whether this names a folder of tasks, and not a task that happens to be called like some folder here."""
    return Path(entry).is_dir() and any(Path(entry).rglob("*.yaml"))


def _is_file(entry: str) -> bool:
    return entry.endswith(".yaml") and Path(entry).is_file()


def _self_contained(name: str, index: Mapping[str, Any]) -> bool:
    """Whether a task is in this index, and all that a group is made of."""
    if name not in index:
        return _is_file(name)
    children = (index[name].cfg or {}).get("task")
    if not isinstance(children, list):
        return True
    names = [child if isinstance(child, str) else child.get("task", child.get("group")) for child in children]
    return all(_self_contained(child, index) for child in names)


# --------------------------------------------------------------------------------------------------------------- model


def _load_model(folder: Path, config: EvalConfig, device: str, progress: Callable[[int, int], None] | None) -> Any:
    from moe_compress.eval._lm import QuietLM

    with _own_errors("the model cannot be loaded for evaluation", MeasurementError):
        model_config = AutoConfig.from_pretrained(folder)
        require_memory(folder, device)
        dtype = compute_dtype(model_config, device)
        # Looping over experts is the fastest way through float32 on a CPU.
        kwargs = {"experts_implementation": "eager"} if device == "cpu" and dtype == torch.float32 else {}
        model = model_class(model_config).from_pretrained(folder, dtype=dtype, device_map={"": device}, **kwargs)
        return QuietLM(
            pretrained=model,
            tokenizer=str(folder),
            backend="causal",  # the name alone would make lm-eval guess from a table of its own
            softmax_dtype=torch.float32,
            batch_size=batch_size(config, model_config, device),
            progress=progress,
        )


def batch_size(config: EvalConfig, model_config: PretrainedConfig, device: str) -> int:
    """Sequences per forward pass: as set, or as many as keep the logits of full windows within a fixed memory."""
    if config.batch_size != "auto":
        return config.batch_size
    text = model_config.get_text_config()
    window = min(getattr(text, "max_position_embeddings", None) or 2048, 2048)
    row_bytes = 4 * window * int(text.vocab_size)
    return max(1, min(MAX_BATCH_SIZE, LOGITS_BYTES[torch.device(device).type] // row_bytes))


def _check(loaded: Mapping[str, Any], model: Any, config: EvalConfig) -> None:
    """Refuse what lm-eval would stumble over only after hours of other tasks."""
    if config.apply_chat_template and not model.tokenizer.chat_template:
        raise UsageError("The tokenizer has no chat template; set `eval.apply_chat_template=false`.")
    tasks = [
        task for item in loaded.values() for task in (item.get_all_tasks() if hasattr(item, "child_names") else [item])
    ]
    if config.max_gen_toks is None:
        lengths = _generation_lengths({task.task_name: task.dump_config() for task in tasks}, model)
    else:
        lengths = {task.task_name: config.max_gen_toks for task in tasks if task.OUTPUT_TYPE == "generate_until"}
    for task, length in lengths.items():
        if length >= model.max_length:
            raise UsageError(
                f"Task `{task}` may generate {length} tokens, but the context of the model is {model.max_length}; "
                "set `eval.max_gen_toks` below that."
            )
    unsafe = [task.task_name for task in tasks if getattr(task, "UNSAFE_CODE", False)]
    if unsafe and os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
        raise UsageError(f"Task `{unsafe[0]}` runs code that the model writes; set HF_ALLOW_CODE_EVAL=1 to allow it.")


def _generation_lengths(configs: Mapping[str, Any], model: Any) -> dict[str, int]:
    """Longest answer in tokens, per generating task."""
    return {
        task: int((content.get("generation_kwargs") or {}).get("max_gen_toks", model.max_gen_toks))
        for task, content in configs.items()
        if content.get("output_type") == "generate_until"
    }


# --------------------------------------------------------------------------------------------------------------- quiet


@contextmanager
def _own_errors(what: str, kind: type[MoECompressError] = DataError) -> Iterator[None]:
    """One sentence for whatever lm-eval, a task's own code or `datasets` raises: these have no common base."""
    try:
        yield
    except MoECompressError:
        raise
    except Exception as error:
        raise kind(f"{what}: {first_line(error)}.") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval and what it calls off the terminal, and restore everything afterwards."""
    import lm_eval.api.metrics
    import lm_eval.evaluator
    import tqdm

    create = tqdm.tqdm.__init__

    def create_disabled(bar: Any, *args: Any, **kwargs: Any) -> None:
        create(bar, *args, **kwargs | {"disable": True})

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name in ("lm_eval", "transformers", "datasets", "accelerate", "huggingface_hub"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        bars: Any = transformers.utils.logging
        if bars.is_progress_bar_enabled():
            bars.disable_progress_bar()
            stack.callback(bars.enable_progress_bar)
        stack.enter_context(_replaced(tqdm.tqdm, "__init__", create_disabled))
        stack.enter_context(_replaced(lm_eval.api.metrics, "print", lambda *_: None))
        # They run `pip list` and `git`: two seconds for what nobody reads, and complaints outside a repository.
        stack.enter_context(_replaced(lm_eval.evaluator, "add_env_info", lambda _: None))
        stack.enter_context(_replaced(lm_eval.evaluator, "get_git_commit_hash", lambda: None))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
