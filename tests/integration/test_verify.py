"""The five checks of `verify`: each passes on the untouched folder, and each fails on what only it can see."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import moe_compress
from moe_compress.checkpoint.durable import sha256_of
from moe_compress.checkpoint.index import TensorIndex
from moe_compress.checkpoint.record import Record
from moe_compress.cli import app
from moe_compress.compress.prune.step import PruneStep
from moe_compress.errors import CheckpointError, UsageError, VerificationError
from moe_compress.manifest import file_hashes
from moe_compress.progress import SilentProgress
from moe_compress.verification import checks
from tests.tiny_checkpoint import tiny_checkpoint, tiny_recipe, write_texts

ROOT = Path(__file__).parents[2]
ROUTER, EMBEDDINGS = "model.layers.1.mlp.gate.weight", "model.embed_tokens.weight"
SKIPPED = checks.Check(True, "not computed here.")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and texts."""
    folder = tmp_path_factory.mktemp("inputs")
    return tiny_checkpoint(folder / "model"), write_texts(folder / "texts.txt")


@pytest.fixture(scope="module")
def made(inputs: tuple[Path, Path]) -> Path:
    """What a run made; its reload is left to the tests that are about it."""
    out = inputs[0].parent / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "check_logits", lambda folder: SKIPPED)
        moe_compress.run(tiny_recipe(*inputs, 0.75), out)
    return out


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "out"))


@pytest.fixture
def no_reload(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the fresh process out."""
    monkeypatch.setattr(checks, "check_logits", lambda folder: SKIPPED)


def failed(folder: Path) -> dict[str, str]:
    """The checks that fail, with what they say."""
    found = checks.verify(folder, SilentProgress())
    assert list(found) == ["coverage", "bytes", "keys", "logits", "target"]
    return {name: check["detail"] for name, check in found.items() if not check["passed"]}


def recorded(folder: Path, file: Path) -> None:
    """Make the records say that the shard is as it is now."""
    ledger_of(folder, file)
    manifest_of(folder, lambda manifest: manifest.update(files=file_hashes(folder)))


def ledger_of(folder: Path, file: Path) -> None:
    ledger = json.loads((folder / "ledger.json").read_text())
    (shard,) = (shard for shard in ledger["shards"] if shard["file"] == file.name)
    shard |= {"sha256": sha256_of(file), "nbytes": file.stat().st_size}
    (folder / "ledger.json").write_text(json.dumps(ledger))


def change(folder: Path, name: str, function: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the 16-bit words of one tensor in its place; all records follow."""
    info = TensorIndex.from_folder(folder)[name]
    words = np.fromfile(info.file, dtype=np.uint16, count=info.numel, offset=info.start).reshape(info.shape)
    with info.file.open("r+b") as stream:
        stream.seek(info.start)
        stream.write(np.ascontiguousarray(function(words)).tobytes())
    recorded(folder, info.file)


def change_shard(folder: Path, name: str, function: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite the shard that holds a tensor; index and records follow."""
    file = TensorIndex.from_folder(folder)[name].file
    tensors = load_file(file)
    before = set(tensors)
    function(tensors)
    save_file(tensors, file, {"format": "pt"})
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    for gone in before - set(tensors):
        del index["weight_map"][gone]
    index["weight_map"] |= dict.fromkeys(tensors, file.name)
    index_file.write_text(json.dumps(index))
    recorded(folder, file)


def manifest_of(folder: Path, function: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    function(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


# ------------------------------------------------------------------------------------------- untouched, and the reload


def test_untouched_folder_passes_and_the_reload_never_sees_this_package(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[list[str], dict[str, Any]]] = []
    original = subprocess.run
    nothing_of_it = (
        "\nassert sys.modules['moe_compress'] is None"
        "\nassert not [name for name in sys.modules if name.startswith('moe_compress.')]"
    )

    def run(command: list[str], **options: Any) -> Any:
        calls.append((command, options))
        return original([*command[:2], command[2] + nothing_of_it, *command[3:]], **options)

    monkeypatch.setattr(checks.subprocess, "run", run)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert failed(out) == {}
    ((command, options),) = calls
    reload = Path(checks.__file__).with_name("reload.py").read_text()
    assert command[:2] == [sys.executable, "-c"] and command[2].endswith(reload)
    assert "moe_compress" not in reload
    blocked = command[2].removesuffix(reload)
    codes = {}
    for name, code in {"blocked": blocked, "open": ""}.items():
        tried = original([*command[:2], f"{code}import moe_compress"], **options | {"cwd": out})
        codes[name] = tried.returncode, tried.stderr.splitlines()[-1:]
    assert codes["open"] == (0, []), "without the block it could be imported there"
    assert codes["blocked"][0] == 1 and "ModuleNotFoundError: import of moe_compress halted" in codes["blocked"][1][0]


def test_wrong_router_row_is_seen_by_the_logits_alone(out: Path) -> None:
    """Two experts change places in the router, and every name, shape, byte count and hash is right."""
    change(out, ROUTER, lambda rows: rows[[1, 0, *range(2, len(rows))]])
    found = failed(out)
    assert list(found) == ["logits"] and "largest difference" in found["logits"]


def reloaded(
    monkeypatch: pytest.MonkeyPatch, folder: Path, logits: Callable[[np.ndarray], np.ndarray] | None, message: str = ""
) -> checks.Check:
    """The check's answer when the fresh process gives these logits, or ends with this message."""

    def run(command: list[str], **options: Any) -> Any:
        if logits is not None:
            with np.load(folder / "probe.npz") as probe:
                np.save(next(word for word in command if word.endswith("logits.npy")), logits(probe["logits"]))
        return subprocess.CompletedProcess(command, int(logits is None), "", message)

    with monkeypatch.context() as patch:
        patch.setattr(checks.subprocess, "run", run)
        return checks.check_logits(folder)


def test_how_far_logits_may_differ(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(by: float) -> Callable[[np.ndarray], np.ndarray]:
        def shift(logits: np.ndarray) -> np.ndarray:
            moved = logits.astype(np.float64)
            moved[-1, -1] += by * logits.std()
            return moved

        return shift

    assert reloaded(monkeypatch, out, shifted(0.0)).passed
    assert reloaded(monkeypatch, out, shifted(0.9 * checks.LOGITS_TOLERANCE)).passed
    assert not reloaded(monkeypatch, out, shifted(1.1 * checks.LOGITS_TOLERANCE)).passed
    assert not reloaded(monkeypatch, out, shifted(-1.1 * checks.LOGITS_TOLERANCE)).passed
    broken = reloaded(monkeypatch, out, shifted(float("nan")))
    assert not broken.passed and "not finite" in broken.detail
    refused = reloaded(monkeypatch, out, None, "Traceback\n  File\nValueError: no such model\n")
    assert not refused.passed and refused.detail.endswith("ValueError: no such model")


def test_reload_fails_where_plain_transformers_fails(out: Path) -> None:
    """Really in a fresh process: the configuration promises more experts than there are."""
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"num_local_experts": 8}))
    found = checks.check_logits(out)
    assert not found.passed and "could not load" in found.detail


