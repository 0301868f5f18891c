"""Distillation with everything divided among processes by FSDP2: the numbers of one process, a share of the bytes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_compress import run
from moe_compress.compress.distill import step as distill_step
from moe_compress.compress.distill import train as training
from moe_compress.compress.distill.accelerate_config import Launch
from moe_compress.compress.distill.config import DistillConfig
from moe_compress.compress.distill.state import parameter_readers, read_metrics
from moe_compress.compress.distill.train import Job, _Run, train
from moe_compress.verification import checks
from tests.crashes import in_child
from tests.integration.test_distill import losses, weights
from tests.processes import in_processes
from tests.tiny_checkpoint import tiny_recipe

LAYERS = 4
PRUNE = {"op": "prune", "criterion": "reap", "keep": 0.5}
TIE = {"op": "tie", "group_size": 2, "residual_rank": 4, "prelude": 1, "coda": 1, "fit": "average"}
ZERO = {"op": "zero_experts"}
DISTILL = {
    "op": "distill", "trainable": ["all"], "learning_rate": 2e-3, "epochs": 2, "batch_size": 4, "micro_batch_size": 1,
    "save_every": 2,
}  # fmt: skip
# What `accelerate config` writes
CONFIG: dict[str, Any] = {
    "compute_environment": "LOCAL_MACHINE", "debug": False, "distributed_type": "FSDP", "downcast_bf16": "no",
    "enable_cpu_affinity": False, "machine_rank": 0, "main_training_function": "main", "mixed_precision": "no",
    "num_machines": 1, "num_processes": 2, "rdzv_backend": "static", "same_network": True, "tpu_env": [],
    "tpu_use_cluster": False, "tpu_use_sudo": False, "use_cpu": True,
    "fsdp_config": {
        "fsdp_activation_checkpointing": False, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_cpu_ram_efficient_loading": True, "fsdp_offload_params": False, "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT", "fsdp_version": 2,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def lenient(no_reload: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short trainings miss the share of slots to skip."""
    monkeypatch.setattr(checks, "check_target", lambda *given: checks.Check(True, "not looked at here."))


class Trainings:
    """Trainings of changed models, each in a folder of its own, on seven sequences of random tokens."""

    def __init__(self, base: Path, source: Path, texts: Path) -> None:
        self.base, self.source, self.texts = base, source, texts
        self.tokens_NS = torch.randint(3, 250, (7, 24), generator=torch.Generator().manual_seed(1))

    def student(self, step: dict[str, Any]) -> Path:
        """The original after one step, written once."""
        folder = self.base / str(step["op"])
        if not folder.exists():
            run(tiny_recipe(self.source, self.texts, export={"tier": "plugin"}) | {"steps": [step]}, folder)
        return folder

    def job(self, name: str, processes: int, step: dict[str, Any] = PRUNE, **settings: Any) -> Job:
        folder = self.base / f"training-{name}"
        folder.mkdir(exist_ok=True)
        save_file({"tokens": self.tokens_NS}, folder / training.TOKENS_FILE)
        config = DistillConfig.model_validate(DISTILL | settings)
        launch = None
        if processes > 1:
            launch = Launch(processes, True, config.precision == "float32", "float32", True)
        return Job(config, self.student(step), self.source, folder, "cpu", "x", launch)


@pytest.fixture(scope="module")
def trainings(source: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("trainings"), source, texts)


def trained(job: Job, processes: int) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The metrics, but for the clock, and the trained parameters."""
    if processes > 1:
        in_processes(processes, lambda: train(Job.from_json(job.to_json()), lambda line: None))
    else:
        train(job, lambda line: None)
    lines = [{key: value for key, value in line.items() if key != "seconds"} for line in read_metrics(job.folder)]
    return lines, {name: read() for name, read in parameter_readers(job.folder).items()}


def config_file(folder: Path, fsdp: dict[str, Any] | None = None, **settings: Any) -> str:
    content = CONFIG | settings | {"fsdp_config": CONFIG["fsdp_config"] | (fsdp or {})}
    file = folder / "fsdp.yaml"
    file.write_text(yaml.safe_dump(content))
    return str(file)


@pytest.mark.parametrize(
    ("name", "step", "settings"),
    [
        ("online", PRUNE, {"hidden_weight": 0.1}),
        ("tied", TIE, {"trainable": ["experts", "residuals"]}),
        ("zero", ZERO, {"target_skip": 0.5, "expert_balance_alpha": 0.1}),
        ("policy", ZERO, {"target_skip": 0.5, "stage": "on_policy", "prompt_length": 20, "learning_rate": 3e-4}),
    ],
)
def test_two_processes_with_halves_are_one(
    trainings: Trainings, name: str, step: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Losses, gradient norms and weights, up to the rounding of sums; one of the two has a pass less to make."""
    one, alone = trained(trainings.job(f"{name}-1", 1, step, **settings), 1)
    two, shared = trained(trainings.job(f"{name}-2", 2, step, **settings), 2)
    assert len(one) == 4
    for single, both in zip(one, two, strict=True):
        for key, value in single.items():
            assert both[key] == pytest.approx(value, rel=1e-4), key
    before = dict(training.load_model(trainings.student(step), "cpu").named_parameters())
    assert alone.keys() == shared.keys()
    for key, value in alone.items():
        way = float((value - before[key]).norm())
        assert float((value - shared[key]).norm()) <= 0.01 * way + 1e-7, key


