"""The calibration sweep against a computation token by token in float64, and that an interruption changes nothing.

The reference uses a plain transformers model only for what enters the MoE block, the norm before it and the decoder
layer; routing, experts and every statistic are worked out from the stored tensors with numpy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moe_compress.calibrate import sweep
from moe_compress.calibrate.scores import RATIO_BINS, LayerScores, Scores
from moe_compress.calibrate.sweep import collect
from moe_compress.checkpoint.source import open_checkpoint
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.errors import ResumeError, UsageError
from moe_compress.progress import SilentProgress
from tests import naive_locality
from tests.tiny_checkpoint import VOCABULARY, tiny_checkpoint

NUM_EXPERTS, TOP_K, HIDDEN = 4, 2, 32
FINGERPRINT = {"tokens": "abc"}
PER_EXPERT = (
    "tokens", "gate_sum", "norm_sum", "norm_sq_sum", "gate_norm_sum", "gate_sq_norm_sq_sum", "max_abs", "easy_ep"
)  # fmt: skip
COUNTS = {"tokens", "coselection", "windows_16", "windows_64", "cache_lookups", "cache_hits"}
CASES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"norm_topk_prob": True, "mlp_only_layers": [1]},  # the second layer is dense
    "olmoe": {"norm_topk_prob": False},
}


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(
        tmp_path_factory.mktemp("model") / request.param,
        request.param,
        dtype=torch.float32,
        num_hidden_layers=3,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        **CASES[request.param],
    )


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(1))


@contextmanager
def interrupted_after(layers: int) -> Iterator[SilentProgress]:
    """A progress that raises when `layers` layers are done."""

    class Interrupting(SilentProgress):
        @contextmanager
        def stage(self, name: str, total: int, unit: str = "layer") -> Iterator[Any]:
            class Counter:
                done = 0

                def advance(self, detail: str = "") -> None:
                    self.done += 1
                    if self.done == layers:
                        raise KeyboardInterrupt

            yield Counter()

    with pytest.raises(KeyboardInterrupt):
        yield Interrupting()


def collected(
    folder: Path, work: Path, tokens: Tensor, progress: Any = None, fingerprint: Any = FINGERPRINT, batch_size: int = 2
) -> Scores:
    stream = LayerStream(open_checkpoint(str(folder)))
    with (progress or SilentProgress()).stage("score", len(stream.layers)) as stage:
        return collect(
            stream,
            tokens,
            batch_size=batch_size,
            folder=work,
            fingerprint=fingerprint,
            min_tokens_per_expert=1,
            stage=stage,
        )


# -------------------------------------------------------------------------------------------------- the naive reference


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def silu(values: np.ndarray) -> np.ndarray:
    return values / (1 + np.exp(-values))


def streams_of(folder: Path, tokens: Tensor) -> list[dict[str, np.ndarray]]:
    """Per decoder layer, what enters it, the norm before its MoE block and the block, and what leaves it, [T, H]."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    model.double().eval()
    caught: list[dict[str, list[np.ndarray]]] = [{} for _ in model.model.layers]

    def catch(layer: int, name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, kwargs: Any, output: Any = None) -> None:
            value = (inputs[0] if inputs else kwargs["hidden_states"]) if output is None else output
            value = value if isinstance(value, Tensor) else value[0]
            caught[layer].setdefault(name, []).append(value.reshape(-1, HIDDEN).numpy())

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(catch(index, "entering"), with_kwargs=True)
        layer.register_forward_hook(catch(index, "leaving"), with_kwargs=True)
        layer.post_attention_layernorm.register_forward_pre_hook(catch(index, "residual"), with_kwargs=True)
        layer.mlp.register_forward_pre_hook(catch(index, "block"), with_kwargs=True)
    with torch.no_grad():
        for sequence in tokens:
            model(input_ids=sequence[None], use_cache=False)
    return [{name: np.concatenate(rows) for name, rows in layer.items()} for layer in caught]


