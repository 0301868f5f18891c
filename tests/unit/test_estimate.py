"""What a run takes, before it runs: sizes against tensors that are there, and the arithmetic of peaks and hours."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config

import moe_compress
from moe_compress import estimate
from moe_compress.calibrate.scores import Scores
from moe_compress.checkpoint.index import TensorIndex
from moe_compress.checkpoint.source import open_checkpoint
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.compress.demand import Demand, ModelSize
from moe_compress.compress.distill.plan import state_bytes
from moe_compress.compress.distill.state import save_state
from moe_compress.compress.operation import Outlook
from moe_compress.console import print_plan
from moe_compress.errors import UnsupportedModelError
from moe_compress.estimate import Machine, Stage, look_at_machine, peaks, seconds
from moe_compress.eval.cost import stored_by_part
from moe_compress.models.skeleton import build_skeleton
from moe_compress.preview import look_ahead
from moe_compress.recipe import load_recipe
from tests.matrix import families
from tests.tiny_checkpoint import tiny_checkpoint, tiny_recipe, write_texts


@pytest.fixture(scope="module", params=["qwen3_moe", "olmoe"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / request.param, request.param, num_hidden_layers=3)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("plain") / "model")


def test_a_resident_layer_is_as_large_as_said(model: Path) -> None:
    stream = LayerStream(open_checkpoint(str(model)))
    config = stream.checkpoint.config
    size = ModelSize.of(config, stream.checkpoint.index.nbytes)
    assert len(size.layers) == len(stream.layers)
    for index, layer in enumerate(size.layers):
        resident = stream.load(index)
        assert size.resident(layer) == sum(tensor.nbytes for tensor in resident.state_dict().values())
        assert (layer.num_experts, layer.top_k, layer.width, layer.inner) == (8, 2, 32, 16)
    stream.load_trunk()
    assert size.embedding == stream.model.get_input_embeddings().weight.numel()
    assert size.head == stream.model.get_output_embeddings().weight.numel()
    assert size.stored == 2


def test_what_a_sweep_keeps_of_a_layer(model: Path, tmp_path: Path) -> None:
    """The large statistics exactly; those with one number per expert are not counted."""
    recipe = tiny_recipe(model, write_texts(tmp_path / "texts.txt"), 0.5)
    moe_compress.score(recipe, tmp_path / "scores")
    size = ModelSize.of(open_checkpoint(str(model)).config, 0)
    for measured, layer in zip(Scores.load(tmp_path / "scores").layers, size.layers, strict=True):
        kept = sum(values.nbytes for values in measured.statistics.values() if values.ndim > 1)
        assert size.statistics(layer) == kept


def test_peaks_and_when_they_are_reached() -> None:
    found = peaks([
        Stage("score", 7), Stage("apply", 9, device=4), Stage("verify", 5, others=8, device=1),
        Stage("speed", 5, others=90, device=9, whole_models=True),
    ])  # fmt: skip
    assert (found["process"], found["process_stage"]) == (9, "apply")
    assert (found["host"], found["host_stage"]) == (13, "verify")
    assert (found["device"], found["evaluation"]) == (4, 95)
    assert [stage["stage"] for stage in found["stages"]] == ["score", "apply", "verify", "speed"]


def test_what_is_computed_lies_on_the_device() -> None:
    demand = Demand("score", host=10, computed=1000, moved=100, flops=5.0)
    here, there = estimate._stage("step", demand, "cpu"), estimate._stage("step", demand, "cuda")
    assert (here.process, here.device) == (estimate.PROGRAM_BYTES + 1010, 0)
    assert (there.process, there.device) == (estimate.PROGRAM_BYTES + estimate.CUDA_BYTES + 10, 1000)


def test_hours_are_bytes_and_arithmetic_at_the_measured_rates() -> None:
    found = seconds(
        [Stage("a", 0, copied=3e9, flops=4e12), Stage("b", 0, copied=1e9, starts=1), Stage("speed", 0)],
        Machine(copy_rate=1e9, flop_rate=2e11),
    )
    start = estimate.START_SECONDS
    assert found["stages"] == {"start": start, "a": 3 + 20, "b": 1 + start}
    assert found["seconds"] == 24 + 2 * start


def test_the_machine_is_looked_at(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "PROBE_SECONDS", 0.05)
    monkeypatch.setattr(estimate, "PROBE_BYTES", 1 << 20)
    size = ModelSize.of(open_checkpoint(str(plain)).config, 0)
    found = look_at_machine(tmp_path / "not" / "yet", size, 512, "cpu")
    assert found.copy_rate > 1e5 and found.flop_rate > 1e6
    assert list(tmp_path.iterdir()) == [], "nothing is left on the disk"


def test_more_tokens_and_larger_models_take_more(plain: Path) -> None:
    """No figure falls when the work grows."""
    texts = {"calibration": {"dataset": "reference", "num_samples": 4, "sequence_length": 64}}
    for step in (
        {"op": "prune", "criterion": "reap", "keep": 0.5},
        {"op": "prune", "criterion": "ablation", "keep": 0.5},
        {"op": "quantize", "bits": 4},
        {"op": "quantize", "average_bits": 2.5, "options": [2, 3], "cost": "fisher"},
    ):
        recipe = texts | {"model": str(plain), "steps": [step], "export": {"tier": "plugin"}}
        small = moe_compress.plan(recipe)["memory"]["stages"]
        large = moe_compress.plan(recipe, overrides=["calibration.num_samples=4000", "calibration.batch_size=8"])
        names = [stage["stage"] for stage in small]
        assert names == [stage["stage"] for stage in large["memory"]["stages"]] and names[-2:] == ["verify", "speed"]
        assert all(a["process"] <= b["process"] for a, b in zip(small, large["memory"]["stages"], strict=True))
        assert any(a["process"] < b["process"] for a, b in zip(small, large["memory"]["stages"], strict=True))


def test_training_is_a_stage_of_its_own(plain: Path) -> None:
    """Weights in float32, and of what is trained the gradient and two moments."""
    recipe = {"model": str(plain), "calibration": {"dataset": "reference", "num_samples": 4, "sequence_length": 64}}
    recipe |= {"steps": [{"op": "prune", "criterion": "reap", "keep": 0.5}, {"op": "distill", "trainable": ["all"]}]}
    stages = {stage["stage"]: stage["process"] for stage in moe_compress.plan(recipe)["memory"]["stages"]}
    pruned = open_checkpoint(str(plain)).config
    pruned.num_experts = 4
    count = sum(parameter.numel() for parameter in build_skeleton(pruned).parameters())
    assert stages["step 2/2 distill: train"] - estimate.PROGRAM_BYTES > 4 * 4 * count


def test_processes_that_train_have_a_device_each(plain: Path, tmp_path: Path) -> None:
    """Beside one another on a CPU, where an accelerate config may put them."""

    def training(device: str, **settings: Any) -> Any:
        data = {"dataset": "reference", "num_samples": 8, "sequence_length": 64}
        step = {"op": "distill", "teacher_model": "reference", "data": data} | settings
        loaded = load_recipe({"model": str(plain), "steps": [step]})
        _, outlooks = look_ahead(loaded, open_checkpoint(str(plain)).config)
        return estimate.stages(loaded, outlooks, device)[0]

    assert training("cuda", processes=4).device == training("cuda").device
    one, four = (training("cpu", processes=processes).process - estimate.PROGRAM_BYTES for processes in (1, 4))
    assert four == 4 * one
    file = tmp_path / "cpu.json"
    file.write_text(
        '{"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "num_processes": 4, "use_cpu": true}'
    )
    there = training("cuda", accelerate_config=str(file))
    assert (there.device, there.process - estimate.PROGRAM_BYTES - estimate.CUDA_BYTES) == (0, four)


def test_disk_holds_what_a_training_keeps(plain: Path, tmp_path: Path) -> None:
    """Parameters and two moments, as they are saved, twice while one file replaces the other; a layer's once."""
    parameter = torch.nn.Parameter(torch.ones(300, 400))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    save_state(tmp_path, 1, {"weight": parameter}, optimizer, "it")
    stored = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert stored == pytest.approx(state_bytes(parameter.numel()) / 2, rel=0.01)

    def scratch(**settings: Any) -> int:
        data = {"dataset": "reference", "num_samples": 8, "sequence_length": 64}
        step = {"op": "distill", "teacher_model": "reference", "data": data, "trainable": ["all"]} | settings
        loaded = load_recipe({"model": str(plain), "steps": [step]})
        _, outlooks = look_ahead(loaded, open_checkpoint(str(plain)).config)
        return max(stage.scratch for stage in estimate.stages(loaded, outlooks, "cpu"))

    config = open_checkpoint(str(plain)).config
    model = build_skeleton(config)
    everything = sum(parameter.numel() for parameter in model.parameters())
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters())
    hidden = 4 * 8 * 64 * config.hidden_size
    assert scratch(teacher="online") == state_bytes(everything)
    cached = scratch(teacher="cached", top_logits=16)
    assert cached - state_bytes(everything) == 8 * 64 * (16 * 8 + 4), "16 logits of 8 bytes, and what they leave out"
    for inputs, streams in (("teacher", 1), ("student", 2)):
        found = scratch(mode="layerwise", trainable=["routers", "norms", "experts"], inputs=inputs)
        assert 2 * streams * hidden < found <= 4 * layers + 2 * streams * hidden


