"""`op: distill` as a step: say what it needs, train, apply."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_compress.calibrate.config import CalibrationConfig
from moe_compress.calibrate.data import Calibration
from moe_compress.calibrate.documents import require_local
from moe_compress.checkpoint.record import Record, Target
from moe_compress.checkpoint.rewrite import LEDGER_FILE, open_rewritten, rewrite
from moe_compress.checkpoint.source import (
    Checkpoint,
    load_tokenizer,
    open_checkpoint,
    open_config,
    refuse_path,
    small_files,
)
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.checkpoint.writer import write_json
from moe_compress.compress import scoring
from moe_compress.compress.demand import FLOAT, Demand, apply_demand, hidden_bytes, num_tokens
from moe_compress.compress.distill import parts
from moe_compress.compress.distill.accelerate_config import Launch, read_launch
from moe_compress.compress.distill.apply import DistillChange, Readers
from moe_compress.compress.distill.balance import SkipTarget
from moe_compress.compress.distill.config import DistillConfig
from moe_compress.compress.distill.layerwise import heal_layers, trained_names, trained_readers
from moe_compress.compress.distill.plan import (
    NF4_SHARE,
    Schedule,
    full_memory,
    layerwise_memory,
    plan_json,
    state_bytes,
    thinned,
)
from moe_compress.compress.distill.sampling import PORTION, sample_responses
from moe_compress.compress.distill.sharding import gathered
from moe_compress.compress.distill.state import parameter_readers, read_metrics, state_update
from moe_compress.compress.distill.teacher import cache_bytes, write_cache
from moe_compress.compress.distill.train import CACHE, TOKENS_FILE, Job, load_model, train
from moe_compress.compress.distill.worker import train_in_processes
from moe_compress.compress.metered import write_metered
from moe_compress.compress.operation import Outlook, Step
from moe_compress.compress.quantize.config import PartConfig, QuantizeConfig
from moe_compress.compress.quantize.step import QuantizeStep
from moe_compress.compress.surroundings import Surroundings
from moe_compress.errors import CheckpointError, UsageError
from moe_compress.manifest import describe_source
from moe_compress.models.layers import decoder_layers, find_moe_layers
from moe_compress.models.routing import EXPERTS_PER_TOKEN, layer_routings
from moe_compress.models.skeleton import build_skeleton
from moe_compress.progress import Stage
from moe_compress.runtime.families import parsed_config, with_layers
from moe_compress.workspace import require_space

METERED_SEQUENCES = 64
SKIP_TOLERANCE = 0.05  # of the share of slots that are skipped
Watch = Callable[[dict[str, Any]], None]
PACKED_TEACHER = "packed-teacher"
NF4 = QuantizeConfig(
    op="quantize", method="nf4", attention=PartConfig(), shared_experts=PartConfig(), dense_mlp=PartConfig()
)


class DistillStep(Step[DistillConfig]):
    """Trains what the earlier steps left, with the recipe's own model as the teacher."""

    @property
    def is_calibrated(self) -> bool:
        return self.config.data is None

    @property
    def uses_scores(self) -> bool:
        return False

    def preview(self, before: Outlook, tier: str) -> tuple[dict[str, Any], Outlook]:
        entry: dict[str, Any] = self.config.model_dump(mode="json", exclude_unset=True)
        how = "layer by layer" if self.config.mode == "layerwise" else f"{self.config.teacher} teacher"
        learnt = (
            "its own responses, scored by the original" if self.config.on_policy else f"the original's outputs ({how})"
        )
        summary = [f"Trained on {learnt}: {', '.join(self.config.trainable)}."]
        target = self.config.target_skip
        if target is None:
            return entry | {"summary": summary}, before
        layers = find_moe_layers(build_skeleton(before.config))
        SkipTarget(layers, target)
        entries = {moe.layer: {EXPERTS_PER_TOKEN: moe.top_k * (1 - target)} for moe in layers}
        after = parsed_config(with_layers(before.config.to_dict(), layers[0].num_experts, entries))
        summary.append(f"{target:.0%} of the expert slots are to be skipped.")
        return entry | {"summary": summary}, before.resized(after)

    def check_paths(self) -> None:
        self._settled()
        if self.config.teacher_model is not None:
            refuse_path(self.config.teacher_model)
        if self.config.data is not None:
            for part in self.config.data.parts:
                require_local(part)

    def check_inputs(self, folder: Path, config: Any) -> None:
        if self.config.teacher_model is not None:
            require_same_language(self.config, folder, config)
        if self.config.data is not None:
            scoring.read_calibration(folder, config, self.config.data)

    def run(self, source: Checkpoint, folder: Path, around: Surroundings, title: str) -> Record:
        folder.mkdir(parents=True, exist_ok=True)
        teacher = self._teacher(around)
        data = self._data(source, around)
        schedule = Schedule(self.config, *data.tokens.shape)
        work = folder / "training"
        work.mkdir(exist_ok=True)
        layerwise = self.config.mode == "layerwise"
        train_all = self._train_layers if layerwise else self._train_whole
        self._apply(source, train_all(source, teacher, data, work, around, title), folder, data, around, title)
        lines = read_metrics(work)
        write_json(folder / "plan.json", plan_json(self.config, schedule, outcome(lines), summary(self.config, lines)))
        return Record(
            op="distill",
            config=self.config.model_dump(mode="json"),
            label=f"{self._manner}, {' + '.join(self.config.trainable)}",
            dropped_bytes=0,
            targets=self._targets(folder / "checkpoint"),
            coverage={"calibration_tokens": data.tokens.numel()},
            calibration=scoring.describe_data(source, data),
        )

    def _teacher(self, around: Surroundings) -> Checkpoint:
        if self.config.teacher_model is not None:
            return open_checkpoint(self.config.teacher_model)
        assert around.original is not None
        return around.original

    def _settled(self) -> tuple[DistillConfig, Launch | None]:
        """The settings, with what an accelerate config decides of them."""
        if self.config.accelerate_config is None:
            return self.config, None
        launch = read_launch(self.config.accelerate_config)
        return launch.settle(self.config), launch

    def demands(self, before: Outlook, after: Outlook, calibration: CalibrationConfig) -> list[Demand]:
        """The original is taken for as large as what is trained."""
        data = self.config.data or calibration
        skeleton = build_skeleton(before.config)
        parameters = dict(skeleton.named_parameters())
        chosen = parts.chosen(parts.parts(parameters, find_moe_layers(skeleton)), self.config.trainable)
        count = sum(parameter.numel() for parameter in parameters.values())
        trained = sum(parameters[name].numel() for name in chosen)
        vocabulary = before.config.get_text_config().vocab_size
        if self.config.mode == "layerwise":
            layers = [sum(layer.experts) + layer.others for layer in before.size.layers]
            needed = layerwise_memory(
                layer=max(layers),
                trained=round(trained / sum(layers) * max(layers)),
                teacher_layer=max(layers),
                outside=count - sum(layers),
                tokens=num_tokens(data),
                width=before.size.hidden_size,
            )
            memory = {"host": 0, "computed": needed}
            streams = 2 if self.config.inputs == "student" else 1  # the last layer's hidden states beside the next's
            scratch = FLOAT * trained + 2 * streams * hidden_bytes(before.size, num_tokens(data))
        else:
            config, launch = self._settled()
            needs = partial(
                full_memory,
                config,
                student=count,
                trained=trained,
                teacher=teacher_floats(config, skeleton),
                original=count,
                vocabulary=vocabulary,
                sequence_length=data.sequence_length,
                gathered=gathered(skeleton, chosen, skeleton) if launch is not None and launch.sharded else None,
            )
            if launch is not None and launch.use_cpu:
                memory = {"host": needs(), "computed": 0}
            else:
                memory = {"host": 0, "computed": needs(), "on_each": needs(devices=config.processes)}
            scratch = state_bytes(trained)
            if self.config.caches_logits:
                scratch += cache_bytes(self.config, num_tokens(data), vocabulary)
        # forward, and twice that backward; the original forward once, or on new responses that are sampled before
        passes = 5 * self.config.epochs if self.config.on_policy else 3 * self.config.epochs + 1
        flops = before.size.flops_per_token * num_tokens(data) * passes
        training = Demand("train", **memory, scratch=scratch, moved=2 * before.stored_bytes, flops=flops)
        return [training, apply_demand(before.size, after.size, 0, 0)]

    def _data(self, source: Checkpoint, around: Surroundings) -> Calibration:
        if self.config.data is None:
            return scoring.calibration_data(source, around)
        return scoring.read_calibration(source.folder, source.config, self.config.data)

    def _train_whole(
        self, source: Checkpoint, teacher: Checkpoint, data: Calibration, work: Path, around: Surroundings, title: str
    ) -> Readers:
        """Train end to end; the trained tensors."""
        skeleton = build_skeleton(source.config)
        schedule = Schedule(self.config, *data.tokens.shape)
        first = state_update(work)
        if first < schedule.num_updates:
            config, launch = self._settled()
            device = "cpu" if launch is not None and launch.use_cpu else around.device
            self._require_memory(skeleton, teacher, schedule, device)
            identity = fingerprint(config, source, teacher, data)
            tokens_NS = self._learnt(teacher, data.tokens, work, around, title)
            if self.config.caches_logits:
                vocabulary = source.config.get_text_config().vocab_size
                if not (work / CACHE).exists():
                    require_space(work, cache_bytes(self.config, tokens_NS.numel(), vocabulary))
                write_cache(
                    teacher, tokens_NS, work / CACHE, self.config, identity, around.device, around.progress, title
                )
            save_file({"tokens": tokens_NS.contiguous()}, work / TOKENS_FILE)
            taught_by = teacher.folder
            if self.config.teacher == "nf4" and self.config.asks_teacher:
                QuantizeStep(NF4).run(teacher, work / PACKED_TEACHER, replace(around, tier="plugin"), title)
                taught_by = open_rewritten(work / PACKED_TEACHER / "checkpoint", teacher).folder
            job = Job(config, source.folder, taught_by, work, device, identity, launch)
            with around.progress.stage(f"{title}: train", schedule.num_updates, "update") as stage:
                for _ in range(first):
                    stage.advance("done before")
                watch = watcher(stage, schedule)
                if config.processes > 1:
                    train_in_processes(job, first, watch)
                else:
                    train(job, watch)
        read = parameter_readers(work)
        return {name: read[first] for name, first in parts.aliases(skeleton).items() if first in read}

    def _learnt(self, teacher: Checkpoint, tokens_NS: Tensor, work: Path, around: Surroundings, title: str) -> Tensor:
        """What is learnt from: the texts, or their beginnings with what the original made of them."""
        prompt, (count, length) = self.config.prompt_length, tokens_NS.shape
        if prompt is None:
            return tokens_NS
        if prompt >= length:
            raise UsageError(
                f"`prompt_length` is {prompt}, but sequences have {length} tokens, prompt and response together; "
                "shorten the prompts or raise `sequence_length`."
            )
        if self.config.on_policy:
            return tokens_NS
        load = partial(load_model, teacher.folder, around.device)
        with around.progress.stage(f"{title}: responses", math.ceil(count / PORTION), "portion") as stage:
            return sample_responses(load, tokens_NS[:, :prompt], self.config, length, work / "responses", stage)

    def _train_layers(
        self, source: Checkpoint, teacher: Checkpoint, data: Calibration, work: Path, around: Surroundings, title: str
    ) -> Readers:
        """Train layer by layer; the trained tensors."""
        student, original = LayerStream(source, around.device), LayerStream(teacher, around.device)
        self._require_layer_memory(student, original, data.tokens.numel())
        with around.progress.stage(f"{title}: layers", len(student.layers)) as stage:
            heal_layers(original, student, data.tokens, self.config, work, stage)
        return trained_readers(work, parts.aliases(build_skeleton(source.config)))

    def _apply(
        self, source: Checkpoint, trained: Readers, folder: Path, data: Calibration, around: Surroundings, title: str
    ) -> None:
        """Write the checkpoint, unless it is there; where tokens differ in how many experts they use, count again."""
        change = DistillChange(LayerStream(source, around.device), trained)
        if any(found.experts_per_token or found.is_uncertain for found in layer_routings(source.config).values()):
            write_metered(source, folder, change, data.tokens[:METERED_SEQUENCES], around, title)
            return
        if (folder / "checkpoint" / LEDGER_FILE).exists():
            return
        with around.progress.stage(f"{title}: apply", len(change.stream.layers)) as stage:
            rewrite(
                source,
                folder / "checkpoint",
                change,
                max_shard_bytes=around.max_shard_bytes,
                device=around.device,
                stage=stage,
            )

    @property
    def _manner(self) -> str:
        return "on-policy" if self.config.on_policy else self.config.mode

    def _targets(self, checkpoint: Path) -> list[Target]:
        """The skip ratio that was asked for, and the one counted on the finished checkpoint."""
        asked = self.config.target_skip
        if asked is None:
            return []
        layers = find_moe_layers(build_skeleton(open_config(str(checkpoint))[0]))
        skipped = 1 - sum(moe.experts_per_token for moe in layers) / sum(moe.top_k for moe in layers)
        return [Target("slots skipped", asked, skipped, SKIP_TOLERANCE, shown=".1%")]

    def _require_memory(self, skeleton: Any, teacher: Checkpoint, schedule: Schedule, device: str) -> None:
        parameters, original = dict(skeleton.named_parameters()), build_skeleton(teacher.config)
        chosen = parts.chosen(parts.parts(parameters, find_moe_layers(skeleton)), self.config.trainable)
        config, launch = self._settled()
        needed = full_memory(
            config,
            student=sum(parameter.numel() for parameter in parameters.values()),
            trained=sum(parameters[name].numel() for name in chosen),
            teacher=teacher_floats(config, original),
            original=sum(parameter.numel() for parameter in original.parameters()),
            vocabulary=skeleton.config.get_text_config().vocab_size,
            sequence_length=schedule.sequence_length,
            gathered=gathered(skeleton, chosen, original) if launch is not None and launch.sharded else None,
            devices=config.processes if device.startswith("cuda") else 1,  # each process has a GPU of its own
        )
        require_memory(needed, device, "train fewer parts, take `teacher: cached`, or use `mode: layerwise`")

    def _require_layer_memory(self, student: LayerStream, original: LayerStream, num_tokens: int) -> None:
        def sizes(stream: LayerStream) -> list[int]:
            return [sum(parameter.numel() for parameter in layer.parameters()) for layer in stream.layers]

        names = trained_names(student, self.config)
        trained = [
            sum(dict(layer.named_parameters())[name].numel() for name in names[index])
            for index, layer in enumerate(student.layers)
        ]
        outside = sum(parameter.numel() for parameter in original.model.parameters()) - sum(sizes(original))
        needed = layerwise_memory(
            layer=max(sizes(student)),
            trained=max(trained),
            teacher_layer=max(sizes(original)),
            outside=outside,
            tokens=num_tokens,
            width=student.model.config.get_text_config().hidden_size,
        )
        require_memory(needed, str(student.device), "train fewer parts, or on fewer tokens")


