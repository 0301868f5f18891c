"""What a run will take, before any weight is read: memory by stage, and time from a two-second look at the machine.

Memory is that of this process and of those it starts; both begin with the program itself (`PROGRAM_BYTES`). A run's
stages are those of its steps (`Step.demands`), the verification, whose fresh process loads the result, the evaluation
of tasks, which loads whole models, and the measurement of speed, which does so in processes of its own.

Time, where it is asked for: checkpoint bytes at the rate they are copied on this machine's disk, `CONVERSION` times as
long where they pass through the layers and `RELOADING` times where the result is verified (`benchmarks/streaming`);
arithmetic at the rate this machine multiplies float32 matrices of the size of an expert's; `START_SECONDS` for the
program, once more for the process that verifies. Not in it: the evaluation, whose tasks may have any length,
tokenizing, the integer program, and that disks and processors are shared with others.

The constants were measured with a CPU build of torch; `benchmarks/plan_accuracy` sets predictions against runs. With
CUDA the device's memory follows from the same formulas, and that has not been set against runs.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_compress.compress.demand import FLOAT, Demand, ModelSize
from moe_compress.compress.operation import Outlook
from moe_compress.eval.memory import free_bytes
from moe_compress.eval.precision import compute_dtype
from moe_compress.recipe import Recipe
from moe_compress.steps import make_step
from moe_compress.text import format_bytes
from moe_compress.verification.checks import WHOLE_MODEL_BYTES

PROGRAM_BYTES = 550 << 20  # of Python with torch, transformers and this package, what the heap keeps included
TASKS_BYTES = 60 << 20  # of lm-eval
RELOAD_BYTES = 450 << 20  # of Python with torch and transformers alone
CUDA_BYTES = 800 << 20  # of a CUDA context
LOGITS_BYTES = 1 << 30  # of the logits of a batch of evaluation (`eval.harness`)
CONVERSION, RELOADING = 2.8, 2.0
START_SECONDS = 10.0
SPARE_DISK = 1.05  # of the weights, for what lies beside them
PROBE_SECONDS = 1.0  # for each measurement
PROBE_BYTES = 64 << 20


@dataclass(frozen=True)
class Stage:
    """Memory in bytes and time's causes of one stage: of this process, of those it starts, and on the device."""

    name: str
    process: int
    others: int = 0
    device: int = 0
    copied: float = 0.0  # bytes, at the rate of copying
    flops: float = 0.0
    starts: int = 0  # programs
    scratch: int = 0  # bytes on disk besides checkpoints
    whole_models: bool = False  # it is left out, and the report says so, where there is no memory for it


@dataclass(frozen=True)
class Machine:
    """What the machine was seen to do: bytes per second copied on a disk, and float32 operations per second."""

    copy_rate: float
    flop_rate: float


def stages(recipe: Recipe, outlooks: Sequence[Outlook], device: str) -> list[Stage]:
    """The stages of a run, in order; `outlooks` are of the source and of what each step leads to."""
    found = []
    before, after = outlooks[0], outlooks[-1]
    for number, settings in enumerate(recipe.steps):
        title = f"step {number + 1}/{len(recipe.steps)} {settings.op}"
        demands = make_step(settings).demands(outlooks[number], outlooks[number + 1], recipe.calibration)
        found += [_stage(title, demand, device) for demand in demands]
    if not recipe.steps:
        largest = max(before.size.loading(layer) for layer in before.size.layers)
        found.append(_stage("identity", Demand("apply", 0, largest, moved=2 * before.stored_bytes), device))
    found.append(_verification(after, recipe.export.tier))
    if recipe.eval.tasks:
        models = [after] + ([before] if recipe.eval.baseline else [])
        found.append(_evaluation(models, device))
    if recipe.eval.speed:
        found.append(_speed([after] + ([before] if recipe.eval.baseline else []), device))
    return found