# ------------------------------------------------------------------------------------------------------ bytes and keys


@pytest.mark.usefixtures("no_reload")
def test_flipped_byte_in_any_shard(made: Path, tmp_path: Path) -> None:
    shards = sorted(made.glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        out = Path(shutil.copytree(made, tmp_path / shard.stem))
        info = min(
            (i for i in TensorIndex.from_folder(out).values() if i.file.name == shard.name), key=lambda i: i.start
        )
        with info.file.open("r+b") as stream:
            stream.seek(info.start)
            byte = stream.read(1)[0]
            stream.seek(info.start)
            stream.write(bytes([byte ^ 1]))
        found = failed(out)
        ledger = json.loads((out / "ledger.json").read_text())
        same = info.name in ledger["copied"] | ledger["unchanged"]
        assert set(found) == ({"keys", "bytes"} if same else {"keys"})
        assert shard.name in found["keys"] and "sha256" in found["keys"]


@pytest.mark.usefixtures("no_reload")
@pytest.mark.parametrize("name", [EMBEDDINGS, ROUTER, "model.layers.0.mlp.experts.3.up_proj.weight"])
def test_dropped_tensor(name: str, out: Path) -> None:
    change_shard(out, name, lambda tensors: tensors.pop(name))
    found = failed(out)
    assert set(found) == {"bytes", "keys", "target"}
    assert found["keys"] == f"`{name}` is missing."
    if name == EMBEDDINGS:
        assert f"`{name}` was to be copied and is not there" in found["bytes"]


@pytest.mark.usefixtures("no_reload")
def test_dropped_from_the_shard_but_not_from_the_index(out: Path) -> None:
    index = (out / "model.safetensors.index.json").read_bytes()
    change_shard(out, ROUTER, lambda tensors: tensors.pop(ROUTER))
    (out / "model.safetensors.index.json").write_bytes(index)
    found = failed(out)
    assert set(found) == {"bytes", "keys", "target"} and all(ROUTER in detail for detail in found.values())


@pytest.mark.usefixtures("no_reload")
def test_invented_tensor(out: Path) -> None:
    change_shard(out, ROUTER, lambda tensors: tensors.update(extra=torch.zeros(2, dtype=torch.bfloat16)))
    found = failed(out)
    assert set(found) == {"bytes", "keys", "target"} and found["keys"] == "`extra` is not expected."


@pytest.mark.usefixtures("no_reload")
def test_changed_copy_is_seen_by_the_bytes_alone(out: Path) -> None:
    change(out, EMBEDDINGS, lambda words: words ^ 1)
    found = failed(out)
    assert set(found) == {"bytes"} and f"`{EMBEDDINGS}` was to be copied and has other bytes" in found["bytes"]


@pytest.mark.usefixtures("no_reload")
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.layers.0.input_layernorm.weight"])
def test_change_of_what_a_layer_was_to_hand_through(name: str, out: Path) -> None:
    """Not the experts and not the router: a prune has no business with it."""
    change(out, name, lambda words: words ^ 1)
    found = failed(out)
    assert set(found) == {"bytes"} and f"`{name}` was to be copied and has other bytes" in found["bytes"]


@pytest.mark.usefixtures("no_reload")
def test_same_bytes_of_another_type_or_shape(out: Path) -> None:
    change_shard(out, ROUTER, lambda tensors: tensors.update({ROUTER: tensors[ROUTER].view(torch.float16)}))
    assert set(failed(out)) == {"keys"}
    change_shard(
        out, ROUTER, lambda tensors: tensors.update({ROUTER: tensors[ROUTER].view(torch.bfloat16).reshape(3, -1)})
    )
    assert set(failed(out)) == {"keys"}


@pytest.mark.usefixtures("no_reload")
def test_missing_shard(out: Path) -> None:
    shard = sorted(out.glob("*.safetensors"))[-1]
    shard.unlink()
    found = failed(out)
    assert set(found) == {"bytes", "keys", "target"} and all("is missing" in detail for detail in found.values())


# ------------------------------------------------------------------------------------------------- coverage and target


@pytest.mark.usefixtures("no_reload")
def test_kept_expert_that_saw_no_token(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Two tokens reach four of eight experts at most; six are kept."""
    calibration = {"dataset": str(inputs[1]), "num_samples": 1, "sequence_length": 2}
    out = tmp_path / "out"
    with pytest.raises(VerificationError, match="coverage") as caught:
        moe_compress.run(tiny_recipe(*inputs, 0.75, calibration=calibration), out)
    assert caught.value.exit_code == 3 and not out.exists()
    assert [name for name, check in caught.value.checks.items() if not check["passed"]] == ["coverage"]
    work = tmp_path / "out.work" / "step-0"
    scores = json.loads((work / "scores" / "scores.json").read_text())
    plan = json.loads((work / "plan.json").read_text())
    kept = [
        f"layer {layer} expert {expert}"
        for layer, expert in scores["starved"]
        if expert in plan["layers"][layer]["keep"]
    ]
    assert kept and all(name in str(caught.value) for name in kept)
    assert not (work / "checkpoint").exists(), "it is known before the checkpoint is written"


@pytest.mark.usefixtures("no_reload")
def test_dropped_expert_that_saw_no_token_is_listed(out: Path) -> None:
    def starve(manifest: dict[str, Any]) -> None:
        manifest["steps"][0]["starved_dropped"] = [[1, 7]]

    manifest_of(out, starve)
    found = checks.verify(out, SilentProgress())["coverage"]
    assert found["passed"] and "layer 1 expert" in found["detail"]


@pytest.mark.parametrize(
    ("coverage", "said"),
    [
        ([{}], "no step measured single experts."),
        ([{"fewest_tokens_per_expert": 3}, {}], "every expert saw calibration tokens."),
        ([{"fewest_tokens_per_expert": 3}, {"fewest_tokens_per_expert": 0}], "that saw no calibration tokens were"),
    ],
)
def test_what_is_said_of_coverage_is_so(coverage: list[dict[str, int]], said: str) -> None:
    check = checks.check_coverage([Record("prune", {}, "reap", 0, coverage=found) for found in coverage])
    assert check.passed and said in check.detail


def test_missed_target(inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that keeps seven experts where the recipe asked for six."""
    original = PruneStep.plan

    def too_many(step: PruneStep, *args: Any) -> Any:
        return replace(original(PruneStep(step.config.model_copy(update={"keep": 7})), *args), config=step.config)

    monkeypatch.setattr(PruneStep, "plan", too_many)
    monkeypatch.setattr(checks, "check_logits", lambda folder: SKIPPED)
    out = tmp_path / "out"
    with pytest.raises(VerificationError) as caught:
        moe_compress.run(tiny_recipe(*inputs, 0.75), out)
    failures = [name for name, check in caught.value.checks.items() if not check["passed"]]
    assert failures == ["target"] and "share of experts kept 87.5% (asked: 75.0%)" in str(caught.value)
    assert not out.exists() and (tmp_path / "out.work").exists()


@pytest.mark.usefixtures("no_reload")
def test_size_that_the_plan_did_not_promise(out: Path) -> None:
    manifest_of(out, lambda manifest: manifest.update(stored_bytes=manifest["stored_bytes"] + 2))
    found = failed(out)
    assert set(found) == {"target"} and "the plan says" in found["target"]


# ---------------------------------------------------------------------------------------------- the verb, other folders


@pytest.mark.usefixtures("no_reload")
def test_command(out: Path) -> None:
    done = CliRunner().invoke(app, ["verify", str(out)])
    assert done.exit_code == 0 and done.stdout.count("passed") == 5
    change(out, EMBEDDINGS, lambda words: words ^ 1)
    done = CliRunner().invoke(app, ["verify", str(out)])
    assert done.exit_code == 3 and "FAILED" in done.stdout and done.stdout.count("passed") == 4
    progress, message = done.stderr.splitlines()
    assert progress.startswith("[verify] check 5/5") and message.startswith("error: Verification failed: bytes (")


@pytest.mark.usefixtures("no_reload")
@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "generation_config.json",
        "recipe.yaml",
        "report.json",
        "plan.json",
        "experts.json",
        "ledger.json",
    ],
)
def test_any_file_that_is_gone_or_changed(name: str, made: Path, out: Path) -> None:
    text = (out / name).read_text()
    (out / name).write_text(text + "\n")
    found = failed(out)
    assert set(found) == {"keys"} and found["keys"].startswith(f"{name} is not as it was written")
    if name != "ledger.json":
        (out / name).unlink()
        assert failed(out) == {"keys": f"{name} is missing."}


