"""Layers that share a bank of experts are distilled: the bank is trained once, and stored once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moe_compress import run
from tests.tiny_checkpoint import tiny_checkpoint, tiny_recipe, write_texts

TIE = {"op": "tie", "group_size": 2, "residual_rank": 4, "prelude": 1, "coda": 1, "fit": "average"}
FULL = {"op": "distill", "learning_rate": 3e-3, "epochs": 4, "batch_size": 2, "micro_batch_size": 2}
LAYERWISE = FULL | {"mode": "layerwise"}


@pytest.mark.parametrize(
    ("settings", "moved"),
    [
        (FULL, {"experts", "differences"}),
        (FULL | {"precision": "bfloat16"}, {"experts", "differences"}),
        (LAYERWISE, {"experts"}),
        (LAYERWISE | {"trainable": ["residuals"]}, {"differences"}),
    ],
    ids=["full", "bfloat16", "layerwise", "residuals"],
)
def test_a_shared_bank_is_trained_once(settings: dict[str, Any], moved: set[str], tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", num_hidden_layers=6)
    texts = write_texts(tmp_path / "texts.txt")
    trained = (
        settings
        if "trainable" in settings
        else settings
        | {
            "trainable": [
                "routers",
                *sorted({"experts": "experts", "differences": "residuals"}[part] for part in moved),
            ]
        }
    )
    recipe = tiny_recipe(source, texts, export={"tier": "plugin"}) | {"steps": [TIE, trained]}
    report = run(recipe, tmp_path / "out", keep_steps=True)
    assert all(check["passed"] for check in report["checks"].values())

    before, after = (
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (tmp_path / "out.work" / "step-0" / "checkpoint", tmp_path / "out")
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    kinds = {"differences" if "differences" in name else "experts" for name in changed if ".experts." in name}
    assert kinds == moved
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    leader, follower = (model.model.layers[layer].mlp.experts for layer in (1, 2))
    assert leader.down_proj.data_ptr() == follower.down_proj.data_ptr()
