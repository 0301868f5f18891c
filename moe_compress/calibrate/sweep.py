"""One sweep over the layers of a checkpoint: calibration tokens in, statistics per layer and expert out.

Only routed tokens are computed. Sums are kept in float64. After every layer its statistics and the hidden states that
left it are saved, so a killed sweep goes on at the layer where it stopped and ends with the same numbers.

The EASY-EP product needs the residual stream before the MoE block; it is taken as the decoder layer's output less the
block's (times the configuration's `residual_multiplier` if any): exact where that output is added as it is. Where the
two differ in shape (several residual streams, a latent space), or the decoder layer itself owns the experts, the
experts' own input stands for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_compress.calibrate.locality import Locality
from moe_compress.calibrate.logits import RouterGram
from moe_compress.calibrate.scores import RATIO_BINS, LayerScores, Scores
from moe_compress.checkpoint.durable import replace_durably
from moe_compress.checkpoint.hidden import forget_hidden, load_hidden, save_hidden
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.checkpoint.writer import write_json
from moe_compress.errors import ResumeError
from moe_compress.models.layers import MoELayer
from moe_compress.models.lockstep import Lockstep
from moe_compress.progress import Stage

TABLE = "table."  # before the name of a table, in the file of a layer


class Measurement(Protocol):
    """What a transformation wants measured on every MoE layer besides the statistics."""

    def add(self, expert: int, input_NH: Tensor, block_input_NH: Tensor, gate_N: Tensor, leaving_N: Tensor) -> None:
        """See what came to an expert: its own inputs, the block's for the same tokens, and the gate values; also the
        norms of the hidden states that left the decoder layer there.

        Where the decoder layer itself owns the experts, their own inputs stand for the block's.
        """

    def measure(self) -> dict[str, NDArray[np.float64]]:
        """When all tokens have passed and the layer is still resident: more statistics, each [E]."""


class LayerStatistics:
    """Accumulates the statistics of one MoE layer; an `Observer` of its experts and a `LayerObserver` of its layer."""

    def __init__(self, moe: MoELayer, residual_multiplier: float = 1.0, measurement: Measurement | None = None) -> None:
        self.moe, self.residual_multiplier, self.measurement = moe, residual_multiplier, measurement
        experts, device = moe.num_experts, next(moe.experts.parameters()).device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        names = ("gate_sum", "norm_sum", "norm_sq_sum", "gate_norm_sum", "gate_sq_norm_sq_sum", "max_abs", "easy_ep")
        self.sums = {name: zeros(experts) for name in names}
        self.sums |= {name: zeros(experts, moe.width) for name in ("output_sum", "output_sq_sum", "gated_output_sum")}
        self.sums["coselection"] = zeros(experts, experts)
        self.locality = Locality(experts, moe.top_k)
        self._router = RouterGram(moe)
        self.gate_ratios = zeros(2, RATIO_BINS)
        self.num_tokens = 0
        self.cosine_sum, self.stream_energy = zeros(1), zeros(1)
        self._entering_TH: Tensor | None = None
        self._index_TK: Tensor | None = None
        self._input_TH: Tensor | None = None
        self._routed_TH: Tensor | None = None
        self._block_TH: Tensor | None = None
        self._saliency: list[tuple[int, Tensor, Tensor, Tensor]] = []
        moe.experts.observer = self  # type: ignore[assignment]
        self._hooks = [moe.experts.register_forward_pre_hook(self._experts_input, with_kwargs=True)]
        if moe.block_path:  # else the block is the decoder layer, which all batches have entered, and `layer` ends
            self._hooks.append(moe.block.register_forward_hook(self._block_output))
            self._hooks.append(moe.block.register_forward_pre_hook(self._block_input, with_kwargs=True))

    def expert(self, expert: int, token_N: Tensor, gate_N: Tensor, output_NH: Tensor) -> None:
        gate, norm = self.moe.output_scale * gate_N.double(), output_NH.norm(dim=-1).double()
        product = gate * norm
        for name, values in (
            ("gate_sum", gate),
            ("norm_sum", norm),
            ("norm_sq_sum", norm.square()),
            ("gate_norm_sum", product),
            ("gate_sq_norm_sq_sum", product.square()),
        ):
            self.sums[name][expert] += values.sum()
        self.sums["output_sum"][expert] += output_NH.sum(0, dtype=torch.float64)
        self.sums["output_sq_sum"][expert] += output_NH.square().sum(0, dtype=torch.float64)
        self.sums["gated_output_sum"][expert] += gate @ output_NH.double()
        self.sums["max_abs"][expert] = torch.maximum(self.sums["max_abs"][expert], output_NH.abs().max().double())
        self._saliency.append((expert, token_N, gate_N, product))

    def block(self, index_TK: Tensor, routed_output_TH: Tensor) -> None:
        chosen_TE = torch.zeros(len(index_TK), self.moe.num_experts + 1, dtype=torch.float64, device=index_TK.device)
        chosen_TE.scatter_(1, index_TK.clamp(max=self.moe.num_experts), 1.0)
        chosen_TE = chosen_TE[:, :-1]
        self.sums["coselection"] += chosen_TE.T @ chosen_TE
        self.num_tokens += len(index_TK)
        self._routed_TH, self._index_TK = routed_output_TH, index_TK

    def layer(self, input_BSH: Tensor, output_BSH: Tensor) -> None:
        assert self._routed_TH is not None and self._index_TK is not None
        batch, length = input_BSH.shape[:2]
        if len(self._index_TK) == batch * length:
            self.locality.add(self._index_TK.view(batch, length, -1).cpu().numpy())
        entering, leaving = (hidden.reshape(len(self._routed_TH), -1) for hidden in (input_BSH, output_BSH))
        self.cosine_sum += F.cosine_similarity(entering, leaving, dim=-1).sum(dtype=torch.float64)
        self.stream_energy += leaving.square().sum(dtype=torch.float64)
        change_T = (1 - F.cosine_similarity(*self._around(leaving), dim=-1)).clamp(min=0).double()
        norm_T = leaving.norm(dim=-1)
        for expert, token_N, gate_N, product_N in self._saliency:
            self.sums["easy_ep"][expert] += (product_N * change_T[token_N]).sum()
            if self.measurement is not None:
                assert self._input_TH is not None
                around_TH = self._input_TH if self._entering_TH is None else self._entering_TH
                self.measurement.add(expert, self._input_TH[token_N], around_TH[token_N], gate_N, norm_T[token_N])
        self._saliency.clear()
        self._input_TH = self._routed_TH = self._block_TH = None

    def _around(self, leaving: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream before and after the routed experts' output is added, both [T, H]."""
        assert self._input_TH is not None and self._routed_TH is not None
        routed_TH = self.moe.output_scale * self._routed_TH
        if self._block_TH is None or not leaving.shape == self._block_TH.shape == routed_TH.shape:
            return self._input_TH, self._input_TH + routed_TH
        before_TH = leaving - self.residual_multiplier * self._block_TH
        return before_TH, before_TH + self.residual_multiplier * routed_TH

    def close(self, layer: int) -> LayerScores:
        """Stop observing and return the sums."""
        for hook in self._hooks:
            hook.remove()
        del self.moe.experts.observer  # before measuring, which runs experts too
        self.sums["router_gram"] = self._router.close()
        statistics = {name: values.cpu().numpy() for name, values in self.sums.items()}
        statistics["tokens"] = np.diagonal(statistics["coselection"]).copy()
        statistics |= self.locality.statistics()
        cosine = float(self.cosine_sum) / max(1, self.num_tokens)
        if self.measurement is not None:
            statistics |= self.measurement.measure()
        energy = float(self.stream_energy)
        tables = {"gate_ratios": self.gate_ratios.cpu().numpy()}
        return LayerScores(
            layer, self.moe.num_experts, self.moe.top_k, self.num_tokens, cosine, statistics, energy, tables
        )

    def _block_input(self, module: Any, inputs: Any, keywords: Any) -> None:
        entering = inputs[0] if inputs else keywords["hidden_states"]
        self._entering_TH = entering.flatten(0, -2)

    def _experts_input(self, module: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self._input_TH, index_TK, gate_TK = (*inputs, *keywords.values())
        gate_TK = gate_TK.masked_fill(index_TK >= self.moe.num_experts, 0).float().sort(dim=1, descending=True).values
        ratio_TK = (gate_TK / gate_TK[:, :1]).nan_to_num(0.0)[:, 1:]
        bin_TK = (ratio_TK * RATIO_BINS).long().clamp(0, RATIO_BINS - 1)
        for counts, bins in zip(self.gate_ratios, (bin_TK, bin_TK[:, :1]), strict=True):
            counts += torch.bincount(bins.flatten(), minlength=RATIO_BINS)

    def _block_output(self, module: Any, inputs: Any, output: Any) -> None:
        tensor = output if isinstance(output, Tensor) else output[0]
        self._block_TH = tensor.flatten(0, -2)


def collect(
    stream: LayerStream,
    tokens: Tensor,
    *,
    batch_size: int,
    folder: Path,
    fingerprint: dict[str, Any],
    min_tokens_per_expert: int,
    stage: Stage,
    measurement: Callable[[MoELayer], Measurement] | None = None,
) -> Scores:
    """Sweep `tokens` [N, S] through all layers and return the scores, saved in `folder`.

    `folder` also holds the state of an interrupted sweep; it is continued if there is one. `measurement` makes what is
    to be measured on a layer besides the statistics.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done, hidden = load_hidden(folder)
    _require_same_input(folder / "sweep.json", fingerprint, done)
    layers = [_load_layer(folder, index) for index in sorted(stream.moe_layers) if index < done]
    stream.load_trunk()
    batches: Sequence[Tensor] = tokens.to(stream.device).split(batch_size)
    for _ in range(done):
        stage.advance("done before")
    run = Lockstep(stream.model, stream.layers, batches, start=done, hidden=[h.to(stream.device) for h in hidden])
    stream.release_embeddings()
    config: Any = stream.model.config.get_text_config()
    try:
        for index in range(done, len(stream.layers)):
            stream.load(index)
            detail = "dense layer"
            if index in stream.moe_layers:
                moe = stream.moe_layers[index]
                statistics = LayerStatistics(
                    moe, getattr(config, "residual_multiplier", 1.0), measurement(moe) if measurement else None
                )
                run.observer = statistics
                run.through(index)
                run.observer = None
                layers.append(statistics.close(index))
                _save_layer(folder, layers[-1])
                seen = int((layers[-1].statistics["tokens"] > 0).sum())
                detail = f"{seen}/{moe.num_experts} experts seen"
            else:
                run.through(index)
            stream.release(index)
            save_hidden(folder, index + 1, run.hidden)
            stage.advance(detail)
    finally:
        run.close()
    scores = Scores(layers, fingerprint, min_tokens_per_expert)
    scores.save(folder)
    forget_hidden(folder)
    for file in (*folder.glob("layer-*.safetensors"), folder / "sweep.json"):
        file.unlink()
    return scores


def _require_same_input(file: Path, fingerprint: dict[str, Any], done: int) -> None:
    """Note what is swept, or refuse to go on with an interrupted sweep of something else."""
    if done and json.loads(file.read_text(encoding="utf-8")) != json.loads(json.dumps(fingerprint)):
        raise ResumeError("the calibration data is not what this run began with; start over with --force.")
    write_json(file, fingerprint)


def _save_layer(folder: Path, scores: LayerScores) -> None:
    meta = {"num_experts": scores.num_experts, "top_k": scores.top_k, "num_tokens": scores.num_tokens}
    described = json.dumps(meta | {"cosine": scores.cosine, "stream_energy": scores.stream_energy})
    temporary = folder / "scores.part"
    arrays = scores.statistics | {f"{TABLE}{name}": values for name, values in scores.tables.items()}
    save_file({name: torch.from_numpy(values) for name, values in arrays.items()}, temporary, {"layer": described})
    replace_durably(temporary, folder / f"layer-{scores.layer:05d}.safetensors")


def _load_layer(folder: Path, layer: int) -> LayerScores:
    with safe_open(folder / f"layer-{layer:05d}.safetensors", "np") as file:
        meta = json.loads(file.metadata()["layer"])
        arrays = {name: file.get_tensor(name) for name in list(file.keys())}
    tables = {name.removeprefix(TABLE): values for name, values in arrays.items() if name.startswith(TABLE)}
    statistics = {name: values for name, values in arrays.items() if not name.startswith(TABLE)}
    return LayerScores(layer=layer, statistics=statistics, tables=tables, **meta)