def require_same_language(config: DistillConfig, folder: Path, model_config: Any) -> None:
    """Raise `UsageError` when the teacher that is named does not have the tokens, or the layers, of the student."""
    assert config.teacher_model is not None
    other, _ = open_config(config.teacher_model)
    theirs = load_tokenizer(small_files(config.teacher_model)[0]).get_vocab()
    own = load_tokenizer(folder).get_vocab()
    text, other_text = model_config.get_text_config(), other.get_text_config()
    if theirs != own or text.vocab_size != other_text.vocab_size:
        raise UsageError(
            f"the teacher {config.teacher_model} has another tokenizer than the model; its logits are of other tokens, "
            "so name a model of the same family."
        )
    shapes = [(found.num_hidden_layers, found.hidden_size) for found in (text, other_text)]
    if (config.mode == "layerwise" or config.hidden_weight) and shapes[0] != shapes[1]:
        raise UsageError(
            f"the teacher {config.teacher_model} has {shapes[1][0]} layers of width {shapes[1][1]}, the model "
            f"{shapes[0][0]} of width {shapes[0][1]}, so hidden states cannot be compared; use `mode: full` without "
            "`hidden_weight`."
        )


def teacher_floats(config: DistillConfig, skeleton: Any) -> float:
    """How many float32 take the memory of the original in memory; `skeleton` is a model of its sizes."""
    whole: int = sum(parameter.numel() for parameter in skeleton.parameters())
    if config.teacher != "nf4":
        return whole
    inside = [parameter for layer in decoder_layers(skeleton)[1] for parameter in layer.parameters()]
    packed: int = sum(parameter.numel() for parameter in inside if parameter.ndim > 1)
    return whole - packed * (1 - NF4_SHARE)


