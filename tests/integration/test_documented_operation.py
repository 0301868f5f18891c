"""The transformation that `docs/adding-a-transformation.md` writes works as it stands there."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moe_compress.compress
from moe_compress.calibrate.config import CalibrationConfig
from moe_compress.calibrate.scores import Scores
from moe_compress.checkpoint.rewrite import Ledger
from moe_compress.checkpoint.source import open_checkpoint
from moe_compress.compress.operation import Outlook
from moe_compress.compress.surroundings import Surroundings
from moe_compress.errors import UsageError
from moe_compress.progress import SilentProgress
from moe_compress.recipe import OperationSettings
from moe_compress.steps import load_record, run_step
from moe_compress.verification.checks import check_bytes, check_coverage, check_logits
from tests.tiny_checkpoint import tiny_checkpoint

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-transformation.md"
FILES = re.compile(r"^```python\n# moe_compress/compress/reorder/(\w+\.py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def reorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that imports a module of the operation on the page."""
    folder = tmp_path / "code" / "reorder"
    folder.mkdir(parents=True)
    files = dict(FILES.findall(PAGE.read_text(encoding="utf-8")))
    assert set(files) == {"config.py", "plan.py", "apply.py", "step.py"}
    for name, text in {"__init__.py": "", **files}.items():
        (folder / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(moe_compress.compress, "__path__", [*moe_compress.compress.__path__, str(folder.parent)])
    yield lambda name: importlib.import_module(f"moe_compress.compress.reorder.{name}")
    for name in [name for name in sys.modules if name.startswith("moe_compress.compress.reorder")]:
        del sys.modules[name]
    vars(moe_compress.compress).pop("reorder", None)


def test_the_documented_operation_reorders_and_changes_no_logit(tmp_path: Path, reorder: Any) -> None:
    config = reorder("config")
    rules = {*OperationSettings.__annotations__, *(name for name in vars(OperationSettings) if name[0] != "_")}
    assert rules and all(hasattr(config, name) for name in rules)
    step = reorder("step").ReorderStep(config.ReorderConfig(op="reorder"))
    source = open_checkpoint(str(tiny_checkpoint(tmp_path / "model", dtype=torch.float32)))
    around = Surroundings(
        CalibrationConfig(dataset="reference", num_samples=2, sequence_length=64), 10**9, "cpu", SilentProgress()
    )
    found = run_step(step, source, tmp_path / "step", around, "reorder")

    scores = Scores.load(tmp_path / "step" / "scores")
    before, after = (
        AutoModelForCausalLM.from_pretrained(one.folder, dtype=torch.float32).eval() for one in (source, found)
    )
    for layer in scores.layers:
        tokens = layer.statistics["tokens"].tolist()
        order = sorted(range(layer.num_experts), key=lambda expert: (-tokens[expert], expert))
        assert order != list(range(layer.num_experts)), "else this shows nothing"
        blocks = [model.model.layers[layer.layer].mlp for model in (before, after)]
        for name, tensor in blocks[1].state_dict().items():
            assert torch.equal(tensor, blocks[0].state_dict()[name][order]), name
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(after(ids).logits, before(ids).logits, rtol=1e-4, atol=1e-5)

    record = load_record(tmp_path / "step")
    checks = [check_coverage([record]), check_bytes(found.folder, Ledger.load(found.folder), [record])]
    assert all(check.passed for check in [*checks, check_logits(found.folder)])


def test_the_documented_operation_says_what_it_will_do(tmp_path: Path, reorder: Any) -> None:
    step = reorder("step").ReorderStep(reorder("config").ReorderConfig(op="reorder", by="gate_sum"))
    source = open_checkpoint(str(tiny_checkpoint(tmp_path / "model")))
    entry, after = step.preview(before := Outlook(source.config, 1000, 100), "stock")
    assert entry["op"] == "reorder" and entry["summary"] and after is before
    source.config.n_group = 2
    with pytest.raises(UsageError, match="routing groups"):
        step.preview(before, "stock")
