"""What the apply sweep writes and refuses, on tiny checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_compress.checkpoint.index import TensorIndex
from moe_compress.checkpoint.rewrite import Change, Ledger, rewrite
from moe_compress.checkpoint.source import open_checkpoint
from moe_compress.checkpoint.writer import tensor_sha256
from moe_compress.compress.prune.apply import PruneChange
from moe_compress.compress.prune.config import PruneConfig
from moe_compress.compress.prune.plan import LayerPlan, PrunePlan
from moe_compress.errors import CheckpointError
from moe_compress.progress import SilentProgress
from tests.tiny_checkpoint import tiny_checkpoint


def identity(source: Path, folder: Path) -> Ledger:
    with SilentProgress().stage("identity", 2) as stage:
        return rewrite(open_checkpoint(str(source)), folder, Change(), max_shard_bytes=10**6, device="cpu", stage=stage)


def retype(folder: Path, part: str, dtype: torch.dtype) -> None:
    """Store the tensors of this part in another type, with values that float32 does not hold where it can."""
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if part in name:
                tensors[name] = tensor.to(dtype) + torch.finfo(dtype).eps
        save_file(tensors, shard, {"format": "pt"})


# --------------------------------------------------------------------------------------------------------- number types


@pytest.mark.parametrize("part", ["layers.0.self_attn.q_proj", "layers.1.mlp.gate.", "layers.1.input_layernorm"])
def test_doubles_that_would_be_rounded_are_refused(part: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    retype(source, part, torch.float64)
    with pytest.raises(CheckpointError, match=f"{part}.*would be rounded"):
        identity(source, tmp_path / "out")


def test_doubles_in_some_of_a_layers_experts_are_refused(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    retype(source, "layers.0.mlp.experts.3.down_proj", torch.float64)
    with pytest.raises(CheckpointError, match=r"experts\.down_proj.*would be rounded"):
        identity(source, tmp_path / "out")


def test_doubles_outside_the_layers_and_in_all_experts_keep_their_bytes(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    for part in ("mlp.experts.", "embed_tokens", "model.norm"):
        retype(source, part, torch.float64)
    identity(source, tmp_path / "out")
    before, after = TensorIndex.from_folder(source), TensorIndex.from_folder(tmp_path / "out")
    assert {info.dtype for info in before.values()} == {"F64", "BF16"} and set(before) == set(after)
    assert all(tensor_sha256(after[name]) == tensor_sha256(info) for name, info in before.items())


def test_ledger_names_what_a_layer_hands_through(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    ledger = identity(source, tmp_path / "out")
    index = TensorIndex.from_folder(source)
    expected = {name for name in index if ".layers." in name and ".mlp." not in name}
    assert set(ledger.unchanged) == expected and Ledger.load(tmp_path / "out") == ledger
    assert all(digest == tensor_sha256(index[name]) for name, digest in ledger.unchanged.items())


# ---------------------------------------------------------------------------------------------------- what is no weight


def test_what_belongs_to_a_checkpoint_is_copied_and_strays_are_not(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    for name in ("adapter_model.safetensors", "optimizer.pt", "state.ckpt", "args.pkl", "model.onnx_data"):
        (source / name).write_bytes(b"another kind of weights")
    (source / "LICENSE").write_text("text")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (source / "runs").mkdir()
    (source / "runs" / "events").write_text("of the training")
    (source / "code.py").write_text("")
    config = json.loads((source / "config.json").read_text())
    auto_map = {"AutoConfig": "gone.Config", "AutoModel": "code.Model", "AutoModelForCausalLM": "org/other--gone.Model"}
    (source / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    code = {"AutoTokenizer": ["gone.Slow", None]}
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"auto_map": code}))
    identity(source, tmp_path / "out")
    found = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert {name for name in found if not name.startswith("model-")} == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE", "code.py",
        "additional_chat_templates/tool_use.jinja", "model.safetensors.index.json", "ledger.json", "probe.npz",
    }  # fmt: skip
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == config | {"auto_map": {name: auto_map[name] for name in ("AutoModel", "AutoModelForCausalLM")}}
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == tokenizer


# --------------------------------------------------------------------------------------------------------- config.json


@pytest.mark.parametrize(
    ("content", "key", "before"),
    [
        ({"model_type": "mixtral"}, ("num_local_experts",), 8),
        ({"model_type": "mixtral", "num_local_experts": 8}, ("num_local_experts",), 8),
        ({"model_type": "qwen3_moe"}, ("num_local_experts",), 128),
        ({"model_type": "aria"}, ("text_config", "moe_num_experts"), 8),
        ({"model_type": "aria", "text_config": {"hidden_size": 64}}, ("text_config", "moe_num_experts"), 8),
        # the same number under the same name, but of another tower
        (
            {"model_type": "dots3_note", "vision_config": {"num_local_experts": 256}},
            ("text_config", "n_routed_experts"),
            256,
        ),
    ],
)
def test_expert_count_that_the_config_left_to_its_class(
    content: dict[str, Any], key: tuple[str, ...], before: int
) -> None:
    layer = LayerPlan(0, before, tuple(range(before - 2)), tuple([0.0] * before), ())
    plan = PrunePlan(PruneConfig(op="prune", criterion="reap", keep=before - 2), (layer,))
    new = PruneChange(plan).config(content)
    said: Any = new
    for part in key:
        said = said[part]
    assert said == before - 2
    assert new.get("vision_config") == content.get("vision_config")
    text = CONFIG_MAPPING[content["model_type"]].from_dict(new).get_text_config()
    assert getattr(text, key[-1]) == before - 2
