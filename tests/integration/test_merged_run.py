"""Merging and tying from a recipe to a folder: what is stored, loaded, predicted, and survived."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import moe_compress
from moe_compress.checkpoint.index import TensorIndex
from moe_compress.errors import UnsupportedModelError, UsageError
from moe_compress.runtime.banks import Bank
from moe_compress.runtime.families import banked
from moe_compress.verification import reload
from tests.crashes import killed_and_resumed
from tests.integration.test_run import content, interrupted_at
from tests.tiny_checkpoint import tiny_model, tiny_recipe

ROOT = Path(__file__).parents[2]
LAYERS = 4
HC = {"op": "merge", "grouping": "hc", "keep": 4, "align": "activations", "protect_super_experts": False}
REAM = {"op": "merge", "grouping": "ream", "keep": 0.5, "max_group_size": 4, "protect_super_experts": False}
KEPT = REAM | {"router": "keep"}
DIFFERENCES = {
    "op": "merge", "grouping": "router", "keep": 2, "protect_super_experts": False,
    "keep_differences": {"expert_bytes": 0.6},
}  # fmt: skip
CONSTANTS = {"op": "prune", "criterion": "mone", "keep": 3, "replace": "constant", "protect_super_experts": False}
TIE = {"op": "tie", "group_size": 2, "prelude": 1, "coda": 0, "fit": "gradient", "fit_steps": 20, "residual_rank": 3}
WHOLE = {"op": "tie", "group_size": 4, "prelude": 0, "coda": 0, "fit": "closed_form", "match": "weights"}
CHOSEN = {
    "op": "tie", "prelude": 0, "coda": 0, "fit": "closed_form", "choose": "auto", "stored_bytes": "150kB",
    "rank_options": [0, 2, 4],
}  # fmt: skip
W4 = {"op": "quantize", "method": "gptq", "bits": 4, "group_size": 16}
BUDGET = W4 | {"bits": None, "average_bits": 3.0, "options": [2, 3, 4], "scale_search": 2}


def recipe(source: Path, texts: Path, *steps: dict[str, Any], tier: str = "plugin", **settings: Any) -> dict[str, Any]:
    export = {"tier": tier, "max_shard_size": "20KB"}
    return tiny_recipe(source, texts, export=export, **settings) | {"steps": list(steps)}


STEPS = {
    "merge, reduced": ("stock", [REAM]),
    "merge by mean outputs": ("stock", [HC]),
    "merge, router kept": ("plugin", [KEPT]),
    "differences": ("plugin", [DIFFERENCES]),
    "constants": ("plugin", [CONSTANTS]),
    "tie": ("plugin", [TIE]),
    "tie, expanded": ("stock", [TIE]),
    "tie all": ("plugin", [WHOLE]),
    "tie, chosen": ("plugin", [CHOSEN]),
    "differences, 4 bits": ("plugin", [DIFFERENCES, W4]),
    "tie, 4 bits": ("plugin", [TIE, W4]),
    "tie, bits by budget": ("plugin", [TIE, BUDGET]),
    "prune, merge, tie, 4 bits": ("plugin", [{"op": "prune", "criterion": "reap", "keep": 0.75}, REAM, TIE, W4]),
}


@pytest.mark.parametrize("name", STEPS)
def test_all_five_checks_pass_and_the_plan_knows_the_bytes(
    name: str, source: Path, texts: Path, tmp_path: Path
) -> None:
    tier, steps = STEPS[name]
    settings = recipe(source, texts, *steps, tier=tier)
    report = moe_compress.run(settings, tmp_path / "out")
    assert all(check["passed"] for check in report["checks"].values())
    stored = TensorIndex.from_folder(tmp_path / "out").nbytes
    assert report["compressed"]["stored_bytes"] == stored
    if len(steps) == 1:
        moe_compress.score(settings, tmp_path / "scores")
        planned = moe_compress.plan(settings, scores=tmp_path / "scores")
        assert planned["predicted"]["stored_bytes"] == stored
        predicted = moe_compress.plan(settings)["predicted"]["stored_bytes"]
        assert predicted == pytest.approx(stored, rel=0.05)


@pytest.mark.parametrize(
    "name", ["merge by mean outputs", "differences", "tie", "tie, expanded", "tie, bits by budget"]
)
def test_resumed_and_run_through_end_alike(
    name: str, source: Path, texts: Path, tmp_path: Path, no_reload: None
) -> None:
    tier, steps = STEPS[name]
    settings = recipe(source, texts, *steps, tier=tier)
    moe_compress.run(settings, tmp_path / "one")
    expected = content(tmp_path / "one")
    for units in (LAYERS - 1, LAYERS + 2, 2 * LAYERS, 3 * LAYERS + 1):
        with interrupted_at(units) as progress:
            moe_compress.run(settings, tmp_path / "two", progress=progress)
            raise KeyboardInterrupt  # it has fewer layers to pass
        if not (tmp_path / "two").exists():
            moe_compress.run(settings, tmp_path / "two", resume=True)
        found = content(tmp_path / "two")
        assert [file for file in expected if expected[file] != found.get(file)] == [], units
        shutil.rmtree(tmp_path / "two")


@pytest.mark.usefixtures("no_reload")
def test_killed_anywhere_and_resumed_ends_bit_identical(source: Path, texts: Path, tmp_path: Path) -> None:
    killed_and_resumed(tmp_path / "runs", recipe=recipe(source, texts, TIE, W4), kills=5)


def test_scores_made_before_serve_a_run(source: Path, texts: Path, tmp_path: Path, no_reload: None) -> None:
    """Tokens that banks are fitted to are sampled again, and are the same."""
    settings = recipe(source, texts, TIE)
    moe_compress.score(settings, tmp_path / "scores")
    moe_compress.run(settings, tmp_path / "one")
    moe_compress.run(settings, tmp_path / "two", scores=tmp_path / "scores")
    one, two = (
        {file: data for file, data in content(tmp_path / folder).items() if file.endswith(".safetensors")}
        for folder in ("one", "two")
    )
    assert one and one == two


def test_tied_layers_say_so(source: Path, texts: Path, tmp_path: Path, no_reload: None) -> None:
    moe_compress.run(recipe(source, texts, TIE, tier="stock"), tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "the memory that tying saves is gone" in text and "layers 1+2" in text
    assert TensorIndex.from_folder(tmp_path / "out").nbytes == TensorIndex.from_folder(source).nbytes


@pytest.mark.parametrize(
    "step",
    [REAM, CONSTANTS, TIE, BUDGET | {"allow_drop": True, "options": [2, 3]}],
    ids=["merge", "prune", "tie", "allow_drop"],
)
def test_what_was_merged_with_its_routers_kept_is_not_merged_again(
    step: dict[str, Any], source: Path, texts: Path, tmp_path: Path, no_reload: None
) -> None:
    moe_compress.run(recipe(source, texts, KEPT), tmp_path / "merged")
    with pytest.raises(UnsupportedModelError, match="needs an expert for every row of the router"):
        moe_compress.run(recipe(tmp_path / "merged", texts, step), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()


def test_a_group_that_does_not_fit_is_refused_before_any_work(source: Path, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lower prelude or coda"):
        moe_compress.run(recipe(source, texts, TIE | {"prelude": 3}), tmp_path / "out")
    with pytest.raises(UsageError, match="do not hold 8 experts"):
        moe_compress.run(recipe(source, texts, REAM | {"max_group_size": 2, "keep": 3}), tmp_path / "out")
    assert not list(tmp_path.iterdir())


MEASURE = """
import gc, sys, psutil, torch, moe_compress
from moe_compress.checkpoint.memory import give_back
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
gc.collect()
before = psutil.Process().memory_info().rss
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32)
for parameter in model.parameters():
    parameter.data = parameter.data.clone()  # no page of a mapped file is left
