"""Bytes that a token reads of a quantized checkpoint, as measured and as predicted, against its tensors."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moe_compress
from moe_compress.checkpoint.index import TensorIndex
from moe_compress.verification import checks
from tests.tiny_checkpoint import tiny_checkpoint, tiny_recipe, write_texts

TOP_K, HIDDEN, LAYERS = 2, 32, 3
UNEVEN = {"op": "prune", "criterion": "reap", "keep": 0.6, "scope": "global", "protect_super_experts": False}
W4 = {"op": "quantize", "method": "rtn", "bits": 4, "group_size": 16, "attention": {}}
DROPS = {
    "op": "quantize", "method": "rtn", "stored_bytes": 85_000, "options": [2, 3, 4], "group_size": 16,
    "allow_drop": True, "protect_super_experts": False, "scale_search": 1,
}  # fmt: skip
CASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "stock": ("stock", [W4]),
    "unequal layers": ("plugin", [UNEVEN, W4 | {"embeddings": {}}]),
    "fewer slots": ("plugin", [{"op": "topk", "k": 1}, W4]),
    "drops": ("plugin", [DROPS]),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose checkpoint also has a prediction head, with experts of its own."""
    folder = tiny_checkpoint(
        tmp_path_factory.mktemp("source") / "model", num_hidden_layers=LAYERS, max_shard_size="1GB"
    )
    tensors = load_file(folder / "model.safetensors")
    for expert in range(8):
        for part in ("gate_proj", "up_proj"):
            tensors[f"mtp.layers.0.mlp.experts.{expert}.{part}.weight"] = torch.ones(16, 32, dtype=torch.bfloat16)
        tensors[f"mtp.layers.0.mlp.experts.{expert}.down_proj.weight"] = torch.ones(32, 16, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def read_per_token(folder: Path, top_k: int) -> float:
    """All that is stored but the prediction head: top-k of a layer, one row of the embeddings, the rest."""
    experts: Counter[str] = Counter()
    counts: dict[str, set[str]] = {}
    total = 0.0
    for name, info in TensorIndex.from_folder(folder).items():
        found = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\..*", name)
        if found is not None:
            experts[found[1]] += info.nbytes
            counts.setdefault(found[1], set()).add(found[2])
        elif name.startswith("model.embed_tokens."):
            total += HIDDEN * 2 if name.endswith(("weight_packed", ".weight")) else 0
        elif not name.startswith("mtp."):
            total += info.nbytes
    return total + sum(nbytes * min(1, top_k / len(counts[layer])) for layer, nbytes in experts.items())


@pytest.mark.parametrize("name", CASES)
def test_active_bytes_as_measured_and_predicted(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "check_logits", lambda folder: checks.Check(True, "not computed here."))
    tier, steps = CASES[name]
    recipe = tiny_recipe(source, write_texts(tmp_path / "texts.txt"), export={"tier": tier}) | {"steps": steps}
    scores = None
    if name == "drops":
        scores = tmp_path / "scores"
        moe_compress.score(recipe, scores)
    report = moe_compress.run(recipe, tmp_path / "out", scores=scores)
    found = report["compressed"]
    assert found["active_bytes_per_token"] == pytest.approx(
        read_per_token(tmp_path / "out", 1 if name == "fewer slots" else TOP_K), abs=1
    )
    counts = {
        len(layer["keep"]) for layer in json.loads((tmp_path / "out/plan.json").read_text())["steps"][-1]["layers"]
    }
    assert (len(counts) > 1) == (name in ("unequal layers", "drops"))
    if name == "unequal layers":  # which experts these keep is not known before they are measured
        return
    predicted = moe_compress.plan(recipe, scores=scores)["predicted"]
    for figure in ("total_params", "active_params", "active_bytes_per_token"):
        assert predicted[figure] == pytest.approx(found[figure], abs=1), figure
