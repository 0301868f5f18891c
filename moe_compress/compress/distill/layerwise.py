"""Distillation layer by layer: one streamed layer of each model in memory, however large the checkpoints are.

The original's layer is loaded, run on all tokens, and given back; then the student's layer is loaded and fitted to what
came out, by AdamW on

    sum |student(x) - original(h)|^2 / sum |original(h) - h|^2

where h enters the original's layer, and x is h or, with `inputs: student`, what the healed layers before this one made
of the tokens: each layer then also makes up for what those before it left. Both models run by the same code in float32,
so a student that equals its teacher has a loss of exactly 0. A layer that training did not make better keeps its
weights. With `target_skip` the group balance loss of the layer is added, and what was trained always stays: that fewer
experts run has its price.

After every layer its tensors and all hidden states are on disk; an interrupted run goes on with the layer at hand.

Not covered: tensors outside the layers; layers that hand on more than their hidden states and that change it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_compress.checkpoint.durable import replace_durably
from moe_compress.checkpoint.hidden import load_hidden, save_hidden
from moe_compress.checkpoint.memory import give_back
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.compress.distill import parts
from moe_compress.compress.distill.apply import Readers, rounded
from moe_compress.compress.distill.balance import SkipTarget, skipped_L
from moe_compress.compress.distill.config import DistillConfig
from moe_compress.compress.distill.plan import Schedule
from moe_compress.compress.distill.state import Metrics
from moe_compress.compress.distill.train import BETAS
from moe_compress.errors import TrainingError
from moe_compress.models.lockstep import Lockstep
from moe_compress.progress import Stage
from moe_compress.runtime.trace import RoutingTrace

Call = tuple[tuple[Any, ...], dict[str, Any]]  # a layer's arguments
EXPERTS_IMPLEMENTATION = "grouped_mm"  # whose backward pass does not visit all experts for each of them


def heal_layers(
    teacher: LayerStream, student: LayerStream, tokens_NS: Tensor, config: DistillConfig, folder: Path, stage: Stage
) -> None:
    """Fit every layer of the student; `layer-*.safetensors` and `metrics.jsonl` in `folder` are the result.

    Raises `TrainingError` when a loss is not finite, and `ResumeError` as `Lockstep` does.
    """
    batches = [tokens.to(teacher.device) for tokens in tokens_NS.split(config.micro_batch_size)]
    own_inputs = config.inputs == "student"
    done, hidden = load_hidden(folder)
    states = [h.to(student.device) for h in hidden[len(hidden) - len(batches) :]] if own_inputs else []
    if own_inputs:
        hidden = hidden[: len(hidden) - len(batches)]
    wanted_names = trained_names(student, config)
    if config.target_skip is not None:
        SkipTarget([*student.moe_layers.values()], config.target_skip)
    metrics = Metrics(folder, done)
    for stream in (teacher, student):
        stream.model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    teacher.load_trunk()
    run = Lockstep(teacher.model, teacher.layers, batches, start=done, hidden=[h.to(teacher.device) for h in hidden])
    teacher.release_embeddings()
    calls: dict[int, Call] = {}
    run.recorder = lambda batch, args, kwargs: calls.__setitem__(batch, (args, kwargs))
    try:
        for _ in range(done):
            stage.advance("done before")
        for index in range(done, len(teacher.layers)):
            started = time.monotonic()
            to_float32(teacher.load(index))
            targets = run.through(index)
            teacher.release(index)
            give_back()
            entering = [entered(calls[batch]) for batch in range(len(batches))]
            states = (states or entering) if own_inputs else entering
            fit = _Fit(student, index, config, wanted_names[index], calls, states, targets, entering, folder)
            line = fit.train()
            states = fit.outputs if own_inputs else []
            student.release(index)
            del fit
            give_back()
            metrics.add({"update": index, **line, "seconds": round(time.monotonic() - started, 3)})
            save_hidden(folder, index + 1, [*run.hidden, *states])  # from here on, the layer is done
            calls.clear()
            stage.advance(f"error {line['before']:.2e} -> {line['loss']:.2e}")
    finally:
        run.close()


def trained_names(student: LayerStream, config: DistillConfig) -> list[list[str]]:
    """What is trained of every layer, by name inside it: only what that layer itself stores.

    Raises `UsageError` when a part that is to be trained is not there.
    """
    by_part = parts.parts(dict(student.model.named_parameters()), student.moe_layers.values())
    names = set(parts.chosen(by_part, config.trainable))
    prefixes = [f"{student.layers_name}.{index}." for index in range(len(student.layers))]
    return [
        [target[len(prefix) :] for target in student.layer_names[index] if target in names]
        for index, prefix in enumerate(prefixes)
    ]


def trained_readers(folder: Path, aliases: Mapping[str, str]) -> Readers:
    """All trained tensors by their names in the model, read from the files of their layers when asked for."""

    def reader(file: Path, name: str) -> Any:
        def read() -> Tensor:
            with safe_open(file, "pt") as stored:
                value: Tensor = stored.get_tensor(name)
            return value

        return read

    found = {name: reader(file, name) for file in sorted(folder.glob("layer-*.safetensors")) for name in _names(file)}
    return found | {name: found[first] for name, first in aliases.items() if first in found}


def entered(call: Call) -> Tensor:
    """The hidden states in a layer's arguments."""
    args, kwargs = call
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def to_float32(layer: nn.Module) -> nn.Module:
    """Upcast a resident layer's weights, nothing of it trainable."""
    for parameter in layer.requires_grad_(False).parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return layer