def test_a_600b_model_from_its_config_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSeek-V3's shape: 671 billion parameters in its report (arXiv 2412.19437), prediction heads not counted."""
    DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"], dtype="bfloat16").save_pretrained(tmp_path)
    planned = moe_compress.plan("prune-reap-25", model=str(tmp_path), device="cpu")
    assert planned["baseline"]["total_params"] == pytest.approx(671e9, rel=0.001)
    assert planned["baseline"]["stored_bytes"] == pytest.approx(2 * planned["baseline"]["total_params"], rel=1e-5)
    for side in ("baseline", "predicted"):
        assert sum(planned[side]["bytes_by_part"].values()) == pytest.approx(planned[side]["stored_bytes"], rel=1e-6)
    # One layer of 256 experts in bfloat16, and its largest parameter once more.
    experts = 256 * 3 * 7168 * 2048 * 2
    assert experts * 5 / 3 < planned["memory"]["process"] < 3 * experts
    print_plan(planned)
    shown = capsys.readouterr().out
    assert "memory: about" in shown and "tier: stock, plain transformers" in shown and "time:" not in shown
    monkeypatch.setattr(estimate, "free_bytes", lambda device: planned["memory"]["host"] + above)
    for above in (-1, 0):
        warnings = moe_compress.plan("prune-reap-25", model=str(tmp_path), device="cpu")["warnings"]
        assert any("are free on this machine" in warning for warning in warnings) == (above < 0)
    quantized = moe_compress.plan(
        "mc-2.5bit", model=str(tmp_path), overrides=["steps.0.average_bits=null", "steps.0.stored_bytes=250GB"]
    )
    assert quantized["predicted"]["stored_bytes"] == 250 * 10**9
    assert "is within reach" in quantized["steps"][0]["summary"][0]
    print_plan(moe_compress.plan("w4-stock", model=str(tmp_path), device="cpu"))
    assert re.search(r"3 to 60 +│ +256 │ +256 │ 100% at 4", capsys.readouterr().out), (
        "one row for layers that are alike"
    )