gc.collect()
give_back()
experts = [layer.mlp.experts for layer in model.model.layers]
print(psutil.Process().memory_info().rss - before, len({e.down_proj.data_ptr() for e in experts}))
"""


def test_a_bank_is_in_memory_once(tmp_path: Path) -> None:
    """Four layers with one bank of 100 MB, with differences and without, take at most 1.1 of what is stored.

    So do four with experts of their own. A small model is loaded before, which leaves what loading itself takes.
    """
    sizes = {"hidden_size": 256, "moe_intermediate_size": 1024, "num_experts": 32, "num_hidden_layers": LAYERS}
    dense = tiny_model(**sizes)
    slots = tuple(range(32))
    models = {"dense": dense}
    for name, ranks in (("tied", {}), ("differences", dict.fromkeys(("gate_proj", "up_proj", "down_proj"), (8,) * 32))):
        shared = {layer: Bank(32, slots, ranks, 0 if layer else None) for layer in range(0 if ranks else 1, LAYERS)}
        models[name] = AutoModelForCausalLM.from_config(banked(dense.config, 32, shared))
    few = {layer: Bank(8, tuple(range(8)), layer=0) for layer in range(1, LAYERS)}
    small = AutoModelForCausalLM.from_config(banked(tiny_model(num_hidden_layers=LAYERS).config, 8, few))
    small.save_pretrained(tmp_path / "small")
    taken = {}
    for name, model in models.items():
        model.to(torch.bfloat16).save_pretrained(tmp_path / name)
        line = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / name)]
        plain = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
        done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False, env=plain)
        assert done.returncode == 0, done.stderr
        taken[name], pointers = map(int, done.stdout.split())
        assert pointers == (LAYERS if name == "dense" else 1)
        once = sum(parameter.numel() for parameter in model.parameters()) * 4
        assert 0.9 * once < taken[name] < 1.1 * once, name


@pytest.mark.parametrize("name", ["differences", "constants", "tie", "tie, 4 bits", "tie, bits by budget"])
def test_layer_by_layer_a_reload_gives_the_same_logits(
    name: str, source: Path, texts: Path, tmp_path: Path, no_reload: None
) -> None:
    """As `verify` does it with checkpoints that are larger than memory; nothing of a layer stays."""
    tier, steps = STEPS[name]
    moe_compress.run(recipe(source, texts, *steps, tier=tier), tmp_path / "out")
    reload.main(tmp_path / "out", str(tmp_path / "found.npy"), "layers")
    with np.load(tmp_path / "out" / "probe.npz") as probe:
        expected = probe["logits"]
    assert np.abs(np.load(tmp_path / "found.npy") - expected).max() < 1e-4 * expected.std()
    config = AutoConfig.from_pretrained(tmp_path / "out")
    model = reload.LayerwiseModel(AutoModelForCausalLM._model_mapping[type(config)], tmp_path / "out", config).model
    with torch.no_grad():
        model.eval()(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    held = [key for key, tensor in model.model.layers.state_dict().items() if not tensor.is_meta]
    assert held == []


def test_saving_a_loaded_model_again_keeps_the_bank_shared(
    source: Path, texts: Path, tmp_path: Path, no_reload: None
) -> None:
    for name, steps in (("dense", [TIE]), ("packed", [TIE, W4])):
        moe_compress.run(recipe(source, texts, *steps), tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        model.save_pretrained(tmp_path / f"{name} again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name} again", dtype=torch.float32)
        tokens = torch.randint(0, 250, (1, 20))
        with torch.no_grad():
            assert torch.equal(model(input_ids=tokens).logits, again(input_ids=tokens).logits)
        one, two = (TensorIndex.from_folder(tmp_path / folder) for folder in (name, f"{name} again"))
        assert one.keys() == two.keys()
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32, dequantize=True)
    leader, follower = (dense.model.layers[index].mlp.experts for index in (1, 2))
    assert leader.down_proj.data_ptr() == follower.down_proj.data_ptr()
    with torch.no_grad():
        torch.testing.assert_close(dense(input_ids=tokens).logits, model(input_ids=tokens).logits, rtol=1e-3, atol=1e-3)


def test_the_tiny_model_has_what_these_tests_need() -> None:
    assert tiny_model().config.num_experts == 8 and tiny_model().config.num_experts_per_tok == 2
