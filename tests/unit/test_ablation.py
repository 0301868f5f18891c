"""Losses without single experts against plain transformers, where the router's logit of the expert is -infinity."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

import moe_compress
from moe_compress.calibrate import ablation
from moe_compress.calibrate.ablation import Ablation, Losses
from moe_compress.calibrate.config import CalibrationConfig
from moe_compress.calibrate.scores import LayerScores
from moe_compress.checkpoint.source import open_checkpoint
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.compress.prune.config import PruneConfig
from moe_compress.compress.prune.plan import criterion_scores
from moe_compress.compress.scoring import read_calibration
from moe_compress.errors import ResumeError, UsageError
from moe_compress.progress import SilentProgress
from tests.tiny_checkpoint import VOCABULARY, tiny_checkpoint, tiny_recipe, write_texts

EXPERTS, TOP_K, LAYERS = 5, 2, 3
TOKENS = torch.randint(VOCABULARY, (5, 20), generator=torch.Generator().manual_seed(1))
CHOSEN = {0: [1, 4], 2: [0, 2, 3]}
ONE_GROUP, EACH_ALONE = 1 << 30, 1


@pytest.fixture(scope="module", params=["qwen3_moe", "olmoe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gates that are shares of the chosen experts', and gates that are not."""
    return tiny_checkpoint(
        tmp_path_factory.mktemp("model") / request.param, request.param, dtype=torch.float32, num_experts=EXPERTS,
        num_experts_per_tok=TOP_K, num_hidden_layers=LAYERS,
    )  # fmt: skip


def ablation_of(folder: Path, work: Path, chosen: Any = CHOSEN, fingerprint: Any = "a") -> Ablation:
    stream = LayerStream(open_checkpoint(str(folder)))
    return Ablation(stream, TOKENS, chosen, batch_size=2, folder=work, fingerprint={"tokens": fingerprint})


def measured(folder: Path, work: Path, chosen: Any = CHOSEN, *, stage: Any = None) -> Losses:
    with SilentProgress().stage("ablate", 1) as silent:
        return ablation_of(folder, work, chosen).run(stage or silent)


