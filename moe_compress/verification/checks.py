"""The five checks that end every run. Each looks at what lies on disk, not at what the run believes it wrote.

1. coverage: every kept expert saw calibration tokens; the ones that did not were dropped, and are listed.
2. bytes: every source tensor was copied (same bytes) or passed through a layer, where what does not belong to an
   expert kept its bytes too; layers shrank by what the plan drops.
3. keys: names, types and shapes on disk are those the new configuration calls for; every file has its recorded hash.
4. logits: a fresh process that cannot import this package loads the folder and gives the same logits.
5. target: the size asked for was reached.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from moe_compress.checkpoint.durable import sha256_of
from moe_compress.checkpoint.index import TensorIndex
from moe_compress.checkpoint.record import Record
from moe_compress.checkpoint.rewrite import LEDGER_FILE, PROBE_FILE, Ledger
from moe_compress.checkpoint.stream import read_tensor
from moe_compress.checkpoint.writer import tensor_sha256
from moe_compress.errors import CheckpointError, MoECompressError, UsageError, VerificationError
from moe_compress.manifest import FORMAT
from moe_compress.models.layers import SECTION
from moe_compress.progress import Progress
from moe_compress.text import listed
from moe_compress.verification.reload import QUANTIZED

MANIFEST_FILE = "manifest.json"
# Largest allowed difference of logits, relative to their spread. Both sides compute in float32 with different kernels.
LOGITS_TOLERANCE = 1e-3
# A model that would hold more than this is reloaded one layer at a time.
WHOLE_MODEL_BYTES = 4 * 10**9
FLOAT32_BYTES = 4
MAX_LISTED = 8


@dataclass(frozen=True)
class Check:
    """One check's outcome, in a sentence."""

    passed: bool
    detail: str


def verify(folder: Path, progress: Progress) -> dict[str, dict[str, Any]]:
    """Run the five checks on a finished checkpoint folder and return their outcomes by name.

    Raises `UsageError` when the folder was not made by this program; a failed check is returned, not raised.
    """
    manifest_file = folder / MANIFEST_FILE
    if not manifest_file.exists():
        raise UsageError(f"{folder} has no {MANIFEST_FILE}: `verify` checks folders that `moe-compress run` made.")
    manifest = load_manifest(folder)
    if not (folder / LEDGER_FILE).exists():
        raise UsageError(f"{folder} has no {LEDGER_FILE}, so nothing says what should be in it; run again.")
    ledger = Ledger.load(folder)
    steps = [Record.from_json(step) for step in manifest["steps"]]
    checks: dict[str, Callable[[], Check]] = {
        "coverage": lambda: check_coverage(steps),
        "bytes": lambda: check_bytes(folder, ledger, steps),
        "keys": lambda: check_keys(folder, ledger, manifest),
        "logits": lambda: check_logits(folder),
        "target": lambda: check_target(steps, manifest["stored_bytes"], TensorIndex.from_folder(folder)),
    }
    outcome = {}
    # Hashing and reloading read the same files, so they run side by side and the disk is read once.
    with progress.stage("verify", len(checks), "check") as stage, ThreadPoolExecutor(len(checks)) as threads:
        running = {name: threads.submit(_outcome, check) for name, check in checks.items()}
        for name, future in running.items():
            outcome[name] = asdict(future.result())
            stage.advance(name)
    return outcome


def load_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in `folder`; `CheckpointError` when it is damaged, or none that this version wrote."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        whole = isinstance(manifest["steps"], list) and isinstance(manifest["files"], dict)
        whole = whole and manifest["format"] == FORMAT and {"identity", "stored_bytes"} <= set(manifest)
        for step in manifest["steps"]:
            Record.from_json(step)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise CheckpointError(
            f"{folder / MANIFEST_FILE} is damaged, or was written by another version or program; run again."
        )
    return manifest  # type: ignore[no-any-return]


def _outcome(check: Callable[[], Check]) -> Check:
    """What the check found; a folder so broken that it cannot be looked at fails."""
    try:
        return check()
    except (MoECompressError, OSError) as error:
        return Check(False, str(error))


def raise_on_failure(checks: dict[str, dict[str, Any]]) -> None:
    """Raise `VerificationError` naming every failed check."""
    failed = [f"{name} ({check['detail']})" for name, check in checks.items() if not check["passed"]]
    if failed:
        raise VerificationError(f"Verification failed: {'; '.join(failed)}", checks)


def check_coverage(steps: Sequence[Record]) -> Check:
    """Every kept expert saw at least the asked number of calibration tokens, or was handled in a way that is named."""
    kept, dropped, pooled = (
        [f"layer {layer} expert {expert}" for step in steps for layer, expert in getattr(step, group)]
        for group in ("starved_kept", "starved_dropped", "pooled")
    )
    if kept:
        return Check(
            False,
            f"kept without enough calibration tokens: {listed(kept, MAX_LISTED)}; raise calibration.num_samples, or "
            "lower calibration.min_tokens_per_expert.",
        )
    named = []
    if pooled:
        named.append(f"statistics pooled over their layer, for want of tokens: {listed(pooled, MAX_LISTED)}")
    if dropped:
        named.append(f"dropped because too few calibration tokens reached them: {listed(dropped, MAX_LISTED)}")
    if named:
        return Check(True, f"{'; '.join(named)}.")
    fewest = [found for step in steps if (found := step.coverage.get("fewest_tokens_per_expert")) is not None]
    if 0 in fewest:
        return Check(True, "experts that saw no calibration tokens were allowed, and there are some.")
    return Check(True, "every expert saw calibration tokens." if fewest else "no step measured single experts.")


