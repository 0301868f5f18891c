"""What the loss becomes when single experts are taken out for real: one forward pass for each, from their layer on.

All passes of the same tokens share the layers before the expert's own. Passes go through the layers together, as many
as memory holds (`HIDDEN_BYTES`), so a layer is read once for a group of experts and the model may be far larger than
memory. The losses of every finished group are kept, and an interrupted measurement goes on with the next.

Not covered: losses of several experts at once, which are not the sum of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_compress.calibrate.scores import ABLATION, Scores
from moe_compress.checkpoint.durable import replace_durably
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.checkpoint.writer import write_json
from moe_compress.errors import ResumeError, UsageError
from moe_compress.models.layers import require_no_banks
from moe_compress.models.lockstep import Lockstep
from moe_compress.models.reduced import Removal
from moe_compress.progress import Stage

LOSSES_FILE = "losses.json"
HIDDEN_BYTES = 1 << 30  # of hidden states that pass the layers together
COPIES = 2  # of the hidden states of a pass: what left the last layer, and the embeddings its forward pass holds on to
Array = NDArray[np.float64]
Pair = tuple[int, int]  # layer, expert


@dataclass(frozen=True)
class Losses:
    """Mean negative log-likelihood of the next token, in nats, of each of N sequences: the whole model's, and without.

    Of the experts in `replaced_in` layers others took the place, as after pruning; in the others they were silenced.
    """

    whole_N: Array
    without: Mapping[Pair, Array]
    replaced_in: tuple[int, ...]

    def changes(self, pair: Pair) -> Array:
        """What taking an expert out adds to the loss of each sequence [N]."""
        changed: Array = self.without[pair] - self.whole_N
        return changed


class Ablation:
    """The losses on `tokens` [N, S] of the whole model, and without each of some experts of some layers, one by one.

    `folder` keeps what is measured, and `fingerprint` says of what: another one is refused (`ResumeError`). Other
    experts can be asked for later; what is known of them is not measured again. Raises `UsageError` when a layer has no
    expert to spare.
    """

    def __init__(
        self,
        stream: LayerStream,
        tokens: Tensor,
        experts: Mapping[int, Sequence[int]],
        *,
        batch_size: int,
        folder: Path,
        fingerprint: Mapping[str, Any],
    ) -> None:
        require_no_banks(stream.checkpoint.config, "ablation")
        _require_spare(stream, experts)
        folder.mkdir(parents=True, exist_ok=True)
        self.stream = stream
        self.pairs = [(layer, expert) for layer in sorted(experts) for expert in experts[layer]]
        self._removal = Removal(stream.checkpoint.config, stream.device)
        self._batches = tokens.to(stream.device).split(batch_size)
        self._kept = _Kept(folder, {**fingerprint, "batch_size": batch_size})
        missing = [pair for pair in self.pairs if _name(pair) not in self._kept.losses]
        size = _group_size(tokens, stream)
        self._groups = [missing[start : start + size] for start in range(0, len(missing), size)]
        self._starts = {group[0][0] for group in self._groups}
        self._first_pass = "whole" not in self._kept.losses or not self._kept.holds_entering(self._starts)

    @property
    def num_layer_passes(self) -> int:
        """How often `run` advances its stage."""
        count = len(self.stream.layers)
        return count * self._first_pass + sum(count - group[0][0] for group in self._groups)

    def run(self, stage: Stage) -> Losses:
        """Measure what is not known yet; `stage` advances once per layer of the first pass and of every group."""
        kept = self._kept
        if self._first_pass:
            self.stream.load_trunk()
            whole, _ = self._pass(0, [], [], stage)
            kept.add({"whole": whole})
        for group in self._groups:
            start = group[0][0]
            self.stream.load_trunk()
            hidden = [tensor.to(self.stream.device) for tensor in kept.entering(start)]
            _, without = self._pass(start, hidden, group, stage)
            kept.add({_name(pair): losses for pair, losses in without.items()})
        kept.forget_entering()
        layers = dict.fromkeys(layer for layer, _ in self.pairs)
        replaced = tuple(layer for layer in layers if self._removal.replaces(self.stream.moe_layers[layer]))
        found = {pair: np.array(kept.losses[_name(pair)]) for pair in self.pairs}
        return Losses(np.array(kept.losses["whole"]), found, replaced)

    def _pass(
        self, start: int, hidden: Sequence[Tensor], group: Sequence[Pair], stage: Stage
    ) -> tuple[Array, dict[Pair, Array]]:
        """The losses of the whole model and without each expert of the group, from layer `start` to the head."""
        stream, batches = self.stream, self._batches
        run = Lockstep(stream.model, stream.layers, batches, start=start, hidden=hidden)
        numbers: dict[Pair, list[int]] = {}
        try:
            for index in range(start, len(stream.layers)):
                if not group and index in self._starts:
                    self._kept.enter(index, run.hidden)
                own = [pair for pair in group if pair[0] == index]
                for pair in own:
                    numbers[pair] = [run.fork(batch) for batch in range(len(batches))]
                stream.load(index)
                removed = {number: pair[1] for pair in own for number in numbers[pair]}
                with self._without(index, removed, run):
                    run.through(index)
                stream.release(index)
                stage.advance(f"{len(numbers)} experts taken out")
            if any(parameter.is_meta for parameter in stream.model.get_output_embeddings().parameters()):
                stream.load_head()
            found = [_losses(logits, batches[number % len(batches)]) for number, logits in enumerate(run.finish_each())]
        finally:
            run.close()
        whole = np.concatenate(found[: len(batches)])
        return whole, {pair: np.concatenate([found[number] for number in own]) for pair, own in numbers.items()}

    @contextmanager
    def _without(self, index: int, removed: Mapping[int, int], run: Lockstep) -> Iterator[None]:
        """While a layer is passed, it lacks for every pass the expert that was taken out there."""
        if not removed:
            yield
            return
        with self._removal.of(self.stream.moe_layers[index], lambda: removed.get(run.batch)):
            yield


def with_importance(scores: Scores, losses: Losses) -> Scores:
    """The scores with the statistic `ablation`: what taking an expert out adds to the loss, mean over sequences."""
    layers = []
    for layer in scores.layers:
        values = np.full(layer.num_experts, np.nan)
        for index, expert in losses.without:
            if index == layer.layer:
                values[expert] = losses.changes((index, expert)).mean()
        layers.append(replace(layer, statistics=layer.statistics | {ABLATION: values}))
    measured = {ABLATION: {"sequences": len(losses.whole_N), "replaced_in": list(losses.replaced_in)}}
    return replace(scores, layers=layers, fingerprint=scores.fingerprint | measured)


def _group_size(tokens: Tensor, stream: LayerStream) -> int:
    """Experts whose passes fit into memory together, beside that of the whole model."""
    hidden_size: int = stream.model.config.get_text_config().hidden_size
    return max(1, HIDDEN_BYTES // (COPIES * 4 * tokens.numel() * hidden_size) - 1)


def _losses(logits_BSV: Tensor, tokens_BS: Tensor) -> Array:
    """Mean negative log-likelihood of the next tokens of each sequence [B]."""
    predicted = logits_BSV[:, :-1].flatten(0, 1).float()
    losses = F.cross_entropy(predicted, tokens_BS[:, 1:].flatten(), reduction="none")
    found: Array = losses.view(len(tokens_BS), -1).double().mean(dim=1).cpu().numpy()
    return found


def _require_spare(stream: LayerStream, experts: Mapping[int, Sequence[int]]) -> None:
    for layer in experts:
        moe = stream.moe_layers[layer]
        if moe.num_experts <= moe.top_k:
            raise UsageError(
                f"layer {layer} has {moe.num_experts} experts and every token uses all: none can be taken out."
            )


def _name(pair: Pair) -> str:
    return f"{pair[0]}/{pair[1]}"


class _Kept:
    """What a measurement keeps in its folder: all losses so far, and what enters the layers that groups begin with."""

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        self.folder, self.fingerprint = folder, json.loads(json.dumps(fingerprint))
        self.losses: dict[str, list[float]] = {}
        file = folder / LOSSES_FILE
        if file.exists():
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["fingerprint"] != self.fingerprint:
                raise ResumeError("the losses were measured on something else; start over with --force.")
            self.losses = content["losses"]

    def add(self, losses: Mapping[str, Array]) -> None:
        self.losses |= {name: values.tolist() for name, values in losses.items()}
        write_json(self.folder / LOSSES_FILE, {"fingerprint": self.fingerprint, "losses": self.losses})

    def enter(self, layer: int, hidden: list[Tensor]) -> None:
        if layer:
            temporary = self.folder / "entering.part"
            save_file({str(number): tensor.cpu().contiguous() for number, tensor in enumerate(hidden)}, temporary)
            replace_durably(temporary, self._file(layer))

    def holds_entering(self, layers: set[int]) -> bool:
        return all(self._file(layer).exists() for layer in layers if layer)

    def entering(self, layer: int) -> list[Tensor]:
        if not layer:
            return []
        stored = load_file(self._file(layer))
        return [stored[str(number)] for number in range(len(stored))]

    def forget_entering(self) -> None:
        for file in self.folder.glob("entering-*.safetensors"):
            file.unlink()

    def _file(self, layer: int) -> Path:
        return self.folder / f"entering-{layer:05d}.safetensors"
