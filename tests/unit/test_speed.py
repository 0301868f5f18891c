"""Speed and memory: the real processes on tiny models, and the bookkeeping on pretended ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from moe_compress.checkpoint.index import TensorIndex
from moe_compress.errors import CheckpointError, UsageError
from moe_compress.eval import memory, speed
from moe_compress.eval.speed import measure_speed
from tests.matrix.families import save as save_family
from tests.matrix.families import tiny_config, tiny_model


def save(folder: Path, layers: int) -> Path:
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, head_dim=8,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=32, eos_token_id=1, pad_token_id=0, dtype=torch.float32,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("speed")
    return {"deep": save(root / "deep", 8), "shallow": save(root / "shallow", 1)}


def test_real_processes_tell_a_deep_model_from_a_shallow_one(folders: dict[str, Path]) -> None:
    ballast = b"\1" * (1 << 30)  # a child's peak must not be that of the process that started it
    found = measure_speed(folders, repeats=5, prompt_tokens=1000, new_tokens=8)
    assert list(found) == ["deep", "shallow"]
    for rate in speed.RATES:
        assert found["shallow"]["speed"][rate] > 1.5 * found["deep"]["speed"][rate] > 0
    for measured in found.values():
        assert measured["speed"] == {rate: sorted(turns.values())[2] for rate, turns in measured["speed_turns"].items()}
        assert 50 << 20 < measured["peak_rss_bytes"] < len(ballast)
        assert "peak_gpu_bytes" not in measured
    settings = found["deep"]["speed_settings"]
    assert settings["prompt_tokens"] == 32 - 8  # as long as the context allows
    assert (settings["batch_size"], settings["new_tokens"], settings["repeats"]) == (1, 8, 5)
    assert (settings["dtype"], settings["device"]) == ("float32", "cpu") and settings["threads"] >= 1
    assert found["shallow"]["speed_settings"] == settings


def test_models_too_large_to_stay_are_loaded_anew(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[str] = []
    start = speed._Worker.start
    monkeypatch.setattr(speed, "_fit_together", lambda folders, device: False)
    monkeypatch.setattr(speed._Worker, "start", lambda worker: (starts.append("start"), start(worker)))
    found = measure_speed({"one": folders["shallow"]}, repeats=2, new_tokens=4)
    assert starts == ["start", "start"]
    assert found["one"]["speed"]["decode_tokens_per_s"] > 0
    assert found["one"]["speed_settings"]["dtype"] == "float32"


class Pretended:
    """A worker that answers with the number of the turn."""

    order: list[str]

    def __init__(self, folder: Path, *_: Any) -> None:
        self.name, self.turn, self.description = folder.name, 0, {"threads": 1}

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def measure(self) -> dict[str, Any]:
        self.turn += 1
        self.order.append(self.name)
        rate = 100.0 if self.turn == 2 else float(self.turn)  # one outlier
        return {"prefill_tokens_per_s": rate, "decode_tokens_per_s": 10 * rate, "peak_rss_bytes": self.turn}


def test_turns_alternate_and_medians_are_reported(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    Pretended.order = []
    monkeypatch.setattr(speed, "_Worker", Pretended)
    found = measure_speed(folders, repeats=3)
    assert Pretended.order == ["deep", "shallow", "shallow", "deep", "deep", "shallow"]
    assert found["deep"]["speed"] == {"prefill_tokens_per_s": 3.0, "decode_tokens_per_s": 30.0}
    assert found["deep"]["peak_rss_bytes"] == 3


def test_a_model_that_does_not_run_is_one_sentence(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model"):
        measure_speed({"empty": tmp_path})
    (tmp_path / "config.json").write_bytes((folders["shallow"] / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 16)
    with pytest.raises(CheckpointError, match="damaged"):
        measure_speed({"broken": tmp_path}, new_tokens=4)
    weights = {"model.norm.weight": torch.ones(3)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    found = measure_speed({"broken": tmp_path, "whole": folders["shallow"]}, repeats=1, new_tokens=4)
    reason = found["broken"].pop("not_measured")["speed"]
    assert reason.startswith("its process ended: ") and "\n" not in reason
    assert not found["broken"] and found["whole"]["speed"]["decode_tokens_per_s"] > 0, "the other is measured"


def test_a_model_without_a_causal_auto_class(tmp_path: Path) -> None:
    """Its class is the one the checkpoint names; `AutoModelForCausalLM` has none for this family."""
    save_family(tiny_model(tiny_config("mistral4")), tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) not in AutoModelForCausalLM._model_mapping
    found = measure_speed({"one": tmp_path}, repeats=1, prompt_tokens=8, new_tokens=4)
    assert found["one"]["speed"]["decode_tokens_per_s"] > 0


def test_a_model_larger_than_memory_is_not_loaded(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    needed = {name: memory.resident_bytes(folder, "cpu") for name, folder in folders.items()}
    index = TensorIndex.from_folder(folders["deep"])
    assert needed["deep"] == sum(4 * info.numel for info in index.values())
    Pretended.order = []
    monkeypatch.setattr(speed, "_Worker", Pretended)
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed["deep"] - 1)
    found = measure_speed(folders, repeats=3)
    assert "GB of memory" in found["deep"]["not_measured"]["speed"] and "speed" not in found["deep"]
    assert set(Pretended.order) == {"shallow"} and found["shallow"]["speed"]
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed["deep"])
    assert measure_speed(folders, repeats=1)["deep"]["speed"]


def test_a_context_too_small_is_no_failure(folders: dict[str, Path]) -> None:
    found = measure_speed(folders, new_tokens=32)
    assert all("too small for 32 new tokens" in measured["not_measured"]["speed"] for measured in found.values())


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"new_tokens": 1}, {"batch_size": 0}])
def test_settings_that_measure_nothing_are_refused(folders: dict[str, Path], wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        measure_speed(folders, **wrong)  # type: ignore[arg-type]


def test_memory_decides_who_stays_loaded(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    stored = sum(path.stat().st_size for folder in folders.values() for path in folder.glob("*.safetensors"))
    for available, expected in ((4 * stored, False), (4 * stored + 1, True)):
        memory = type("Memory", (), {"available": available})
        monkeypatch.setattr(speed.psutil, "virtual_memory", lambda memory=memory: memory)
        assert speed._fit_together(folders.values(), "cpu") is expected
