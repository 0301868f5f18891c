"""The training loop of whole-model distillation, on accelerate: one process, or several that share every batch.

The loop is deterministic: an update is a function of the parameters, the optimizer's state and its number, and all
three are saved together. Several processes take turns at the passes of one batch, and their gradients are added up
before each update, so their number changes no loss beyond the rounding of that sum. Each holds the whole models, or,
with an accelerate config for FSDP2, its part of every parameter, of its gradient and of the optimizer's state.

Not covered: processes on several machines; layers or experts as a whole divided among processes (pipeline, expert
parallelism).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from moe_compress.compress.distill import losses, parts
from moe_compress.compress.distill.accelerate_config import Launch
from moe_compress.compress.distill.balance import SkipTarget, skipped_L
from moe_compress.compress.distill.config import DistillConfig
from moe_compress.compress.distill.plan import Schedule
from moe_compress.compress.distill.sampling import Rollout, sample
from moe_compress.compress.distill.sharding import sharded_model, whole
from moe_compress.compress.distill.state import Metrics, load_state, save_state
from moe_compress.compress.distill.teacher import CachedTeacher, Lesson, OnlineTeacher
from moe_compress.errors import TrainingError
from moe_compress.models.layers import MoELayer, find_moe_layers
from moe_compress.models.skeleton import model_class
from moe_compress.runtime.trace import RoutingTrace, replayed

BETAS = (0.9, 0.98)
TOKENS_FILE = "tokens.safetensors"
CACHE = "teacher"
SKIPPED = "skipped"  # among the terms: the share of slots that each layer skipped


@dataclass(frozen=True)
class Job:
    """A training: where the models lie, and the folder with the tokens, the teacher's cache, the state and the metrics.

    `identity` is a hash of everything that decides the losses; `launch` is there where an accelerate config is.
    """

    config: DistillConfig
    student: Path
    teacher: Path
    folder: Path
    device: str
    identity: str
    launch: Launch | None = None

    @property
    def is_sharded(self) -> bool:
        """Whether the processes divide the models' parameters among them."""
        return self.launch is not None and self.launch.sharded

    def to_json(self) -> dict[str, Any]:
        """As JSON-able values."""
        paths = {name: str(getattr(self, name)) for name in ("student", "teacher", "folder")}
        config = self.config.model_dump(mode="json")
        launch = None if self.launch is None else asdict(self.launch)
        return paths | {"config": config, "device": self.device, "identity": self.identity, "launch": launch}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Job:
        """What `to_json` gave."""
        paths = {name: Path(content[name]) for name in ("student", "teacher", "folder")}
        config = DistillConfig.model_validate(content["config"])
        launch = None if content["launch"] is None else Launch(**content["launch"])
        return cls(config, device=content["device"], identity=content["identity"], launch=launch, **paths)


def train(job: Job, on_update: Callable[[dict[str, Any]], None]) -> None:
    """Train the student from where the state in the folder is, to the end; `on_update` sees every line of metrics.

    The last state holds the result. Raises `TrainingError` when a loss or a gradient is not finite.
    """
    accelerator = Accelerator(cpu=job.device == "cpu")
    device = accelerator.device if accelerator.num_processes > 1 else torch.device(job.device)
    tokens_NS = load_file(job.folder / TOKENS_FILE)["tokens"]
    schedule = Schedule(job.config, *tokens_NS.shape)
    student = read_model(job, job.student, device, is_trained=True)
    moe_layers, every = find_moe_layers(student), dict(student.named_parameters())
    by_part = parts.parts(every, moe_layers)
    trained = {name: every[name].requires_grad_() for name in parts.chosen(by_part, job.config.trainable)}
    groups = parts.groups(trained, by_part, parts.users(student), job.config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=job.config.learning_rate, betas=BETAS)
    first = load_state(job.folder, trained, optimizer, job.identity)
    run = _Run(job, schedule, student, moe_layers, trained, optimizer, make_teacher(job, device), accelerator, device)
    metrics = Metrics(job.folder, first) if accelerator.is_main_process else None
    for update in range(first, schedule.num_updates):
        started = time.monotonic()
        line = run.update(update, tokens_NS)
        line["seconds"] = round(time.monotonic() - started, 3)
        if metrics is not None:
            metrics.add(line)
        if (update + 1) % job.config.save_every == 0 and update + 1 < schedule.num_updates:
            run.save(update + 1)
        on_update(line)
    run.save(schedule.num_updates)
    accelerator.wait_for_everyone()


