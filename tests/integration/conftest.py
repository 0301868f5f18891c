"""What most of these tests start from: a tiny checkpoint, texts to calibrate on, quick reloads or none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_compress.verification import checks
from tests.fork_server import PLAIN_TRANSFORMERS
from tests.tiny_checkpoint import tiny_checkpoint, write_texts


@pytest.fixture(scope="module")
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with as many layers as the test module's `LAYERS` says."""
    layers = getattr(request.module, "LAYERS", 2)
    return tiny_checkpoint(tmp_path_factory.mktemp("source") / "model", num_hidden_layers=layers)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.txt")


@pytest.fixture(scope="package", autouse=True)
def quick_reload() -> Iterator[None]:
    """Reloads are forks of one process; `subprocess.run` put in its place is the real thing, see `test_verify`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "subprocess", SimpleNamespace(run=PLAIN_TRANSFORMERS.run))
        yield


@pytest.fixture
def no_reload(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the fresh process that loads the result; it has its own tests."""
    monkeypatch.setattr(checks, "check_logits", lambda folder: checks.Check(True, "not computed here."))
