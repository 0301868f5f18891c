"""Distillation with everything divided among processes by FSDP2: the numbers of one process, a share of the bytes."""

from __future__ import annotations

import os
import shutil
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
SKIP = DISTILL | {"target_skip": 0.5, "expert_balance_alpha": 0.1}
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

Recipe = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def lenient(no_reload: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short trainings miss the share of slots to skip."""
    monkeypatch.setattr(checks, "check_target", lambda *given: checks.Check(True, "not looked at here."))


@pytest.fixture
def recipe(source: Path, texts: Path) -> Recipe:
    """Seven sequences, so that in every second update one of two processes has nothing left to do."""

    def make(*steps: dict[str, Any]) -> dict[str, Any]:
        made = tiny_recipe(source, texts, export={"tier": "plugin"}) | {"steps": list(steps)}
        made["calibration"] |= {"num_samples": 7}
        return made

    return make


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forks instead of processes that accelerate starts, which would import everything anew."""

    def start(job: Job, first: int, on_update: Any) -> None:
        in_processes(job.config.processes, lambda: train(Job.from_json(job.to_json()), lambda line: None))

    monkeypatch.setattr(distill_step, "train_in_processes", start)


def config_file(folder: Path, fsdp: dict[str, Any] | None = None, **settings: Any) -> str:
    content = CONFIG | settings | {"fsdp_config": CONFIG["fsdp_config"] | (fsdp or {})}
    file = folder / "fsdp.yaml"
    file.write_text(yaml.safe_dump(content))
    return str(file)


def trained(out: Path, number: int = 1) -> dict[str, Tensor]:
    folder = out.with_name(f"{out.name}.work") / f"step-{number}" / "training"
    return {name: read() for name, read in parameter_readers(folder).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor], before: dict[str, Tensor], tolerance: float) -> None:
    """The way from `before` to one end is that to the other, up to a share of its length."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        way = float((value - before[name]).norm())
        assert float((value - other[name]).norm()) <= tolerance * way + 1e-7, name


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("first", "settings"),
    [
        (PRUNE, DISTILL | {"hidden_weight": 0.1}),
        (PRUNE, DISTILL | {"teacher": "cached", "trainable": ["routers", "norms"]}),
        (TIE, DISTILL | {"trainable": ["experts", "residuals"], "teacher": "nf4"}),
        (ZERO, SKIP),
        (ZERO, SKIP | {"stage": "on_policy", "prompt_length": 56, "learning_rate": 3e-4}),
    ],
    ids=["online", "cached", "tied", "zero_experts", "on_policy"],
)
def test_two_processes_with_halves_are_one(
    recipe: Recipe, first: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    """Losses, gradient norms and weights, up to the rounding of sums."""
    run(recipe(first, settings), tmp_path / "one", keep_steps=True)
    divided = settings | {"accelerate_config": config_file(tmp_path)}
    run(recipe(first, divided), tmp_path / "two", keep_steps=True)
    lines = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(lines[0]) == 4
    for single, shared in zip(*lines, strict=True):
        for name, value in single.items():
            assert shared[name] == pytest.approx(value, rel=1e-4), name
    start = tmp_path / "one.work" / "step-0" / "checkpoint"
    before = {name: value.detach() for name, value in training.load_model(start, "cpu").named_parameters()}
    same(trained(tmp_path / "one"), trained(tmp_path / "two"), before, 0.01)


@pytest.mark.usefixtures("forked")
def test_bfloat16_is_gathered_as_such(recipe: Recipe, tmp_path: Path) -> None:
    """Losses are those of one process in bfloat16, but for norms and routers, whose weights are rounded too."""
    run(recipe(PRUNE, DISTILL | {"precision": "bfloat16"}), tmp_path / "one", keep_steps=True)
    file = config_file(tmp_path, {"fsdp_reshard_after_forward": False}, mixed_precision="bf16")
    run(recipe(PRUNE, DISTILL | {"accelerate_config": file}), tmp_path / "two", keep_steps=True)
    for single, shared in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert shared["loss"] == pytest.approx(single["loss"], rel=0.02)
    full = recipe(PRUNE, DISTILL)
    run(full, tmp_path / "full", keep_steps=True)
    assert losses(tmp_path / "two")[0]["loss"] != pytest.approx(losses(tmp_path / "full")[0]["loss"], rel=1e-5)


def test_killed_and_resumed_is_uninterrupted(
    recipe: Recipe, forked: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started by accelerate, killed, and continued: to the bit what two forks give without interruption."""
    settings = recipe(PRUNE, DISTILL | {"accelerate_config": config_file(tmp_path)})
    run(settings, tmp_path / "whole", keep_steps=True)
    monkeypatch.undo()
    monkeypatch.setattr(checks, "check_logits", lambda folder: checks.Check(True, "not computed here."))

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


@pytest.fixture(scope="module")
def job(source: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    """Trainings of a pruned model, each in a folder of its own."""
    base = tmp_path_factory.mktemp("job")
    run(tiny_recipe(source, texts, 0.5), base / "student")
    tokens_NS = torch.randint(3, 250, (7, 24), generator=torch.Generator().manual_seed(1))

    def make(name: str, processes: int, **settings: Any) -> Job:
        folder = base / name
        folder.mkdir(exist_ok=True)
        save_file({"tokens": tokens_NS}, folder / training.TOKENS_FILE)
        launch = Launch(processes, True, True, "float32", True) if processes > 1 else None
        config = DistillConfig.model_validate(DISTILL | {"batch_size": 6} | settings)
        return Job(config, base / "student", source, folder, "cpu", "x", launch)

    return make


def test_another_number_of_processes_goes_on(job: Callable[..., Job]) -> None:
    """Three write a state, then one, which holds everything, and then two."""
    alone: list[dict[str, Any]] = []
    train(job("alone", 1), alone.append)
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

    in_processes(3, lambda: stopped(job("shared", 3, save_every=1), 0))
    stopped(job("shared", 1, save_every=1), 1)
    in_processes(2, lambda: train(job("shared", 2, save_every=1), lambda line: None))
    lines = read_metrics(job("shared", 1).folder)
    for one, other in zip(alone, lines, strict=True):
        assert {**other, "seconds": 0} == pytest.approx({**one, "seconds": 0}, rel=1e-4)


@pytest.mark.parametrize("processes", [2, 4])
def test_a_process_holds_its_share_of_the_bytes(job: Callable[..., Job], processes: int, tmp_path: Path) -> None:
    """Of parameters, gradients and moments, by the memory behind them, student and teacher, between two updates."""
    skeleton = training.load_model(job("bytes", 1).student, "cpu")
    count = sum(parameter.numel() for parameter in skeleton.parameters())
    original = sum(parameter.numel() for parameter in training.load_model(job("bytes", 1).teacher, "cpu").parameters())

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
        train(job("bytes", processes), lambda line: None)
        (tmp_path / f"{dist.get_rank()}").write_text(str(found[-1]))

    in_processes(processes, measured)
    shutil.rmtree(job("bytes", processes).folder)
    held = [int((tmp_path / f"{rank}").read_text()) for rank in range(processes)]
    everything = 4 * (3 * count + original)
    assert sum(held) == pytest.approx(everything, rel=0.02)
    assert max(held) < 1.05 * everything / processes