def require_memory(needed: int, device: str, advice: str) -> None:
    """Raise `CheckpointError` when `needed` bytes are more than the device has free."""
    free = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else psutil.virtual_memory().available
    if needed > free:
        raise CheckpointError(
            f"distillation needs about {needed / 1e9:.1f} GB of memory besides activations, but {free / 1e9:.1f} GB "
            f"are free; {advice}."
        )


def fingerprint(config: DistillConfig, source: Checkpoint, teacher: Checkpoint, data: Calibration) -> str:
    """A hash of everything that decides the losses."""
    decided = {
        "config": config.model_dump(mode="json", exclude={"save_every", "processes", "accelerate_config"}),
        "student": describe_source(source),
        "teacher": describe_source(teacher),
        "tokens": data.fingerprint,
    }
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()


def watcher(stage: Stage, schedule: Schedule) -> Watch:
    """Shows a line of metrics as progress."""

    def watch(line: dict[str, Any]) -> None:
        tokens = len(schedule.sequences(line["update"])) * schedule.sequence_length
        stage.advance(f"loss {line['loss']:.4f}, {tokens / max(line['seconds'], 1e-3):,.0f} tokens/s")

    return watch


def outcome(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What `plan.json` says of a finished training."""
    return {"seconds": round(sum(line["seconds"] for line in lines), 1), "curve": thinned(lines)}


def summary(config: DistillConfig, lines: list[dict[str, Any]]) -> list[str]:
    """What was learnt, in sentences."""
    seconds = sum(line["seconds"] for line in lines)
    if config.mode == "layerwise":
        before, after = (sum(line[key] for line in lines) / len(lines) for key in ("before", "loss"))
        return [
            f"{len(lines)} layers were fitted to the original's in {seconds / 60:.1f} minutes.",
            f"Mean relative squared error of a layer's output: {before:.4g} before, {after:.4g} after.",
            *skip_sentence([line["skip"] for line in lines if "skip" in line], "after it"),
        ]
    tenth = max(1, len(lines) // 10)
    first, last = (sum(line["loss"] for line in part) / tenth for part in (lines[:tenth], lines[-tenth:]))
    return [
        f"{len(lines)} updates on {lines[-1]['tokens']:,} tokens in {seconds / 60:.1f} minutes.",
        f"Loss: {first:.4f} over the first tenth of the updates, {last:.4f} over the last.",
        *skip_sentence([line["skip"] for line in lines[-tenth:] if "skip" in line], "over the last tenth"),
    ]


def skip_sentence(shares: Sequence[float], when: str) -> list[str]:
    """How many slots were skipped, where that was a target."""
    return [f"{sum(shares) / len(shares):.1%} of the expert slots were skipped {when}."] if shares else []