@pytest.mark.usefixtures("no_reload")
def test_the_card_is_its_owners_to_edit(out: Path) -> None:
    (out / "README.md").write_text("# Mine\n")
    assert failed(out) == {}


@pytest.mark.parametrize("name", ["manifest.json", "ledger.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1, "tool": "another program", "steps": {}}'])
def test_damaged_or_foreign_records(name: str, text: str, out: Path) -> None:
    (out / name).write_text(text)
    with pytest.raises(CheckpointError, match=f"{name} is damaged, or was written by another"):
        moe_compress.verify(out)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"\0" * 100])
def test_damaged_probe_or_config(content: bytes, out: Path) -> None:
    (out / "probe.npz").write_bytes(content)
    assert failed(out)["logits"] == "probe.npz is damaged."
    (out / "config.json").write_bytes(content)
    assert failed(out)["logits"] == "config.json is damaged."


@pytest.mark.parametrize("name", ["manifest.json", "ledger.json"])
def test_folder_without_records(name: str, out: Path) -> None:
    (out / name).unlink()
    with pytest.raises(UsageError, match=name):
        moe_compress.verify(out)


def test_folder_without_its_probe(out: Path) -> None:
    (out / "probe.npz").unlink()
    found = failed(out)
    assert set(found) == {"keys", "logits"} and "probe.npz" in found["logits"]


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        moe_compress.verify(tmp_path / "absent")


def test_verify_changes_nothing(out: Path, no_reload: None) -> None:
    def state() -> dict[str, tuple[int, int]]:
        return {entry.name: (entry.stat().st_mtime_ns, entry.stat().st_size) for entry in os.scandir(out)}

    before = state()
    moe_compress.verify(out)
    assert state() == before
