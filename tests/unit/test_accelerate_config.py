"""What an accelerate config file means for a distillation, and what of it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from moe_compress.compress.distill.accelerate_config import Launch, read_launch
from moe_compress.compress.distill.config import DistillConfig
from moe_compress.compress.distill.sharding import gathered, units
from moe_compress.errors import RecipeError, UsageError
from moe_compress.recipe import load_recipe
from tests.tiny_checkpoint import tiny_model

SHORT = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "mixed_precision": "bf16",
    "num_machines": 1,
    "num_processes": 4,
}


def written(folder: Path, fsdp: dict[str, Any] | None = None, **settings: Any) -> str:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(SHORT | {"fsdp_config": {"fsdp_version": 2} | (fsdp or {})} | settings))
    return str(file)


def test_what_a_file_says(tmp_path: Path) -> None:
    assert read_launch(written(tmp_path)) == Launch(4, True, True, "bfloat16", False)
    kept = {"reshard_after_forward": "false", "version": 2}  # accelerate takes names without the prefix too
    assert read_launch(written(tmp_path, kept, mixed_precision="no")) == Launch(4, True, False, "float32", False)
    plain = read_launch(written(tmp_path, distributed_type="MULTI_GPU", fsdp_config={}, use_cpu=True))
    assert plain == Launch(4, False, True, "bfloat16", True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fsdp": {"fsdp_version": 1}}, "`fsdp_version` in the accelerate config .*: it should be 2"),
        ({"fsdp": {"fsdp_offload_params": True}}, "`fsdp_offload_params`"),
        ({"fsdp": {"fsdp_activation_checkpointing": True}}, "`fsdp_activation_checkpointing`"),
        ({"fsdp": {"fsdp_auto_wrap_policy": "SIZE_BASED_WRAP"}}, "`fsdp_auto_wrap_policy`"),
        ({"fsdp": {"fsdp_reshard_after_forward": "FULL_SHARD"}}, "`fsdp_reshard_after_forward`.*true or false"),
        ({"fsdp": {"fsdp_ignored_modules": ".*norm"}}, "`fsdp_ignored_modules`"),
        ({"num_machines": 2}, "`num_machines`.*one machine"),
        ({"num_processes": 1}, "`num_processes`"),
        ({"distributed_type": "DEEPSPEED"}, "`distributed_type`.*use FSDP or MULTI_GPU"),
        ({"mixed_precision": "fp16"}, "`mixed_precision`.*use no or bf16"),
        ({"parallelism_config": {"parallelism_config_tp_size": 2}}, "`parallelism_config`"),
        ({"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, "`dynamo_config`"),
        ({"number_of_processes": 2}, "cannot be read: .*unknown keys"),
    ],
)
def test_what_is_not_done_is_said(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        read_launch(written(tmp_path, **settings))


@pytest.mark.parametrize("content", [None, "- a list", "a: {b", "distributed_type: ["])
def test_a_file_that_is_none(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match="cannot be read"):
        read_launch(str(file))


def test_the_file_decides_on_processes_and_precision(tmp_path: Path) -> None:
    file = written(tmp_path)
    config = read_launch(file).settle(DistillConfig(op="distill", accelerate_config=file, batch_size=8))
    assert (config.processes, config.precision) == (4, "bfloat16")
    with pytest.raises(UsageError, match=r"batch_size \(6\) should be a multiple of .* num_processes .* \(4\)"):
        read_launch(file).settle(DistillConfig(op="distill", accelerate_config=file, batch_size=6))
    step = {"op": "distill", "teacher_model": "reference", "accelerate_config": file}
    for setting in ({"processes": 4}, {"precision": "float32"}, {"mode": "layerwise"}):
        with pytest.raises(RecipeError, match="has no effect"):
            recipe = {"model": "reference", "calibration": {"dataset": "reference"}, "steps": [step | setting]}
            load_recipe(recipe)


def test_layers_with_a_common_tensor_are_one_unit() -> None:
    layers = [nn.Linear(2, 2) for _ in range(5)]
    layers[3].weight = layers[1].weight
    assert units(layers) == [[0], [1, 3], [2], [4]]


def test_what_a_process_holds_whole() -> None:
    """Twice a layer, its gradients twice, what lies outside and its gradients; of the original no gradients."""
    model: Any = tiny_model()
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    outside = sum(parameter.numel() for parameter in model.parameters()) - 2 * layer
    experts = [name for name, _ in model.named_parameters() if ".experts." in name]
    of_layer = sum(model.get_parameter(name).numel() for name in experts) // 2
    assert gathered(model, experts, model) == 2 * (layer + of_layer) + outside
    everything = [name for name, _ in model.named_parameters()]
    assert gathered(model, everything, model) == 2 * (2 * layer + outside)
    with torch.device("meta"):
        larger: Any = tiny_model(hidden_size=64)
    big = sum(parameter.numel() for parameter in larger.model.layers[0].parameters())
    assert gathered(model, [], larger) == 2 * big + sum(p.numel() for p in larger.parameters()) - 2 * big