def read_model(job: Job, folder: Path, device: torch.device, *, is_trained: bool) -> Any:
    """A model as this process holds it: whole, or its part of every parameter."""
    if not job.is_sharded:
        return load_model(folder, device)
    assert job.launch is not None
    return sharded_model(
        folder,
        device,
        processes=job.launch.processes,
        is_trained=is_trained,
        reshard=job.launch.reshard_after_forward or not is_trained,
        in_bfloat16=computes_bfloat16(job.config, device),
    )


def load_model(folder: Path, device: torch.device | str) -> Any:
    """The model in float32, in evaluation mode (no dropout, no router noise), nothing of it trainable."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    model = model_class(config).from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.to(device).eval().requires_grad_(False)


def make_teacher(job: Job, device: torch.device) -> Callable[[Sequence[int], Tensor], Lesson]:
    """What the losses compare with; without need of one, an empty lesson."""
    if not job.config.asks_teacher:
        return lambda sequences, tokens_BS: Lesson(None)
    if job.config.caches_logits:
        return CachedTeacher(job.folder / CACHE, device)
    is_packed = job.config.teacher == "nf4"  # its buffers are small, and each process has them all
    model = load_model(job.teacher, device) if is_packed else read_model(job, job.teacher, device, is_trained=False)
    return OnlineTeacher(model, logits=job.config.uses_teacher_logits, hidden=job.config.hidden_weight > 0)


def loss_terms(config: DistillConfig, output: Any, lesson: Lesson, tokens_BS: Tensor) -> dict[str, Tensor]:
    """The parts of the loss, each a mean over tokens, by the names they have in the metrics.

    Where sequences have prompts, the likelihood is that of the responses alone.
    """
    terms: dict[str, Tensor] = {}
    if lesson.logits is not None:
        total = losses.divergence(output.logits.flatten(0, 1), lesson.logits, config.temperature)
        terms["kl"] = total / tokens_BS.numel()
    if config.nll_share:
        first = (config.prompt_length or 1) - 1
        terms["nll"] = losses.next_token_loss(output.logits[:, first:], tokens_BS[:, first:])
    if config.hidden_weight:
        terms["hidden"] = losses.hidden_loss(tuple(output.hidden_states[1:]), lesson.hidden)
    return terms


def weights(config: DistillConfig) -> dict[str, float]:
    """What each term is multiplied with; those of no weight are not computed."""
    balance = {} if config.target_skip is None else {"balance": config.balance_alpha}
    if config.expert_balance_alpha:
        balance["expert_balance"] = config.expert_balance_alpha
    if config.on_policy:
        return {"reverse_kl": 1.0} | balance
    factors = {"kl": 1 - config.nll_share, "nll": config.nll_share, "hidden": config.hidden_weight}
    return {name: factor for name, factor in factors.items() if factor} | balance


def computes_bfloat16(config: DistillConfig, device: torch.device) -> bool:
    """Whether products are computed in bfloat16."""
    if config.precision != "auto":
        return config.precision == "bfloat16"
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


@dataclass(frozen=True)
class _Micro:
    """What one pass learns from: the tokens that go in, their share of the batch, and how they were sampled."""

    sequences: Sequence[int]
    share: float
    tokens_BS: Tensor
    rollout: Rollout | None = None

    @property
    def rows(self) -> Mapping[int, Tensor]:
        """The router rows that the tokens were sent to when they were sampled, by layer."""
        return {} if self.rollout is None else self.rollout.rows


@dataclass
class _Run:
    """One process's view of a training."""

    job: Job
    schedule: Schedule
    student: Any
    moe_layers: Sequence[MoELayer]
    trained: dict[str, Any]
    optimizer: torch.optim.Optimizer
    teacher: Callable[[Sequence[int], Tensor], Lesson]
    accelerator: Accelerator
    device: torch.device

    def __post_init__(self) -> None:
        config = self.job.config
        self.factors = weights(config)
        self.skip = None if config.target_skip is None else SkipTarget(self.moe_layers, config.target_skip)
        self.traced = self.moe_layers if self.skip else ()
        self.autocast = partial(
            torch.autocast, self.device.type, torch.bfloat16, enabled=computes_bfloat16(config, self.device)
        )

    def update(self, update: int, tokens_NS: Tensor) -> dict[str, Any]:
        """One step of the optimizer; returns its line of metrics. Nothing is changed when it raises."""
        config, sequences = self.job.config, self.schedule.sequences(update)
        rate = config.learning_rate * self.schedule.factor(update)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        terms = self._passes(update, sequences, tokens_NS)
        skipped = terms.pop(SKIPPED)
        total_norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in self.trained.values()])
        norm = float(whole(total_norm))
        values: dict[str, Any] = {name: found[0] for name, found in terms.items()}
        loss = sum(factor * values[name] for name, factor in self.factors.items())
        if not math.isfinite(loss) or not math.isfinite(norm):
            self.save(update)
            raise TrainingError(
                f"the loss is {loss} with gradients of norm {norm} at update {update + 1} of "
                f"{self.schedule.num_updates}; lower `learning_rate` and start again (the weights as they were before "
                f"are kept in {self.job.folder})."
            )
        torch.nn.utils.clip_grads_with_norm_(list(self.trained.values()), config.max_gradient_norm, total_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        seen = min((update + 1) * config.batch_size, self.schedule.num_sequences * config.epochs)
        line: dict[str, Any] = {"update": update, "tokens": seen * self.schedule.sequence_length, "loss": loss}
        if self.skip:
            values["skip"] = sum(skipped) / len(skipped)
            values["skip_per_layer"] = skipped
        return line | values | {"gradient_norm": norm, "learning_rate": rate}

    def save(self, update: int) -> None:
        """Keep the state before an update."""
        save_state(self.job.folder, update, self.trained, self.optimizer, self.job.identity)

    def _passes(self, update: int, sequences: Sequence[int], tokens_NS: Tensor) -> dict[str, list[float]]:
        """This process's share of a batch, forward and back; the terms of the whole batch."""
        sums: dict[str, Tensor] = {}
        seed = [self.job.config.seed, update]
        batch = [self._drawn(micro, share, tokens_NS, seed, first) for first, micro, share in self._turns(sequences)]
        shares = self._shares(batch)
        for micro in batch:
            terms = self._terms(micro, shares)
            loss = torch.stack([factor * terms[name].double() for name, factor in self.factors.items()]).sum()
            (micro.share * loss).backward()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + micro.share * term.detach().double().view(-1)
        return self._over_processes(sums)

    def _turns(self, sequences: Sequence[int]) -> Iterator[tuple[int, Sequence[int], float]]:
        """The passes of this process: where their sequences begin in the batch, these, and their share of it.

        Processes that divide the parameters pass through them together; one with nothing left to do then repeats the
        last pass with a share of 0.
        """
        size, world = self.job.config.micro_batch_size, self.accelerator.num_processes
        firsts = list(range(0, len(sequences), size))
        for turn in range(0, len(firsts), world):
            number = turn + self.accelerator.process_index
            if number < len(firsts) or self.job.is_sharded:
                first = firsts[min(number, len(firsts) - 1)]
                micro = sequences[first : first + size]
                yield first, micro, len(micro) / len(sequences) if number < len(firsts) else 0.0

    def _drawn(self, sequences: Sequence[int], share: float, tokens_NS: Tensor, seed: list[int], first: int) -> _Micro:
        """The sequences of one pass, as they are or as the student writes them; `first` is their place in the batch."""
        config, tokens_BS = self.job.config, tokens_NS[list(sequences)].to(self.device)
        if config.prompt_length is None or not config.on_policy:
            return _Micro(sequences, share, tokens_BS)
        prompt_BP, temperature = tokens_BS[:, : config.prompt_length], config.sampling_temperature
        seeds = [[*seed, first + place] for place in range(len(sequences))]
        # A context of its own, for it keeps weights without their gradients. A processor attends to single tokens more
        # slowly in bfloat16, but where weights are gathered as such there is no other way.
        is_exact = self.device.type == "cpu" and not self.job.is_sharded
        with nullcontext() if is_exact else self.autocast():
            rollout = sample(self.student, prompt_BP, tokens_BS.shape[1], temperature, seeds, self.moe_layers)
        return _Micro(sequences, share, rollout.tokens_BS[:, :-1], rollout)

    def _shares(self, batch: Sequence[_Micro]) -> dict[int, Tensor]:
        """By layer, the share of the whole batch's slots that each row of its router takes; nothing if not asked."""
        if self.skip is None or not self.job.config.expert_balance_alpha:
            return {}
        total = partial(self.accelerator.reduce, reduction="sum")
        picked = ((micro.rows or self._routed(micro.tokens_BS), micro.share) for micro in batch)
        counted = ({layer: row if share else row[:0] for layer, row in rows.items()} for rows, share in picked)
        return self.skip.shares(counted, total)

    @torch.no_grad()
    def _routed(self, tokens_BS: Tensor) -> dict[int, Tensor]:
        """The rows that the student's routers pick, by layer."""
        with self.autocast(), RoutingTrace(self.traced) as trace:
            self.student(input_ids=tokens_BS, use_cache=False)
        return {moe.layer: trace.last(moe.layer).row_TK for moe in self.traced}

    def _terms(self, micro: _Micro, shares: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """The terms of the loss on some sequences, and the slots that were skipped."""
        config, rollout = self.job.config, micro.rollout
        with self.autocast(), RoutingTrace(self.traced) as trace, replayed(self.moe_layers, micro.rows):
            lesson = self.teacher(micro.sequences, micro.tokens_BS)
            hidden = config.hidden_weight > 0
            output = self.student(input_ids=micro.tokens_BS, use_cache=False, output_hidden_states=hidden)
            if rollout is None:
                terms = loss_terms(config, output, lesson, micro.tokens_BS)
            else:
                assert isinstance(lesson.logits, Tensor)
                teacher_BR = rollout.score(lesson.logits.view_as(output.logits), config.sampling_temperature)
                own_BR = rollout.score(output.logits, config.sampling_temperature)
                terms = {"reverse_kl": losses.policy_loss(own_BR, rollout.log_BR, teacher_BR)}
        if self.skip:
            terms |= {"balance": self.skip.loss(trace), SKIPPED: skipped_L(trace)}
            if shares:
                terms["expert_balance"] = self.skip.expert_loss(trace, shares)
        return terms

    def _over_processes(self, sums: dict[str, Tensor]) -> dict[str, list[float]]:
        """Add up terms and gradients of all processes; one that had nothing to do gives zeros."""
        sizes = dict.fromkeys(self.factors, 1) | {SKIPPED: len(self.moe_layers) if self.skip else 0}
        found = torch.cat(
            [sums.get(name, torch.zeros(size, dtype=torch.float64, device=self.device)) for name, size in sizes.items()]
        )
        for parameter in self.trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.accelerator.num_processes > 1:
            found = self.accelerator.reduce(found, "sum")
            for parameter in () if self.job.is_sharded else self.trained.values():  # FSDP has added them up
                parameter.grad = self.accelerator.reduce(parameter.grad, "sum")
        return {name: part.tolist() for name, part in zip(sizes, found.split(list(sizes.values())), strict=True)}