def naive(folder: Path, tokens: Tensor) -> dict[int, LayerScores]:
    """Every statistic of every MoE layer, one token and one expert after the other."""
    weights: dict[str, np.ndarray] = {}
    for shard in folder.glob("*.safetensors"):
        weights |= {name: array.astype(np.float64) for name, array in load_file(shard).items()}
    renormalise = json.loads((folder / "config.json").read_text())["norm_topk_prob"]
    found = {}
    for index, caught in enumerate(streams_of(folder, tokens)):
        prefix = f"model.layers.{index}.mlp."
        if f"{prefix}gate.weight" not in weights:
            continue
        sums = {name: np.zeros(NUM_EXPERTS) for name in PER_EXPERT}
        sums |= {name: np.zeros((NUM_EXPERTS, HIDDEN)) for name in ("output_sum", "output_sq_sum", "gated_output_sum")}
        sums |= {name: np.zeros((NUM_EXPERTS, NUM_EXPERTS)) for name in ("coselection", "router_gram")}
        ratios, cosines, trace = np.zeros((2, RATIO_BINS)), [], list[list[int]]()
        for entering, leaving, residual, x in zip(
            *(caught[name] for name in ("entering", "leaving", "residual", "block")), strict=True
        ):
            cosines.append(cosine(entering, leaving))
            logits = weights[f"{prefix}gate.weight"] @ x
            sums["router_gram"] += np.outer(logits, logits)
            probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            chosen = np.argsort(-probabilities)[:TOP_K]
            trace.append(chosen.tolist())
            gates = probabilities[chosen] / (probabilities[chosen].sum() if renormalise else 1.0)
            for ratio in gates[1:] / gates[0]:
                ratios[0, int(ratio * RATIO_BINS)] += 1
            ratios[1, int(gates[1] / gates[0] * RATIO_BINS)] += 1
            outputs = []
            for expert in chosen:
                up, gate, down = (
                    weights[f"{prefix}experts.{expert}.{name}_proj.weight"] for name in ("up", "gate", "down")
                )
                outputs.append(down @ (silu(gate @ x) * (up @ x)))
            routed = sum(g * f for g, f in zip(gates, outputs, strict=True))
            change = max(0.0, 1 - cosine(residual, residual + routed))
            for expert, g, f in zip(chosen, gates, outputs, strict=True):
                norm = np.sqrt((f**2).sum())
                sums["tokens"][expert] += 1
                sums["gate_sum"][expert] += g
                sums["norm_sum"][expert] += norm
                sums["norm_sq_sum"][expert] += norm**2
                sums["gate_norm_sum"][expert] += g * norm
                sums["gate_sq_norm_sq_sum"][expert] += g**2 * norm**2
                sums["output_sum"][expert] += f
                sums["output_sq_sum"][expert] += f**2
                sums["gated_output_sum"][expert] += g * f
                sums["max_abs"][expert] = max(sums["max_abs"][expert], np.abs(f).max())
                sums["easy_ep"][expert] += g * norm * change
                for other in chosen:
                    sums["coselection"][expert, other] += 1
        traces = [trace[start : start + tokens.shape[1]] for start in range(0, len(trace), tokens.shape[1])]
        sums |= {f"windows_{m}": np.array(naive_locality.windows(traces, NUM_EXPERTS, m), float) for m in (16, 64)}
        caches = [
            naive_locality.cache_hits(traces, NUM_EXPERTS, size, 16) for size in (TOP_K, NUM_EXPERTS, NUM_EXPERTS)
        ]
        sums |= {"cache_lookups": sums["tokens"], "cache_hits": np.array(caches, float).T}
        cosine_mean, tables = float(np.mean(cosines)), {"gate_ratios": ratios}
        found[index] = LayerScores(index, NUM_EXPERTS, TOP_K, len(cosines), cosine_mean, sums, tables=tables)
    return found


# ------------------------------------------------------------------------------------------------------------ the tests


def test_every_statistic_against_the_naive_computation(folder: Path, tokens: Tensor, tmp_path: Path) -> None:
    expected = naive(folder, tokens)
    scores = collected(folder, tmp_path, tokens)
    assert (
        [layer.layer for layer in scores.layers]
        == sorted(expected)
        == ([0, 2] if "qwen3" in folder.name else [0, 1, 2])
    )
    for layer in scores.layers:
        reference = expected[layer.layer]
        assert (layer.num_experts, layer.top_k, layer.num_tokens) == (NUM_EXPERTS, TOP_K, tokens.numel())
        assert layer.cosine == pytest.approx(reference.cosine, rel=1e-5)
        assert layer.statistics.keys() == reference.statistics.keys()
        for name, values in reference.statistics.items():
            found = layer.statistics[name]
            assert found.dtype == np.float64 and found.shape == values.shape
            if name in COUNTS:
                np.testing.assert_array_equal(found, values, err_msg=name)
            else:
                assert np.abs(values).max() > 1e-3, "the comparison means something"
                np.testing.assert_allclose(found, values, rtol=1e-4, atol=1e-5 * np.abs(values).max(), err_msg=name)
        assert layer.statistics["tokens"].sum() == TOP_K * tokens.numel()
        found, values = layer.tables["gate_ratios"], reference.tables["gate_ratios"]
        assert found.sum(axis=1).tolist() == [tokens.numel() * (TOP_K - 1), tokens.numel()]
        moved = np.abs(found.cumsum(axis=1) - values.cumsum(axis=1))
        assert moved.max() <= 1 and moved.sum() <= 4, "rounding may put a ratio into the next bin"


