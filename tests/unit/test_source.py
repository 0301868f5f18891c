"""Opening checkpoint folders: what is accepted, and one clear refusal for everything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from moe_compress.checkpoint import source
from moe_compress.checkpoint.source import load_tokenizer, open_checkpoint, open_config, require_weights
from moe_compress.errors import CheckpointError, UnsupportedModelError, UsageError

REMOTE_CODE = """
from transformers import PretrainedConfig


class StrangeConfig(PretrainedConfig):
    model_type = "strange_moe"
"""


def checkpoint(folder: Path, *, weights: bool = True, **settings: Any) -> Path:
    """A folder with a config of `settings` and, in two shards, two tensors."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2} | settings)
    )
    if weights:
        shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        for name, shard in shards.items():
            save_file({name: np.ones((3, 4), np.float32)}, folder / shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return folder


def refusal(error: type[Exception], model: str, **arguments: Any) -> str:
    with pytest.raises(error) as caught:
        open_checkpoint(model, **arguments)
    assert type(caught.value) is error
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def test_folder_opens(tmp_path: Path) -> None:
    opened = open_checkpoint(str(checkpoint(tmp_path / "model")))
    assert opened.folder == tmp_path / "model" and opened.model_id == str(tmp_path / "model")
    assert opened.revision is None
    assert opened.config.model_type == "qwen3_moe" and opened.config.num_experts == 4
    assert sorted(opened.index) == ["a", "b"] and opened.index["a"].shape == (3, 4)


def test_config_alone_needs_no_weights(tmp_path: Path) -> None:
    folder = str(checkpoint(tmp_path / "model", weights=False))
    config, index = open_config(folder)
    assert config.model_type == "qwen3_moe" and index is None
    checkpoint(tmp_path / "model")
    index = open_config(folder)[1]
    assert index is not None and sorted(index) == ["a", "b"]


def test_reference_is_the_packaged_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "REFERENCE", checkpoint(tmp_path / "packaged"))
    opened = open_checkpoint("reference")
    assert opened.model_id == "reference" and opened.folder == tmp_path / "packaged"
    monkeypatch.setattr(source, "REFERENCE", tmp_path / "absent")
    assert "install" in refusal(CheckpointError, "reference")


def test_path_that_is_no_folder(tmp_path: Path) -> None:
    assert "does not exist" in refusal(UsageError, str(tmp_path / "absent"))
    assert "does not exist" in refusal(UsageError, "./absent")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "name the folder" in refusal(UsageError, str(tmp_path / "model.safetensors"))
    assert "neither a folder that exists nor a Hub id" in refusal(CheckpointError, "no/such/thing")


def test_revision_of_a_folder_has_no_effect(tmp_path: Path) -> None:
    assert "`revision` has no effect" in refusal(UsageError, str(checkpoint(tmp_path / "m")), revision="main")


def test_no_config(tmp_path: Path) -> None:
    assert "no config.json" in refusal(CheckpointError, str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
def test_damaged_config(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    assert "damaged" in refusal(CheckpointError, str(tmp_path))


@pytest.mark.parametrize("top_k", [0, 5])
def test_impossible_top_k(tmp_path: Path, top_k: int) -> None:
    folder = checkpoint(tmp_path / "m", num_experts_per_tok=top_k)
    assert f"{top_k} of 4 experts per token" in refusal(CheckpointError, str(folder))


def test_rejected_config(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", hidden_size="many")
    assert "not accepted" in refusal(CheckpointError, str(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.ckpt"])
def test_pickle(tmp_path: Path, name: str) -> None:
    folder = checkpoint(tmp_path / "m", weights=False)
    (folder / name).write_bytes(b"never opened")
    message = refusal(CheckpointError, str(folder))
    assert name in message and "run any code" in message and "save_pretrained" in message


def test_pickle_beside_safetensors_is_ignored(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    (folder / "training_args.bin").write_bytes(b"never opened")
    assert len(open_checkpoint(str(folder)).index) == 2


def test_no_weights(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", weights=False)
    assert "no safetensors weights" in refusal(CheckpointError, str(folder))
    save_file({"a": np.ones(1, np.float32)}, folder / "adapter_model.safetensors")
    assert "no safetensors weights" in refusal(CheckpointError, str(folder))
    assert open_config(str(folder))[1] is None
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        require_weights(str(folder))
    require_weights("reference")


def test_a_tokenizer_is_there_and_whole(tmp_path: Path) -> None:
    """From a folder with a config alone transformers makes a Qwen tokenizer that knows no words."""
    folder = checkpoint(tmp_path / "m")
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"m holds no tokenizer"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"^The tokenizer in .*m cannot be loaded: .*\.$"):
        load_tokenizer(folder)
    assert len(load_tokenizer(source.REFERENCE)) == 4096


def test_gguf(tmp_path: Path) -> None:
    (tmp_path / "model-Q4.gguf").write_bytes(b"GGUF")
    assert "GGUF" in refusal(UnsupportedModelError, str(tmp_path))
    assert "GGUF" in refusal(UnsupportedModelError, str(tmp_path / "model-Q4.gguf"))
    assert "GGUF" in refusal(UnsupportedModelError, str(checkpoint(tmp_path, weights=False)))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"load_in_8bit": True}}, "not named"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "mxfp4"}}}, "mxfp4"),
    ],
)
def test_quantized(tmp_path: Path, settings: dict[str, Any], named: str) -> None:
    message = refusal(UnsupportedModelError, str(checkpoint(tmp_path / "m", **settings)))
    assert named in message and "only unquantized sources are supported" in message


def test_unknown_architecture(tmp_path: Path) -> None:
    message = refusal(UnsupportedModelError, str(checkpoint(tmp_path / "m", model_type="qwen3_mo")))
    assert "`qwen3_mo`" in message and "`qwen3_moe`" in message
    assert "no `model_type`" in refusal(UnsupportedModelError, str(checkpoint(tmp_path / "m", model_type=None)))


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "configuration_strange.StrangeConfig"}
    folder = checkpoint(tmp_path / "m", model_type="strange_moe", auto_map=auto_map)
    witness = tmp_path / "ran"
    (folder / "configuration_strange.py").write_text(f"open({str(witness)!r}, 'w').close()\n{REMOTE_CODE}")
    assert "never run" in refusal(UnsupportedModelError, str(folder))
    assert not witness.exists()


def test_known_architecture_with_remote_code_needs_none(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", auto_map={"AutoConfig": "configuration_strange.StrangeConfig"})
    assert open_checkpoint(str(folder)).config.model_type == "qwen3_moe"


def test_missing_and_truncated_shard(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    shard = folder / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    assert shard.name in refusal(CheckpointError, str(folder))
    shard.unlink()
    assert shard.name in refusal(CheckpointError, str(folder))