@contextmanager
def without_logit(model: Any, layer: int, expert: int) -> Iterator[None]:
    """The router of a layer as if it had no row for this expert."""
    gate = model.model.layers[layer].mlp.gate
    linear = F.linear

    def forward(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found = linear(inputs, weight, bias)
        if weight is gate.weight:
            found[..., expert] = -torch.inf
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", forward)
        yield


def losses_of(model: Any) -> np.ndarray:
    with torch.no_grad():
        logits = model(input_ids=TOKENS, use_cache=False).logits
    return np.array(
        [F.cross_entropy(one[:-1].double(), tokens[1:]).item() for one, tokens in zip(logits, TOKENS, strict=True)]
    )


@pytest.mark.parametrize("hidden_bytes", [ONE_GROUP, EACH_ALONE])
def test_the_router_loses_the_expert(
    hidden_bytes: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "HIDDEN_BYTES", hidden_bytes)
    found = measured(folder, tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    np.testing.assert_allclose(found.whole_N, losses_of(model), rtol=1e-5)
    assert found.replaced_in == (0, 2) and list(found.without) == [(0, 1), (0, 4), (2, 0), (2, 2), (2, 3)]
    for layer, expert in found.without:
        with without_logit(model, layer, expert):
            expected = losses_of(model) - found.whole_N
        assert np.abs(expected).max() > 1e-3, "the comparison means something"
        np.testing.assert_allclose(found.changes((layer, expert)), expected, atol=2e-5)
    assert [file.name for file in tmp_path.iterdir()] == ["losses.json"]


def test_grouped_routers_silence_it(tmp_path: Path) -> None:
    """DeepSeek's groups must stay equal, so nothing takes the expert's place: its output is zero."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=8, num_experts_per_tok=2, n_group=2,
        topk_group=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=1, initializer_range=0.3, max_position_embeddings=64, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    model: Any = DeepseekV3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    found = measured(tmp_path / "model", tmp_path / "work", {1: [3, 6]})
    assert found.replaced_in == ()
    for expert in (3, 6):
        changed: Any = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        changed.model.layers[1].mlp.experts.down_proj.data[expert] = 0
        expected = losses_of(changed) - losses_of(model)
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(found.changes((1, expert)), expected, atol=2e-5)


class Interrupting:
    """A stage that raises after so many layers."""

    def __init__(self, left: int) -> None:
        self.left = left

    def advance(self, detail: str = "") -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("layers", [2, LAYERS + 1, LAYERS + 4])
def test_interrupted_and_continued(layers: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "HIDDEN_BYTES", EACH_ALONE)
    expected = measured(folder, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        measured(folder, tmp_path / "cut", stage=Interrupting(layers))
    loaded: list[int] = []
    original = LayerStream.load
    monkeypatch.setattr(LayerStream, "load", lambda stream, index: (loaded.append(index), original(stream, index))[1])
    found = measured(folder, tmp_path / "cut")
    np.testing.assert_array_equal(found.whole_N, expected.whole_N)
    for pair, losses in expected.without.items():
        np.testing.assert_array_equal(found.without[pair], losses)
    whole = LAYERS + 2 * LAYERS + 3  # one pass from the start, two experts of layer 0, three of layer 2
    # Unfinished groups begin again; a first pass cut short too.
    assert len(loaded) == {2: whole, LAYERS + 1: whole - LAYERS, LAYERS + 4: whole - 2 * LAYERS}[layers]
    with pytest.raises(ResumeError, match="something else"):
        ablation_of(folder, tmp_path / "cut", fingerprint="b")


def test_progress_is_announced(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "HIDDEN_BYTES", EACH_ALONE)
    announced, counting = ablation_of(folder, tmp_path).num_layer_passes, Interrupting(-1)
    measured(folder, tmp_path, stage=counting)
    assert announced == -1 - counting.left == 3 * LAYERS + 3


def test_more_experts_later(folder: Path, tmp_path: Path) -> None:
    """What was measured before is not measured again, and comes out the same."""
    some = measured(folder, tmp_path, {0: [1], 2: [3]})
    counting = Interrupting(-1)
    more = measured(folder, tmp_path, {0: [1], 1: [0], 2: [3, 0]}, stage=counting)
    assert -1 - counting.left == LAYERS + 2, "a first pass up to layer 1, and one group from there"
    assert list(more.without) == [(0, 1), (1, 0), (2, 3), (2, 0)]
    for pair, losses in some.without.items():
        np.testing.assert_array_equal(more.without[pair], losses)
    np.testing.assert_array_equal(more.whole_N, some.whole_N)
    again = Interrupting(-1)
    measured(folder, tmp_path, stage=again, chosen={1: [0]})
    assert again.left == -1


def test_no_expert_to_spare(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", num_experts=2, num_experts_per_tok=2)
    with pytest.raises(UsageError, match="layer 0 has 2 experts and every token uses all"):
        measured(model, tmp_path / "work", {0: [1]})


def test_pruning_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`criterion: ablation` drops the experts that the loss misses least, with or without scores made before."""
    model = tiny_checkpoint(tmp_path / "model", dtype=torch.float32, num_experts=4)
    texts = write_texts(tmp_path / "texts.txt")
    recipe = tiny_recipe(model, texts, 0.5)
    recipe["steps"][0] |= {"criterion": "ablation", "ablation_samples": 6, "protect_super_experts": False}
    scores = moe_compress.score(recipe, tmp_path / "scores")
    tokens = read_calibration(
        model, open_checkpoint(str(model)).config, CalibrationConfig(**recipe["calibration"])
    ).tokens
    monkeypatch.setattr(sys.modules[__name__], "TOKENS", tokens[:6])
    losses = measured(model, tmp_path / "losses", {0: range(4), 1: range(4)})
    for layer in scores.layers:
        importance = layer.statistics["ablation"]
        np.testing.assert_allclose(
            importance, [losses.changes((layer.layer, expert)).mean() for expert in range(4)], atol=1e-6
        )
    kept = sorted(file.name for file in (tmp_path / "scores").glob("[!m]*"))
    assert kept == ["audit.json", "scores.json", "scores.safetensors"]
    given = moe_compress.plan(recipe, scores=tmp_path / "scores")["steps"][0]["layers"]
    for layer, planned in zip(scores.layers, given, strict=True):
        assert planned["keep"] == sorted(np.argsort(-layer.statistics["ablation"])[:2].tolist())
    moe_compress.run(recipe, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    for layer, measured_layer in zip(found["layers"], scores.layers, strict=True):
        np.testing.assert_allclose(layer["changes"], measured_layer.statistics["ablation"], atol=1e-6)
    reap = next(one for one in found["criteria"] if one["criterion"] == "reap")
    asked = PruneConfig.model_validate({"op": "prune", "criterion": "reap", "keep": 1})
    expected = [
        scipy.stats.spearmanr(criterion_scores(asked, layer), layer.statistics["ablation"]).statistic
        for layer in scores.layers
    ]
    assert reap["spearman"] == pytest.approx(np.mean(expected), abs=1e-6)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "measured on 6 calibration sequences" in page and "which the other criteria have seen too" in page
    done = json.loads((tmp_path / "out" / "plan.json").read_text())["steps"][0]["layers"]
    assert [layer["keep"] for layer in done] == [layer["keep"] for layer in given]


def test_half_measured_importance_is_refused() -> None:
    config = PruneConfig.model_validate({"op": "prune", "criterion": "ablation", "keep": 0.5})
    for statistics, missing in (({"tokens": np.ones(3)}, 3), ({"tokens": np.ones(3), "ablation": [1.0, np.nan, 2]}, 1)):
        layer = LayerScores(4, 3, 1, 9, 0.0, {name: np.asarray(values) for name, values in statistics.items()})
        with pytest.raises(UsageError, match=f"without {missing} of the 3 experts of layer 4"):
            criterion_scores(config, layer)
