"""What most of these tests start from: a tiny checkpoint, texts to calibrate on, no reload in a fresh process."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_compress.verification import checks
from tests.tiny_checkpoint import tiny_checkpoint, write_texts


@pytest.fixture(scope="module")
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with as many layers as the test module's `LAYERS` says."""
    layers = getattr(request.module, "LAYERS", 2)
    return tiny_checkpoint(tmp_path_factory.mktemp("source") / "model", num_hidden_layers=layers)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.txt")


@pytest.fixture
def no_reload(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the fresh process that loads the result; it takes longer than all the rest, and has its own tests."""
    monkeypatch.setattr(checks, "check_logits", lambda folder: checks.Check(True, "not computed here."))