def test_bfloat16_is_gathered_as_such(trainings: Trainings) -> None:
    """Losses are those of one process in bfloat16, up to the rounding of norms and routers, which is new."""
    one, _ = trained(trainings.job("half-1", 1, precision="bfloat16"), 1)
    two, shared = trained(trainings.job("half-2", 2, precision="bfloat16"), 2)
    full, _ = trained(trainings.job("full", 1), 1)
    for single, both, exact in zip(one, two, full, strict=True):
        assert both["loss"] == pytest.approx(single["loss"], rel=0.02)
        assert both["loss"] != pytest.approx(exact["loss"], rel=1e-6)
    assert {value.dtype for value in shared.values()} == {torch.float32}


def test_killed_and_resumed_is_uninterrupted(
    source: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started by accelerate, killed, and continued: to the bit what two forks give without interruption."""
    step = DISTILL | {"teacher": "nf4", "accelerate_config": config_file(tmp_path)}
    settings = tiny_recipe(source, texts) | {"steps": [PRUNE, step]}

    def forks(job: Job, first: int, on_update: Any) -> None:
        in_processes(job.config.processes, lambda: train(Job.from_json(job.to_json()), lambda line: None))

    with monkeypatch.context() as patched:
        patched.setattr(distill_step, "train_in_processes", forks)
        run(settings, tmp_path / "whole", keep_steps=True)

    def action() -> None:
        def kill(stage: Any, schedule: Any) -> Callable[[dict[str, Any]], None]:
            return lambda line: os.kill(os.getpid(), signal.SIGKILL) if line["update"] == 2 else None

        distill_step.watcher = kill  # type: ignore[assignment]
        run(settings, tmp_path / "cut", keep_steps=True)

    assert in_child(action) == -signal.SIGKILL
    run(settings, tmp_path / "cut", keep_steps=True, resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def test_another_number_of_processes_goes_on(trainings: Trainings) -> None:
    """Three write a state, then one, which holds everything, and then two."""
    alone: list[dict[str, Any]] = []
    train(trainings.job("alone", 1, batch_size=6), alone.append)
    assert len(alone) == 3

    class Stopped(Exception):
        pass

    def until(update: int) -> Callable[[dict[str, Any]], None]:
        def watch(line: dict[str, Any]) -> None:
            if line["update"] == update:
                raise Stopped

        return watch

    def stopped(job: Job, update: int) -> None:
        with pytest.raises(Stopped):
            train(job, until(update))

    in_processes(3, lambda: stopped(trainings.job("shared", 3, batch_size=6, save_every=1), 0))
    stopped(trainings.job("shared", 1, batch_size=6, save_every=1), 1)
    in_processes(2, lambda: train(trainings.job("shared", 2, batch_size=6, save_every=1), lambda line: None))
    lines = read_metrics(trainings.base / "training-shared")
    for one, other in zip(alone, lines, strict=True):
        assert {**other, "seconds": 0} == pytest.approx({**one, "seconds": 0}, rel=1e-4)


@pytest.mark.parametrize("processes", [2, 4])
def test_a_process_holds_its_share_of_the_bytes(trainings: Trainings, processes: int, tmp_path: Path) -> None:
    """Of student, teacher and moments, by the memory behind them, between two updates."""
    job = trainings.job(f"bytes-{processes}", processes)
    count, original = (
        sum(parameter.numel() for parameter in training.load_model(folder, "cpu").parameters())
        for folder in (job.student, job.teacher)
    )

    def measured() -> None:
        found: list[int] = []
        whole_update = _Run.update

        def update(self: _Run, *given: Any) -> dict[str, Any]:
            line = whole_update(self, *given)
            models = [self.student, self.teacher.model]  # type: ignore[attr-defined]
            tensors = [parameter for model in models for parameter in model.parameters()]
            tensors += [value for state in self.optimizer.state.values() for value in state.values() if value.ndim]
            local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
            storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in local}
            found.append(sum(storages.values()))
            return line

        _Run.update = update  # type: ignore[method-assign]
        train(job, lambda line: None)
        (tmp_path / f"{dist.get_rank()}").write_text(str(found[-1]))

    in_processes(processes, measured)
    held = [int((tmp_path / f"{rank}").read_text()) for rank in range(processes)]
    everything = 4 * (3 * count + original)
    assert sum(held) == pytest.approx(everything, rel=0.02)
    assert max(held) < 1.05 * everything / processes