@pytest.mark.parametrize(
    "step",
    [
        {"op": "prune", "criterion": "reap", "keep": 0.5},
        {"op": "quantize", "method": "rtn", "bits": 4, "group_size": 16, "attention": {}},
        {"op": "quantize", "method": "rtn", "bits": 4, "group_size": 16, "embeddings": {"bits": 8}},
    ],
)
def test_bytes_by_part_are_those_of_the_result(step: dict[str, Any], plain: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(plain, write_texts(tmp_path / "texts.txt"))
    recipe |= {"steps": [step], "export": {"tier": "plugin" if "embeddings" in step else "stock"}}
    if step["op"] != "prune":
        del recipe["calibration"]
    planned = moe_compress.plan(recipe)
    report = moe_compress.run(recipe, tmp_path / "out")
    assert planned["predicted"]["stored_bytes"] == report["compressed"]["stored_bytes"]
    parts = planned["predicted"]["bytes_by_part"]
    assert sum(parts.values()) == report["compressed"]["stored_bytes"]
    index = TensorIndex.from_folder(tmp_path / "out")
    for part, word in (("attention", ".self_attn."), ("routed_experts", ".experts."), ("embeddings", "embed_tokens")):
        assert parts[part] == sum(info.nbytes for name, info in index.items() if word in name), part
    assert report["compressed"]["bytes_by_part"] == {part: stored for part, stored in parts.items() if stored}
    before = open_checkpoint(str(plain))
    assert planned["baseline"]["bytes_by_part"] == stored_by_part(before.config, before.index)


def test_bytes_of_packed_experts_that_have_the_models_own_names(tmp_path: Path) -> None:
    """The tier `plugin` names experts that the Hub keeps in one tensor by number."""
    source = tmp_path / "source"
    families.save(families.tiny_model(families.tiny_config("gpt_oss")), source)
    step = {"op": "quantize", "method": "rtn", "bits": 4, "group_size": 16}
    report = moe_compress.run({"model": str(source), "steps": [step], "export": {"tier": "plugin"}}, tmp_path / "out")
    parts = report["compressed"]["bytes_by_part"]
    assert sum(parts.values()) == report["compressed"]["stored_bytes"] and "unknown_to_the_model" not in parts
    assert parts["routed_experts"] < 0.5 * report["baseline"]["bytes_by_part"]["routed_experts"]
    shown = moe_compress.inspect(tmp_path / "out")
    assert shown["bytes"] == parts and shown["bytes_are"] == "measured"


def test_parts_follow_the_bytes() -> None:
    """What is not said otherwise is the routed experts'."""
    outlook = Outlook(None, 100, 10, None, {"routed_experts": 70, "attention": 30})
    smaller = outlook.of_size(stored_bytes=60, saved={"attention": 10})
    assert dict(smaller.parts) == {"routed_experts": 40, "attention": 20}
    assert not Outlook(None, 100, 10).of_size(stored_bytes=60).parts


def test_a_recipe_beyond_its_tier_is_planned_with_a_warning(plain: Path) -> None:
    recipe = {"model": str(plain), "calibration": {"dataset": "reference"}, "steps": [
        {"op": "prune", "criterion": "reap", "keep": 0.5, "scope": "global"}]}  # fmt: skip
    assert any("the tier `stock` cannot hold" in warning for warning in moe_compress.plan(recipe)["warnings"])


def test_a_quantized_model_is_planned_from_its_configuration(plain: Path, tmp_path: Path) -> None:
    """As it would be unquantized, such as DeepSeek's models, which are on the Hub in fp8; `run` refuses them."""
    model = tmp_path / "model"
    model.mkdir()
    content = json.loads((plain / "config.json").read_text())
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    recipe = {"model": str(model), "calibration": {"dataset": "reference"}, "steps": [
        {"op": "prune", "criterion": "reap", "keep": 0.5}]}  # fmt: skip
    (model / "config.json").write_text(json.dumps(content))
    unquantized = moe_compress.plan(recipe)
    (model / "config.json").write_text(json.dumps(content | {"quantization_config": quantization}))
    planned = moe_compress.plan(recipe)
    assert planned["predicted"] == unquantized["predicted"] and planned["steps"] == unquantized["steps"]
    (warning,) = set(planned["warnings"]) - set(unquantized["warnings"])
    assert "is quantized (fp8)" in warning
    with pytest.raises(UnsupportedModelError, match="is quantized"):
        moe_compress.run(recipe, tmp_path / "out")


def test_no_steps(plain: Path) -> None:
    planned = moe_compress.plan({"model": str(plain), "steps": []})
    assert [stage["stage"] for stage in planned["memory"]["stages"]] == ["identity: apply", "verify", "speed"]
    assert planned["predicted"]["bytes_by_part"] == planned["baseline"]["bytes_by_part"]