class _Fit:
    """One layer of the student, resident until its owner releases it, and what it is fitted to, batch by batch."""

    def __init__(
        self,
        student: LayerStream,
        index: int,
        config: DistillConfig,
        names: Sequence[str],
        calls: Mapping[int, Call],
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        entering: Sequence[Tensor],
        folder: Path,
    ) -> None:
        self.student, self.index, self.config, self.folder = student, index, config, folder
        self.calls, self.inputs, self.targets = calls, inputs, targets
        self.prefix, self.names = f"{student.layers_name}.{index}.", names
        self._load()
        pairs = zip(targets, entering, strict=True)
        change = sum(float((leaving - before).square().sum(dtype=torch.float64)) for leaving, before in pairs)
        self.scale = change / sum(leaving.numel() for leaving in targets) or 1.0
        self.outputs: list[Tensor] = []
        self.skip: SkipTarget | None = None
        if config.target_skip is not None and index in student.moe_layers:
            self.skip = SkipTarget([student.moe_layers[index]], config.target_skip)

    def _load(self) -> None:
        """The layer with the weights of its checkpoint, those of a bank as they were trained."""
        self.layer = to_float32(self.student.load(self.index))
        self._use_trained_bank()
        parameters = dict(self.layer.named_parameters())
        self.trained = {name: parameters[name] for name in self.names if name in parameters}

    def train(self) -> dict[str, Any]:
        """Fit, round, and write the layer's tensors; returns the line of metrics."""
        line: dict[str, Any] = {"layer": self.index, "before": self._evaluate(), "updates": 0}
        if self.trained and line["before"]:
            line["updates"] = self._optimise()
            self._round()
        line["loss"] = self._evaluate() if line["updates"] else line["before"]
        if not line["loss"] <= line["before"] and not self.skip:
            self._load()
            line |= {"loss": line["before"], "rejected": line["loss"]}
            self._evaluate()
        self._write()
        return line | ({"skip": self.skipped} if self.skip else {})

    def _optimise(self) -> int:
        for parameter in self.trained.values():
            parameter.requires_grad_()
        per_update = self.config.batch_size // self.config.micro_batch_size
        config = self.config.model_copy(update={"batch_size": per_update})
        schedule = Schedule(config, len(self.inputs), 1)
        by_part = parts.parts(
            {self.prefix + name: value for name, value in self.trained.items()}, self.student.moe_layers.values()
        )
        named = {self.prefix + name: value for name, value in self.trained.items()}
        optimizer = torch.optim.AdamW(parts.groups(named, by_part, {}, config.weight_decay), betas=BETAS)
        for update in range(schedule.num_updates):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * schedule.factor(update)
            batches = schedule.sequences(update)
            shares = self._shares(batches)
            for batch in batches:
                with self._trace() as trace:
                    loss = self._loss(batch, self._forward(batch))
                if self.skip:
                    loss = loss + config.balance_alpha * self.skip.loss(trace)
                    if shares:
                        loss = loss + config.expert_balance_alpha * self.skip.expert_loss(trace, shares)
                (loss / len(batches)).backward()
            norm = torch.nn.utils.clip_grad_norm_(list(self.trained.values()), config.max_gradient_norm)
            if not math.isfinite(norm):
                raise TrainingError(
                    f"the gradient of layer {self.index} has the norm {float(norm)}; lower `learning_rate` and start "
                    f"again (the layers before it are kept in {self.folder})."
                )
            optimizer.step()
            optimizer.zero_grad()
        for parameter in self.trained.values():
            parameter.requires_grad_(False)
        return schedule.num_updates

    def _forward(self, batch: int) -> Tensor:
        args, kwargs = self.calls[batch]
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        output = self.layer(self.inputs[batch], *args[1:], **others)
        found: Tensor = output if isinstance(output, Tensor) else output[0]
        return found

    @torch.no_grad()
    def _shares(self, batches: Sequence[int]) -> dict[int, Tensor]:
        """The share of an update's slots that each row of the router takes; nothing if not asked."""
        if self.skip is None or not self.config.expert_balance_alpha:
            return {}
        picked = []
        for batch in batches:
            with self._trace() as trace:
                self._forward(batch)
            picked.append({self.index: trace.last(self.index).row_TK})
        return self.skip.shares(picked, lambda counts: counts)

    def _trace(self) -> RoutingTrace:
        return RoutingTrace(self.skip.layers if self.skip else ())

    def _loss(self, batch: int, output: Tensor) -> Tensor:
        return (output - self.targets[batch]).square().mean() / self.scale

    @torch.no_grad()
    def _evaluate(self) -> float:
        """The regression's loss over all tokens; the outputs are kept, and the mean share of slots skipped."""
        shares = []
        self.outputs = []
        for batch in range(len(self.inputs)):
            with self._trace() as trace:
                self.outputs.append(self._forward(batch))
            shares += skipped_L(trace).tolist() if self.skip else []
        self.skipped = sum(shares) / max(1, len(shares))
        sizes = [output.numel() for output in self.outputs]
        losses = [float(self._loss(batch, output)) * sizes[batch] for batch, output in enumerate(self.outputs)]
        return sum(losses) / sum(sizes)

    @torch.no_grad()
    def _round(self) -> None:
        for name, value in self.trained.items():
            value.copy_(rounded(value, self.student, self.prefix + name, value))

    def _use_trained_bank(self) -> None:
        """Experts that another layer stores are those that it was given when it was fitted."""
        owners = self.student.owners
        if self.index not in owners:
            return
        moe, owner = self.student.moe_layers[self.index], self.student.moe_layers[owners[self.index]]
        file = _layer_file(self.folder, owner.layer)
        with safe_open(file, "pt") as stored:
            known = set(stored.keys())
            for name in moe.expert_tensors():
                if f"{owner.block_name}.{name}" in known:
                    parameter = self.student.model.get_parameter(f"{moe.block_name}.{name}")
                    parameter.data.copy_(stored.get_tensor(f"{owner.block_name}.{name}"))

    def _write(self) -> None:
        file = _layer_file(self.folder, self.index)
        temporary = file.with_suffix(".part")
        tensors = {self.prefix + name: value.detach().cpu().contiguous() for name, value in self.trained.items()}
        save_file(tensors, temporary)
        replace_durably(temporary, file)


def _layer_file(folder: Path, index: int) -> Path:
    return folder / f"layer-{index:05d}.safetensors"


def _names(file: Path) -> Iterator[str]:
    with safe_open(file, "pt") as stored:
        yield from stored.keys()
