"""What a plan predicts, from a config.json alone, against what the run takes: bytes within 1 %, memory within 25 %."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import moe_compress
from benchmarks.plan_accuracy import compare, make_wide
from moe_compress.checkpoint.source import REFERENCE

# A user's process, not one that was told to keep what it frees.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | {
    "PYTHONPATH": str(Path(moe_compress.__file__).parents[1])
}
FEW = ["eval.speed=false", "calibration.num_samples=32", "calibration.batch_size=4"]


@pytest.mark.parametrize("model, recipe", [("reference", "w4-stock"), ("wide", "prune-reap-25")])
def test_predictions(model: str, recipe: str, tmp_path: Path) -> None:
    place = REFERENCE
    if model == "wide":
        place = tmp_path / "wide"
        make_wide(place)
    few = [*FEW, "calibration.min_tokens_per_expert=0"] if recipe.startswith("prune") else FEW
    found = compare(recipe, place, tmp_path, few, ENVIRONMENT)
    assert found["stored_bytes"]["ratio"] == pytest.approx(1, abs=0.01)
    assert found["peak_process_bytes"]["ratio"] == pytest.approx(1, abs=0.25)
    assert found["peak_host_bytes"]["ratio"] == pytest.approx(1, abs=0.25)
    # The wide model's layers are more than the program itself, or this would only say that the program is there.
    assert model == "reference" or found["peak_process_bytes"]["measured"] > 800e6