def peaks(found: Sequence[Stage]) -> dict[str, Any]:
    """The largest memory of all stages: of the process, with those it starts, on the device, and when it is reached.

    `evaluation` is that of stages which load whole models; they are left out where there is not so much.
    """
    needed = [stage for stage in found if not stage.whole_models]
    alone = max(needed, key=lambda stage: stage.process)
    together = max(needed, key=lambda stage: stage.process + stage.others)
    on_device = max(needed, key=lambda stage: stage.device)
    return {
        "process": alone.process,
        "process_stage": alone.name,
        "host": together.process + together.others,
        "host_stage": together.name,
        "device": on_device.device,
        "evaluation": max((stage.process + stage.others for stage in found if stage.whole_models), default=0),
        "stages": [
            {"stage": stage.name, "process": stage.process, "others": stage.others, "device": stage.device}
            for stage in found
        ],
    }


def memory_warnings(memory: Mapping[str, Any], device: str) -> list[str]:
    """Where less memory is free on this machine than `peaks` found, a sentence each."""
    needed = {"memory": (memory["host"], free_bytes("cpu"))}
    if device.startswith("cuda"):
        needed["the device's memory"] = memory["device"], free_bytes(device)
    return [
        f"the run takes about {format_bytes(takes)} of {what}, and {format_bytes(free)} are free on this machine now."
        for what, (takes, free) in needed.items()
        if takes > free
    ]


def disk_needed(
    recipe: Recipe,
    outlooks: Sequence[Outlook],
    found: Sequence[Stage],
    *,
    source_bytes: int | None = None,
    keep_steps: bool = False,
) -> int:
    """Bytes on disk at the worst moment; `source_bytes` are those of the source where they are known.

    A step needs the checkpoint before it (all of them with `keep_steps`), unless that is the source, and its own; a
    random baseline has one for each step, beside the result. What stages keep besides lies there too.
    """
    scale = 1.0 if source_bytes is None else source_bytes / outlooks[0].stored_bytes
    written = [scale * outlook.stored_bytes for outlook in outlooks[1:] or outlooks]
    kept = sum(written) if keep_steps else written[-1]
    at_once = kept if keep_steps else max(map(sum, zip([0.0, *written], written, strict=False)))
    if recipe.eval.random_baselines:
        at_once = max(at_once, kept + sum(written))
    return round(at_once * SPARE_DISK) + max(stage.scratch for stage in found)


def seconds(found: Sequence[Stage], machine: Machine) -> dict[str, Any]:
    """How long the stages take on this machine, evaluation left out."""
    each = {
        stage.name: stage.copied / machine.copy_rate + stage.flops / machine.flop_rate + stage.starts * START_SECONDS
        for stage in found
        if stage.copied
    }
    each = {"start": START_SECONDS} | each
    return {
        "seconds": sum(each.values()),
        "stages": each,
        "copy_bytes_per_s": machine.copy_rate,
        "flops_per_s": machine.flop_rate,
    }


def look_at_machine(folder: Path, size: ModelSize, batch_tokens: int, device: str) -> Machine:
    """Copy files on the disk that `folder` lies on, and multiply matrices of an expert's size; a second each."""
    return Machine(_copy_rate(folder), _flop_rate(size, batch_tokens, device))


def _stage(title: str, demand: Demand, device: str) -> Stage:
    """A stage of a step; on a CPU everything lies in the memory of the process."""
    on_device = device.startswith("cuda")
    on_each = demand.computed if demand.on_each is None else demand.on_each
    own = PROGRAM_BYTES + demand.host + (CUDA_BYTES if on_device else demand.computed)
    return Stage(
        f"{title}: {demand.stage}",
        own,
        device=on_each if on_device else 0,
        copied=demand.moved / 2 * CONVERSION,
        flops=demand.flops,
        scratch=demand.scratch,
    )


