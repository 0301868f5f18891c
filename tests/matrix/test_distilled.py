"""Every family is distilled, as a whole and layer by layer; what was trained must be what plain transformers loads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from moe_compress.checkpoint.rewrite import rewrite
from moe_compress.checkpoint.source import Checkpoint, open_checkpoint
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.compress.distill import parts
from moe_compress.compress.distill.apply import DistillChange, Readers
from moe_compress.compress.distill.config import DistillConfig
from moe_compress.compress.distill.layerwise import heal_layers, trained_readers
from moe_compress.compress.distill.state import parameter_readers
from moe_compress.compress.distill.train import Job, train
from moe_compress.models.skeleton import build_skeleton
from moe_compress.progress import SilentProgress
from tests.matrix.case import load_eager, probe_error
from tests.matrix.families import FAMILIES, NUM_LAYERS, save, tiny_config, tiny_model

TOLERANCE = 1e-4  # of logits, relative to their spread
TOKENS = torch.randint(3, 100, (4, 24), generator=torch.Generator().manual_seed(1))
SETTINGS: dict[str, Any] = {"op": "distill", "batch_size": 2, "micro_batch_size": 2, "learning_rate": 3e-3, "epochs": 4}


class Case:
    """One family's checkpoint, and a student: the same with noise on every tensor."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        model = tiny_model(tiny_config(name))
        save(model, folder / "teacher")
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((0.2 * parameter.std(correction=0) * noise).to(parameter.dtype))
        save(model, folder / "student")
        self.teacher, self.student = (open_checkpoint(str(folder / name)) for name in ("teacher", "student"))

    def load(self, name: str) -> PreTrainedModel:
        return load_eager(self.name, self.folder / name)

    def written(self, name: str, trained: Readers) -> PreTrainedModel:
        """The student with what was trained, loaded by plain transformers, after looking at every tensor of it."""
        with SilentProgress().stage(name, NUM_LAYERS) as stage:
            rewrite(
                self.student,
                self.folder / name,
                DistillChange(LayerStream(self.student), trained),
                max_shard_bytes=60_000,
                device="cpu",
                stage=stage,
            )
        before, model = self.load("student").state_dict(), self.load(name)
        for key, value in model.state_dict().items():
            expected = trained[key]().to(torch.bfloat16).float() if key in trained else before[key]
            torch.testing.assert_close(value, expected, rtol=0.01 if key in trained else 0, atol=0)
        return model


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    yield Case(request.param, tmp_path_factory.mktemp(request.param))


def counted(checkpoint: Checkpoint) -> set[str]:
    """The parameters with an entry per expert."""
    stream = LayerStream(checkpoint)
    prefix = stream.layers_name
    names = {f"{prefix}.{moe.layer}.{name}" for moe in stream.moe_layers.values() for name in moe.counted}
    return names & set(dict(stream.model.named_parameters()))


def divergence(case: Case, model: PreTrainedModel) -> float:
    def log_probabilities(model: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            return model(input_ids=TOKENS, use_cache=False).logits.log_softmax(-1)  # type: ignore[no-any-return]

    p, s = log_probabilities(case.load("teacher")), log_probabilities(model)
    return float((p.exp() * (p - s)).sum(-1).mean())


def test_whole_model(case: Case) -> None:
    config = DistillConfig(**SETTINGS)
    folder = case.folder / "training"
    folder.mkdir()
    save_file({"tokens": TOKENS}, folder / "tokens.safetensors")
    lines: list[dict[str, Any]] = []
    train(Job(config, case.student.folder, case.teacher.folder, folder, "cpu", "x"), lines.append)
    found = parameter_readers(folder)
    assert counted(case.student) <= set(found)
    aliases = parts.aliases(build_skeleton(case.student.config))
    trained = {name: found[first] for name, first in aliases.items() if first in found}
    model = case.written("whole", trained)
    assert probe_error(model, case.folder / "whole") < TOLERANCE
    before = divergence(case, case.load("student"))
    assert sum(line["loss"] for line in lines[:2]) / 2 == pytest.approx(before, rel=0.2)
    assert divergence(case, model) < before


def test_layerwise(case: Case) -> None:
    config = DistillConfig(**SETTINGS, mode="layerwise")
    folder = case.folder / "layers"
    folder.mkdir()
    with SilentProgress().stage("layers", NUM_LAYERS) as stage:
        heal_layers(LayerStream(case.teacher), LayerStream(case.student), TOKENS, config, folder, stage)
    trained = trained_readers(folder, parts.aliases(build_skeleton(case.student.config)))
    assert counted(case.student) <= set(trained)
    model = case.written("layerwise", trained)
    assert probe_error(model, case.folder / "layerwise") < TOLERANCE
