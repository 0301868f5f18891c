"""The reload of `verify` one layer at a time: every kind of checkpoint passes, and a flipped bit in it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_compress
from moe_compress.checkpoint.index import TensorIndex
from moe_compress.verification import checks
from moe_compress.verification.reload import QUANTIZED
from tests.tiny_checkpoint import tiny_checkpoint, tiny_recipe, write_texts

LAYERS = 4
W4 = {"op": "quantize", "method": "rtn", "bits": 4, "group_size": 16, "attention": {"bits": 8}}
TIE = {"op": "tie", "group_size": 2, "prelude": 1, "coda": 0, "fit": "closed_form", "match": "weights"}
SKIPPED = checks.Check(True, "not computed here.")
STEPS: dict[str, tuple[str, list[dict[str, Any]], str]] = {  # tier, steps, a tensor that every token meets
    "stock": ("stock", [W4], "model.layers.1.self_attn.v_proj.weight_packed"),
    "plugin": ("plugin", [W4 | {"symmetric": False, "embeddings": {}}], "lm_head.weight_packed"),
    "nf4": ("plugin", [{"op": "quantize", "method": "nf4", "attention": {}}], "self_attn.v_proj.weight_absmax"),
    "tied": ("plugin", [TIE], "model.layers.1.mlp.gate.weight"),
    "tied and packed": ("plugin", [TIE, W4], "model.layers.1.self_attn.v_proj.weight_packed"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return tiny_checkpoint(folder / "model", num_hidden_layers=LAYERS), write_texts(folder / "texts.txt")


@pytest.fixture(scope="module", params=STEPS)
def made(request: pytest.FixtureRequest, inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run made; its own reload is left out."""
    tier, steps, _ = STEPS[request.param]
    out = tmp_path_factory.mktemp("made") / request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "check_logits", lambda folder: SKIPPED)
        settings = tiny_recipe(*inputs, export={"tier": tier, "max_shard_size": "20KB"}) | {"steps": steps}
        moe_compress.run(settings, out)
    return out


def test_every_layer_in_its_turn(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    original = checks.subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        modes.append(command[-1])
        return original(command, **options)

    monkeypatch.setattr(checks.subprocess, "run", run)
    monkeypatch.setattr(checks, "WHOLE_MODEL_BYTES", 0)
    found = checks.check_logits(made)
    assert found.passed, found.detail
    suffix = STEPS[made.name][2]
    index = TensorIndex.from_folder(made)
    info = next(index[name] for name in sorted(index) if name.endswith(suffix))
    before = info.file.read_bytes()
    middle = info.start + info.nbytes // 2
    damaged = bytearray(before)
    for place in range(middle, min(middle + 64, info.start + info.nbytes)):
        damaged[place] ^= 0x55
    info.file.write_bytes(damaged)
    try:
        found = checks.check_logits(made)
    finally:
        info.file.write_bytes(before)
    assert not found.passed and ("of the logits' spread" in found.detail or "not finite" in found.detail)
    assert modes == ["layers", "layers"]


def test_what_the_reloaded_process_will_hold(made: Path, inputs: tuple[Path, Path]) -> None:
    """All weights in float32, or packed ones as they are stored and one matrix unpacked."""
    index = TensorIndex.from_folder(made)
    plugin = "moe_compress" in json.loads((made / "config.json").read_text())
    held = checks.held_bytes(index, packed=plugin)
    if not plugin:  # four bytes for every weight of the original
        assert held == 4 * sum(info.numel for info in TensorIndex.from_folder(inputs[0]).values())
        return
    packed = {name: info for name, info in index.items() if name.rpartition(".")[2] in QUANTIZED}
    plain = sum(4 * info.numel for name, info in index.items() if name not in packed)
    stored = sum(info.nbytes for info in packed.values())
    assert bool(packed) == (made.name != "tied")
    assert plain + stored <= held <= plain + stored + 32 * max((info.nbytes for info in packed.values()), default=0)


@pytest.mark.parametrize("made", ["tied and packed"], indirect=True)
def test_a_fork_of_the_server_is_a_process_of_its_own(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives the bits that a process begun for the reload gives, in the tier `plugin` too, and fails alike."""
    forked, logits = checks.subprocess.run, []
    for begin in (subprocess.run, forked):

        def run(command: list[str], begin: Any = begin, **options: Any) -> Any:
            done = begin(command, **options)
            logits.append(np.load(command[-2]))
            return done

        monkeypatch.setattr(checks.subprocess, "run", run)
        assert checks.check_logits(made).passed
    np.testing.assert_array_equal(*logits)
    for program, status, said in (
        ("import sys; print('bye'); sys.exit(3)", 3, "bye"),
        ("import sys; sys.exit('no model')", 1, "no model"),
        ("raise ValueError('no such model')", 1, "ValueError: no such model"),
        ("import os, sys; print(os.environ['WHAT'], os.getcwd(), *sys.argv, 'moe_compress' in sys.modules)", 0,
         f"this {tmp_path} -c one False"),
    ):  # fmt: skip
        done = forked([sys.executable, "-c", program, "one"], env={"WHAT": "this"}, cwd=tmp_path)
        assert (done.returncode, (done.stdout + done.stderr).splitlines()[-1]) == (status, said)