def _verification(after: Outlook, tier: str) -> Stage:
    """Hashing, while a fresh process loads the result: whole in float32, or a layer at a time where that is large.

    transformers reads all tensors, and casts them, before it puts together those of single experts: beside the whole
    model lies what its tensors took before. Packed weights are unpacked to the stored type, and experts are upcast a
    layer at a time; in the tier `plugin` they stay packed.
    """
    size = after.size
    elements = sum(sum(layer.experts) + layer.others for layer in size.layers) + size.embedding + size.head
    whole = elements * FLOAT
    held = read = min(whole, after.stored_bytes * FLOAT // size.stored)
    if (whole if tier == "stock" else held) <= WHOLE_MODEL_BYTES:
        if tier == "stock" and held < whole:  # packed
            held = elements * size.stored + FLOAT * max(sum(layer.experts) for layer in size.layers)
            read = after.stored_bytes
        loaded = held + read + after.stored_bytes
    else:
        loaded = max(2 * FLOAT * max(layer.experts, default=0) + FLOAT * layer.others for layer in size.layers)
        loaded += size.tables_loading()
    return Stage("verify", PROGRAM_BYTES, RELOAD_BYTES + loaded, copied=after.stored_bytes * RELOADING, starts=1)


def _evaluation(models: Sequence[Outlook], device: str) -> Stage:
    """Tasks of one model after the other, each loaded whole."""
    largest = max(_loaded(model, device) for model in models)
    on_device = device.startswith("cuda")
    own = PROGRAM_BYTES + TASKS_BYTES + (CUDA_BYTES + largest // 4 if on_device else largest + LOGITS_BYTES // 4)
    return Stage("evaluation", own, device=largest + LOGITS_BYTES if on_device else 0, whole_models=True)


def _speed(models: Sequence[Outlook], device: str) -> Stage:
    """A process for every model."""
    loaded = [_loaded(model, device) for model in models]
    if device.startswith("cuda"):
        others = len(loaded) * (RELOAD_BYTES + CUDA_BYTES)
        return Stage("speed", PROGRAM_BYTES, others, device=sum(loaded), whole_models=True)
    return Stage("speed", PROGRAM_BYTES, sum(RELOAD_BYTES + each for each in loaded), whole_models=True)


def _loaded(model: Outlook, device: str) -> int:
    """Bytes of a whole model in the type it is computed in, while its weights are read from their files."""
    size = model.size
    elements = sum(sum(layer.experts) + layer.others for layer in size.layers) + size.embedding + size.head
    width = compute_dtype(model.config, device).itemsize
    return elements * width + (model.stored_bytes if width != size.stored else 0)


def _copy_rate(folder: Path) -> float:
    """Bytes per second that are read and written again, on disk at the end."""
    present = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    data = os.urandom(PROBE_BYTES)
    copied, spent = 0, 0.0
    with tempfile.NamedTemporaryFile(dir=present, prefix=".moe-compress-") as file:
        while spent < PROBE_SECONDS:
            started = time.perf_counter()
            file.seek(0)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            data = file.read()
            spent += time.perf_counter() - started
            copied += len(data)
    return copied / spent


def _flop_rate(size: ModelSize, batch_tokens: int, device: str) -> float:
    """float32 operations per second in products of an expert's tokens with its down projection."""
    layer = max(size.layers, key=lambda one: one.num_experts)
    tokens = max(1, batch_tokens * layer.top_k // max(1, layer.num_experts))
    inputs, weights = (
        torch.randn(tokens, layer.inner, device=device),
        torch.randn(layer.width, layer.inner, device=device),
    )
    done, spent = 0.0, 0.0
    torch.nn.functional.linear(inputs, weights)
    while spent < PROBE_SECONDS:
        started = time.perf_counter()
        for _ in range(8):
            torch.nn.functional.linear(inputs, weights)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        spent += time.perf_counter() - started
        done += 8 * 2.0 * tokens * layer.inner * layer.width
    return done / spent