def require_coverage(step: Record) -> None:
    """Raise `VerificationError` when what this step is about to write would fail the check `coverage`."""
    raise_on_failure({"coverage": asdict(check_coverage([step]))})


def check_bytes(folder: Path, ledger: Ledger, steps: Sequence[Record]) -> Check:
    """Nothing lost, nothing invented: bytes add up, and copied tensors are the same bytes."""
    index = TensorIndex.from_folder(folder)
    same = ledger.copied | ledger.unchanged
    lost = [name for name in same if name not in index]
    if lost:
        return Check(False, f"`{lost[0]}` was to be copied and is not there ({len(lost)} such tensors).")
    changed = [name for name, digest in same.items() if tensor_sha256(index[name]) != digest]
    if changed:
        return Check(False, f"`{changed[0]}` was to be copied and has other bytes ({len(changed)} such tensors).")
    dropped = sum(step.dropped_bytes for step in steps[-1:])
    if ledger.source_bytes - dropped != index.nbytes:
        return Check(
            False, f"{ledger.source_bytes:,} bytes less {dropped:,} dropped by the plan are not {index.nbytes:,}."
        )
    change = f"- {dropped:,} dropped" if dropped >= 0 else f"+ {-dropped:,} added"
    parts = f"{len(ledger.copied)} tensors copied, {len(ledger.transformed)} through the layers, "
    parts += f"{len(ledger.unchanged)} of these unchanged"
    return Check(True, f"{parts}; {ledger.source_bytes:,} {change} = {index.nbytes:,} bytes.")


def check_keys(folder: Path, ledger: Ledger, manifest: dict[str, Any]) -> Check:
    """The tensors on disk are the expected ones, and all files are as they were written."""
    index = TensorIndex.from_folder(folder)
    found = {name: (info.dtype, info.shape) for name, info in index.items()}
    for name in sorted(set(ledger.expected) ^ set(found)):
        return Check(False, f"`{name}` is {'missing' if name in ledger.expected else 'not expected'}.")
    for name, entry in ledger.expected.items():
        if found[name] != entry:
            return Check(False, f"`{name}` is {found[name]}, expected {entry}.")
    for name, digest in manifest["files"].items():
        if not (folder / name).is_file():
            return Check(False, f"{name} is missing.")
        if sha256_of(folder / name) != digest:
            return Check(False, f"{name} is not as it was written (its sha256 differs from the recorded one).")
    return Check(
        True, f"{len(found)} tensors in {len(ledger.shards)} shards, names, types, shapes and hashes as expected."
    )


def check_logits(folder: Path) -> Check:
    """A fresh process gives the logits of the apply sweep; with plain transformers, unless the tier is `plugin`."""
    try:
        plugin = SECTION in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        return Check(False, "config.json is damaged.")
    try:
        with np.load(folder / PROBE_FILE) as probe:
            expected = probe["logits"].astype(np.float64)
    except (ValueError, KeyError, EOFError, BadZipFile):
        return Check(False, f"{PROBE_FILE} is damaged.")
    reload = Path(__file__).with_name("reload.py").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="moe-compress-") as scratch:
        output = Path(scratch) / "logits.npy"
        begin = "import moe_compress\n" if plugin else "import sys; sys.modules['moe_compress'] = None\n"
        held = held_bytes(TensorIndex.from_folder(folder), packed=plugin)
        mode = "whole" if held <= WHOLE_MODEL_BYTES else "layers"
        command = [sys.executable, "-c", begin + reload, str(folder.absolute()), str(output), mode]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        finished = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=scratch)
        if finished.returncode != 0:
            reason = (finished.stderr.strip().splitlines() or ["no message"])[-1]
            return Check(False, f"{'' if plugin else 'plain '}transformers could not load the folder: {reason}")
        found = np.load(output).astype(np.float64)
    if not np.isfinite(found).all():
        return Check(False, "the reloaded model gives logits that are not finite.")
    difference = np.abs(found - expected).max() / expected.std()
    detail = f"largest difference {difference:.1e} of the logits' spread (allowed {LOGITS_TOLERANCE:.0e})."
    return Check(bool(difference <= LOGITS_TOLERANCE), detail)


def held_bytes(index: TensorIndex, *, packed: bool) -> int:
    """Memory that a checkpoint's weights take when it is loaded in float32.

    With `packed` quantized weights stay as they are stored, but for one matrix; else the loader unpacks all of them.
    """
    held = largest = 0
    for name, info in index.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in QUANTIZED:
            held += FLOAT32_BYTES * info.numel
        elif packed:
            held += info.nbytes
            largest = max(largest, info.nbytes)
        elif leaf == "weight_packed" and f"{module}.weight_shape" in index:
            held += FLOAT32_BYTES * math.prod(read_tensor(index[f"{module}.weight_shape"]).tolist())
    return held + 8 * FLOAT32_BYTES * largest  # of one bit each, at most


def check_target(steps: Sequence[Record], stored_bytes: int, index: TensorIndex) -> Check:
    """Every step reached what it was asked for, and the bytes are those that the plans lead to."""
    sentences = []
    for step in steps:
        targets = [
            replace(target, achieved=index.nbytes) if target.on_disk and step is steps[-1] else target
            for target in step.targets
        ]
        sentences.append(f"{step.op}: {', '.join(map(str, targets)) or 'no figure was asked for'}")
        if not all(target.is_met for target in targets):
            return Check(False, f"{sentences[-1]}.")
    if index.nbytes != stored_bytes:
        return Check(False, f"{index.nbytes:,} bytes are stored, the plan says {stored_bytes:,}.")
    return Check(True, "; ".join(sentences) + "." if sentences else "no step set a target.")