def test_batch_size_changes_no_count_and_sums_only_by_rounding(folder: Path, tokens: Tensor, tmp_path: Path) -> None:
    one, four = (collected(folder, tmp_path / str(size), tokens, batch_size=size) for size in (1, 4))
    for left, right in zip(one.layers, four.layers, strict=True):
        assert left.num_tokens == right.num_tokens
        assert left.cosine == pytest.approx(right.cosine, rel=1e-6)
        for name, values in left.statistics.items():
            other = right.statistics[name]
            if name in COUNTS:
                np.testing.assert_array_equal(values, other)
            else:
                np.testing.assert_allclose(values, other, rtol=1e-5, atol=1e-5 * np.abs(values).max())


def saved(work: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in work.iterdir()}


@pytest.fixture(scope="module")
def uninterrupted(folder: Path, tokens: Tensor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    work = tmp_path_factory.mktemp("scores")
    collected(folder, work, tokens)
    files = saved(work)
    assert sorted(files) == ["scores.json", "scores.safetensors"], "nothing of the sweep's own state is left"
    return files


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_interrupted_after_a_layer_and_continued(
    layers: int, folder: Path, tokens: Tensor, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    with interrupted_after(layers) as progress:
        collected(folder, tmp_path, tokens, progress)
    assert not (tmp_path / "scores.json").exists()
    loaded: list[int] = []
    original = LayerStream.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerStream, "load", lambda stream, index: (loaded.append(index), original(stream, index))[1])
        collected(folder, tmp_path, tokens)
    assert loaded == list(range(layers, 3)), "layers that were done are not read again"
    assert saved(tmp_path) == uninterrupted


@pytest.mark.parametrize("place", ["save_hidden", "_save_layer"])
def test_interrupted_inside_a_layer_and_continued(
    place: str, folder: Path, tokens: Tensor, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    """Once before a layer's statistics are kept, once after that but before its hidden states are."""
    original, calls = getattr(sweep, place), [0]

    def second_fails(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, place, second_fails)
        with pytest.raises(KeyboardInterrupt):
            collected(folder, tmp_path, tokens)
    collected(folder, tmp_path, tokens)
    assert saved(tmp_path) == uninterrupted


def test_interrupted_while_the_scores_are_saved(
    folder: Path, tokens: Tensor, tmp_path: Path, uninterrupted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a `scores.json` must not pass for a whole one."""
    original = Path.write_text

    def half(file: Path, text: str, **settings: Any) -> None:
        if file.parent == tmp_path and "num_experts" in text:
            original(file, text[: len(text) // 2], **settings)
            raise KeyboardInterrupt
        original(file, text, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(KeyboardInterrupt):
            collected(folder, tmp_path, tokens)
    assert not (tmp_path / "scores.json").exists()
    collected(folder, tmp_path, tokens)
    assert saved(tmp_path) == uninterrupted


def test_other_tokens_are_not_continued(folder: Path, tokens: Tensor, tmp_path: Path) -> None:
    with interrupted_after(2) as progress:
        collected(folder, tmp_path, tokens, progress)
    before = saved(tmp_path)
    with pytest.raises(ResumeError, match="calibration data"):
        collected(folder, tmp_path, tokens.flip(0), fingerprint={"tokens": "abd"})
    assert saved(tmp_path) == before


def test_saved_scores_are_read_back_equal(folder: Path, tokens: Tensor, tmp_path: Path) -> None:
    scores = collected(folder, tmp_path, tokens)
    loaded = Scores.load(tmp_path)
    assert (loaded.fingerprint, loaded.min_tokens_per_expert, loaded.starved) == (FINGERPRINT, 1, [])
    for one, other in zip(scores.layers, loaded.layers, strict=True):
        assert replace(one, statistics={}, tables={}) == replace(other, statistics={}, tables={})
        for here, there in ((one.statistics, other.statistics), (one.tables, other.tables)):
            assert here.keys() == there.keys() and all(np.array_equal(here[name], there[name]) for name in here)
    with pytest.raises(UsageError, match="moe-compress score"):
        Scores.load(tmp_path / "absent")


def test_an_expert_without_tokens_is_starved(folder: Path, tmp_path: Path) -> None:
    """One token reaches two experts of four."""
    scores = collected(folder, tmp_path, torch.tensor([[65]]), batch_size=1)
    for layer in scores.layers:
        counts = layer.statistics["tokens"]
        assert sorted(counts) == [0, 0, 1, 1]
        unseen = [expert for expert in range(NUM_EXPERTS) if not counts[expert]]
        assert [expert for index, expert in scores.starved if index == layer.layer] == unseen
        for name, values in layer.statistics.items():
            assert name == "router_gram" or not values[unseen].any()
    assert json.loads((tmp_path / "scores.json").read_text())["starved"] == [list(pair) for pair in scores.starved]
    assert scores.summary()["fewest_tokens_per_expert"] == 0
