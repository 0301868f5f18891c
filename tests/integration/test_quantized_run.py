"""Quantizing from a recipe to a folder, and what the five checks say of a folder that was tampered with."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import moe_compress
from moe_compress.checkpoint.durable import sha256_of
from moe_compress.checkpoint.index import TensorIndex
from moe_compress.checkpoint.source import open_config
from moe_compress.checkpoint.stream import read_tensor
from moe_compress.cli import app
from moe_compress.compress.quantize import apply as apply_module
from moe_compress.compress.quantize.apply import QuantizeChange
from moe_compress.compress.quantize.config import QuantizeConfig
from moe_compress.compress.quantize.moments import Moments
from moe_compress.compress.quantize.plan import effective
from moe_compress.compress.quantize.sizes import Sizes, with_group_size
from moe_compress.compress.quantize.step import QuantizeStep
from moe_compress.errors import MoECompressError, RecipeError, UnsupportedModelError, UsageError, VerificationError
from moe_compress.preview import sweep
from moe_compress.progress import SilentProgress
from moe_compress.recipe import load_recipe
from moe_compress.settings import shown_size
from moe_compress.verification import checks
from tests.crashes import killed_and_resumed
from tests.integration.test_reuse import Recording
from tests.integration.test_run import content, interrupted_at
from tests.matrix.families import save, tiny_config, tiny_model
from tests.tiny_checkpoint import tiny_checkpoint, tiny_recipe

ROOT = Path(__file__).parents[2]
LAYERS = 3
W4 = {"op": "quantize", "method": "gptq", "bits": 4, "group_size": 16, "scale_search": 2, "attention": {}}
MIXED = {
    "op": "quantize", "method": "gptq", "average_bits": 3.0, "options": [2, 3, 4], "allow_drop": True,
    "granularity": "projection", "group_size": 16, "symmetric": False, "scale_search": 2,
    "attention": {"bits": 4, "group_size": "channel"}, "protect_super_experts": False,
}  # fmt: skip
UNEVEN = {"op": "prune", "criterion": "reap", "keep": 0.75, "scope": "global", "protect_super_experts": False}


def recipe(source: Path, texts: Path, *steps: dict[str, Any], tier: str = "plugin", **settings: Any) -> dict[str, Any]:
    export = {"tier": tier, "max_shard_size": "20KB"}
    return tiny_recipe(source, texts, export=export, **settings) | {"steps": list(steps)}


@pytest.fixture(scope="module")
def made(source: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of unequal size, pruned, then drops and bits by projection, with all five checks."""
    out = tmp_path_factory.mktemp("made") / "out"
    moe_compress.run(recipe(source, texts, UNEVEN, MIXED), out)
    return out


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "out"))


# ------------------------------------------------------------------------------------------------------- what OUT holds


def test_prune_then_drops_and_bits_in_plugin(made: Path, source: Path) -> None:
    assert moe_compress.inspect(made)["tiers"] == [
        "plugin: it needs this package to load, its experts packed: `import moe_compress`, or trust_remote_code=True."
    ]
    report = json.loads((made / "report.json").read_text())
    assert all(check["passed"] for check in report["checks"].values())
    first, second = json.loads((made / "plan.json").read_text())["steps"]
    counts = [len(layer["keep"]) for layer in first["layers"]]
    assert sum(counts) == 18 and [layer["num_experts"] for layer in second["layers"]] == counts
    assert second["average_bits"] <= MIXED["average_bits"]
    config = json.loads((made / "config.json").read_text())
    assert config["model_type"] == "compressed_qwen3_moe" and "pip install moe-compress" in config["architectures"][0]
    assert config["moe_compress"]["layers"] == {
        str(layer["layer"]): {"num_experts": len(layer["keep"])} for layer in second["layers"]
    }
    manifest = json.loads((made / "manifest.json").read_text())
    stored = TensorIndex.from_folder(made).nbytes
    assert manifest["stored_bytes"] == stored
    assert report["compressed"]["stored_bytes"] == stored < report["baseline"]["stored_bytes"]


def test_four_bits_in_stock(source: Path, texts: Path, tmp_path: Path) -> None:
    """The logits check is plain transformers in a process that cannot import this package."""
    out = tmp_path / "out"
    wanted = recipe(source, texts, W4, tier="stock")
    predicted = moe_compress.plan(wanted)["predicted"]["stored_bytes"]
    report = moe_compress.run(wanted, out)
    assert report["compressed"]["stored_bytes"] == predicted
    assert {name: check["passed"] for name, check in report["checks"].items()} == dict.fromkeys(
        ("coverage", "bytes", "keys", "logits", "target"), True
    )
    before, after = TensorIndex.from_folder(source), TensorIndex.from_folder(out)
    quantized = {name for name in before if ".experts." in name or (".self_attn." in name and "_proj" in name)}
    names = {f"{name}_{part}" for name in quantized for part in ("packed", "scale", "shape")}
    assert set(after) == (set(before) - quantized) | names
    for name in quantized:
        rows, columns = before[name].shape
        assert (after[f"{name}_packed"].dtype, after[f"{name}_packed"].shape) == ("I32", (rows, columns // 8))
        assert (after[f"{name}_scale"].dtype, after[f"{name}_scale"].shape) == ("BF16", (rows, columns // 16))
        shape = np.fromfile(after[f"{name}_shape"].file, np.int64, 2, offset=after[f"{name}_shape"].start)
        assert shape.tolist() == [rows, columns]
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["model_type"] == "qwen3_moe" and "moe_compress" not in config
    (sentence,) = moe_compress.inspect(out)["tiers"]
    assert sentence.startswith("stock: plain transformers loads it with what it needs for `compressed-tensors`")


# ------------------------------------------------------------------------------------------------------ the five checks


def failed(folder: Path) -> dict[str, str]:
    found = checks.verify(folder, SilentProgress())
    return {name: check["detail"] for name, check in found.items() if not check["passed"]}


def edit(file: Path, function: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(file.read_text())
    function(values)
    file.write_text(json.dumps(values))


def change_shard(folder: Path, name: str, function: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite the shard that holds a tensor; index and records follow."""
    file = TensorIndex.from_folder(folder)[name].file
    tensors = load_file(file)
    before = set(tensors)
    function(tensors)
    save_file(tensors, file, {"format": "pt"})
    edit(folder / "model.safetensors.index.json",
         lambda index: [index["weight_map"].pop(gone) for gone in before - set(tensors)])  # fmt: skip

    def record(ledger: dict[str, Any]) -> None:
        (shard,) = (shard for shard in ledger["shards"] if shard["file"] == file.name)
        shard |= {"sha256": sha256_of(file), "nbytes": file.stat().st_size}

    edit(folder / "ledger.json", record)
    noted = (file.name, "model.safetensors.index.json", "ledger.json")
    edit(
        folder / "manifest.json",
        lambda manifest: manifest["files"].update({name: sha256_of(folder / name) for name in noted}),
    )


def packed_tensor(folder: Path, suffix: str) -> str:
    return next(name for name in sorted(TensorIndex.from_folder(folder)) if name.endswith(suffix))


def test_each_check_fails_on_what_only_it_can_see(made: Path, tmp_path: Path, no_reload: None) -> None:
    def damaged(name: str) -> Path:
        return Path(shutil.copytree(made, tmp_path / name))

    folder = damaged("coverage")
    edit(folder / "manifest.json", lambda manifest: manifest["steps"][0].update(starved_kept=[[1, 0]]))
    assert list(failed(folder)) == ["coverage"]

    folder = damaged("copied")
    change_shard(folder, "model.embed_tokens.weight", lambda tensors: tensors["model.embed_tokens.weight"].add_(1))
    assert list(failed(folder)) == ["bytes"]
    folder = damaged("dropped")
    edit(folder / "manifest.json", lambda manifest: manifest["steps"][-1].update(dropped_bytes=1))
    assert list(failed(folder)) == ["bytes"]

    folder = damaged("missing")
    missing = packed_tensor(folder, "weight_packed")
    change_shard(folder, missing, lambda tensors: tensors.pop(missing))
    assert missing in failed(folder)["keys"]
    for suffix in ("weight_packed", "weight_scale", "weight_zero_point"):
        folder = damaged(suffix)
        info = TensorIndex.from_folder(folder)[packed_tensor(folder, suffix)]
        with info.file.open("r+b") as stream:
            stream.seek(info.start)
            byte = stream.read(1)[0]
            stream.seek(info.start)
            stream.write(bytes([byte ^ 1]))
        assert list(failed(folder)) == ["keys"] and info.file.name in failed(folder)["keys"]

    folder = damaged("budget")

    def exceed(manifest: dict[str, Any]) -> None:
        manifest["steps"][1]["targets"][0]["achieved"] = 3.1

    edit(folder / "manifest.json", exceed)
    assert "3.1 (asked: at most 3)" in failed(folder)["target"]
    folder = damaged("larger")
    edit(folder / "manifest.json", lambda manifest: manifest.update(stored_bytes=1))
    assert list(failed(folder)) == ["target"]


def test_wrong_scale_is_seen_by_the_logits_alone(out: Path) -> None:
    suffix = "down_proj.weight_scale"

    def triple(tensors: dict[str, torch.Tensor]) -> None:
        for name in (name for name in tensors if name.endswith(suffix)):  # the probe need not come to every expert
            tensors[name].mul_(3)

    change_shard(out, packed_tensor(out, suffix), triple)
    assert list(failed(out)) == ["logits"]


def test_shard_cut_short(out: Path) -> None:
    """One sentence, from the loading and from `verify`."""
    file = TensorIndex.from_folder(out)[packed_tensor(out, "weight_packed")].file
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 100)
    found = failed(out)
    assert {"bytes", "keys", "logits"} <= set(found) and file.name in found["keys"]
    assert all("\n" not in sentence for sentence in found.values())
    done = CliRunner().invoke(app, ["verify", str(out)])
    assert done.exit_code == 3, done.output
    done = CliRunner().invoke(app, ["eval", str(out)])
    assert done.exit_code == 1 and file.name in done.output.replace("\n", ""), done.output


# ------------------------------------------------------------------------------------------------------ kill and resume


@pytest.mark.usefixtures("no_reload")
def test_interrupted_while_quantizing_ends_the_same(source: Path, texts: Path, tmp_path: Path) -> None:
    """Also what the run remembers of the layers that were done: experts whose statistics were pooled."""
    settings = recipe(source, texts, MIXED)
    moe_compress.run(settings, tmp_path / "one")
    expected = content(tmp_path / "one")
    assert json.loads(expected["manifest.json"])["steps"][0]["pooled"], "some experts have few tokens here"
    for units in (LAYERS + 1, 2 * LAYERS - 1):
        with interrupted_at(units) as progress:
            moe_compress.run(settings, tmp_path / "two", progress=progress)
        moe_compress.run(settings, tmp_path / "two", resume=True)
        found = content(tmp_path / "two")
        assert [name for name in expected if expected[name] != found.get(name)] == []
        shutil.rmtree(tmp_path / "two")


@pytest.mark.usefixtures("no_reload")
def test_killed_anywhere_and_resumed_ends_bit_identical(source: Path, texts: Path, tmp_path: Path) -> None:
    """By SIGKILL before file operations from the first to the last, every second run twice."""
    killed_and_resumed(tmp_path / "runs", recipe=recipe(source, texts, MIXED), kills=5)


# ------------------------------------------------------------------------------------------------------------ bad input


def failure(settings: dict[str, Any], folder: Path, exit_code: int) -> str:
    """What the command says of a recipe; nothing is left where OUT would be."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    done = CliRunner().invoke(app, ["run", str(folder / "recipe.yaml"), str(folder / "out")])
    assert done.exit_code == exit_code, done.output
    assert not (folder / "out").exists() and "Traceback" not in done.output
    return " ".join(done.output.split())


@pytest.mark.parametrize(
    ("changes", "tier", "said"),
    [
        ({"bits": 0}, "plugin", "steps.0.bits"),
        ({"bits": 9}, "plugin", "steps.0.bits"),
        ({"bits": 2.5}, "plugin", "steps.0.bits"),
        ({"bits": None, "average_bits": 3, "options": [0, 4]}, "plugin", "steps.0.options"),
        ({"group_size": 0}, "plugin", "steps.0.group_size"),
        ({"group_size": 24}, "plugin", "group_size: 24 does not divide the 32 inputs of gate_proj in layer 0"),
        (
            {"attention": {"group_size": 24}},
            "plugin",
            "attention.group_size: 24 does not divide the 32 inputs of self_attn.q_proj in layer 0; choose one of 8, "
            "16, 32, which divide all that it holds for, or `channel`.",
        ),
        (
            {"embeddings": {"group_size": 48}},
            "plugin",
            "embeddings.group_size: 48 does not divide the 32 inputs of the embeddings; choose one of 8, 16, 32, which",
        ),
        ({"bits": None, "average_bits": 3, "options": []}, "plugin", "options: should name at least one width"),
        ({"bits": None, "average_bits": 2.5, "options": [4]}, "plugin", "offers no fewer than 4 bits"),
        (
            {"bits": None, "average_bits": 3, "minimum_counts": {"5": 1}},
            "plugin",
            "steps.0.minimum_counts: `options` does not offer 5 bits",
        ),
        (
            {"bits": None, "average_bits": 3, "minimum_counts": {"3": 9}},
            "plugin",
            "minimum_counts asks for 9 experts, and layer 0 has 8",
        ),
        ({"method": "nf4", "bits": None, "attention": {"bits": 4}}, "plugin", "steps.0.attention.bits: has no effect"),
        ({"bits": None}, "plugin", "give either `bits`"),
        ({"bits": None, "average_bits": 3}, "stock", "silently wrong"),
        ({"bits": None, "average_bits": 3, "keep_option": True, "allow_drop": True}, "stock", "one scheme"),
        ({"symmetric": False}, "stock", "zero points"),
        ({"method": "nf4", "bits": None}, "stock", "does not load `nf4`"),
        ({"bits": 1}, "stock", "1-bit"),
        ({"attention": {"bits": 1}}, "stock", "1-bit"),
        ({"attention": {"bits": 8}, "dense_mlp": {"bits": 4}}, "stock", "one scheme for all linear layers"),
    ],
)  # fmt: skip
def test_settings_are_refused(
    changes: dict[str, Any], tier: str, said: str, source: Path, texts: Path, tmp_path: Path
) -> None:
    step = {"op": "quantize", "method": "rtn", "bits": 4, "group_size": 16} | changes
    step = {key: value for key, value in step.items() if value is not None and (key, value) != ("group_size", None)}
    if step["method"] == "nf4":
        del step["group_size"]
    message = failure(recipe(source, texts, step, tier=tier), tmp_path, 2)
    assert said in message
    assert not (tmp_path / "out.work").exists()
    validated = CliRunner().invoke(app, ["validate", str(tmp_path / "recipe.yaml")])
    assert validated.exit_code == 2 and said in " ".join(validated.output.split())


def test_settings_with_nothing_to_act_on_are_named(source: Path, texts: Path, tmp_path: Path) -> None:
    step = {"op": "quantize", "method": "rtn", "average_bits": 6, "group_size": 16, "shared_experts": {"bits": 4},
            "allocation": "random", "cost": "pmq"}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(source, texts, step)))
    expected = [
        "steps.0.shared_experts: this model has no such linear layers, so it changes nothing; leave it out.",
        "steps.0.cost: allocation `random` looks at no loss, so it changes only the loss that is reported; leave it "
        "out.",
        "steps.0.average_bits: 6 is more than the options can take, 4 (super experts aside), so every expert gets the "
        "most.",
    ]
    assert moe_compress.plan(tmp_path / "recipe.yaml")["warnings"] == expected
    validated = CliRunner().invoke(app, ["validate", str(tmp_path / "recipe.yaml")])
    assert validated.exit_code == 0
    assert validated.output.splitlines()[:3] == [f"warning: {said}" for said in expected]
    fine = step | {"average_bits": 3, "shared_experts": None, "allocation": "optimal"}
    assert moe_compress.plan(recipe(source, texts, fine))["warnings"] == []


def test_formats_of_bitsandbytes_are_said_to_have_groups_of_their_own(source: Path, texts: Path) -> None:
    for method, said in (("nf4", "nf4, blocks of 64 weights: 4.000"), ("int8", "int8, a scale per row: 8.000")):
        step = {"op": "quantize", "method": method, "embeddings": {"bits": 8}}
        (entry,) = moe_compress.plan(recipe(source, texts, step))["steps"]
        assert entry["summary"][0].startswith(said)
        shapes = Sizes.of_config(open_config(str(source))[0], 0)
        config = with_group_size(QuantizeConfig.model_validate(step), shapes)
        assert config.group_size == 32 and "group_size" in effective(config), "that of the embeddings"
        plain = QuantizeConfig.model_validate(step | {"embeddings": None})
        assert not {"group_size", "symmetric", "scale_search", "options"} & effective(plain).keys()


def test_what_cannot_be_packed_is_known_before_the_weights_are_read(texts: Path, tmp_path: Path) -> None:
    """`run` refuses it too, later steps or not."""
    save(tiny_model(tiny_config("gpt_oss")), tmp_path / "model")
    for steps in ([W4], [UNEVEN | {"scope": "layer"}, W4]):
        settings = recipe(tmp_path / "model", texts, *steps, tier="stock")
        with pytest.raises(UnsupportedModelError, match="not stored expert by expert"):
            moe_compress.plan(settings)


def test_nothing_follows_quantization(source: Path, texts: Path, tmp_path: Path) -> None:
    step = {"op": "quantize", "method": "rtn", "bits": 4, "group_size": 16}
    assert "must be the last step" in failure(recipe(source, texts, step, UNEVEN), tmp_path, 2)
    assert "must be the last step" in failure(recipe(source, texts, step, step), tmp_path, 2)


def test_packed_folder_is_no_source(made: Path, texts: Path, tmp_path: Path) -> None:
    message = failure(recipe(made, texts, W4), tmp_path, 1)
    assert "quantized (by moe-compress)" in message and "name the original" in message


@pytest.mark.parametrize("budget", [{"average_bits": 1.5}, {"stored_bytes": "10KB"}, {"active_bytes": 10}])
@pytest.mark.usefixtures("no_reload")
def test_infeasible_budget(budget: dict[str, Any], source: Path, texts: Path, tmp_path: Path) -> None:
    step = {"op": "quantize", "method": "rtn", "options": [2, 3], "group_size": 16} | budget
    message = failure(recipe(source, texts, step), tmp_path, 2)
    assert next(iter(budget)) in message.replace(" ", "_") or "budget" in message


@pytest.mark.parametrize("step", [{"bits": 4}, {"average_bits": 3, "options": [2, 4]}], ids=["rtn", "budget"])
def test_weight_that_is_no_number(step: dict[str, Any], source: Path, texts: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    info = TensorIndex.from_folder(folder)[name]
    with info.file.open("r+b") as stream:
        stream.seek(info.start)
        stream.write(b"\xc0\x7f")
    step = {"op": "quantize", "method": "rtn", "group_size": 16} | step
    message = failure(recipe(folder, texts, step), tmp_path, 1)
    assert "NaN" in message and "layer 1" in message.replace("layers.1", "layer 1")


def test_stored_bytes_is_held_exactly(source: Path, texts: Path, tmp_path: Path, no_reload: None) -> None:
    """Also where drops take rows of the router with them, and projections have bits of their own."""
    full = TensorIndex.from_folder(source).nbytes
    for number, changes in enumerate(
        [{}, {"granularity": "projection"}, {"granularity": "layer", "allow_drop": False}]
    ):
        budget = round(0.55 * full)
        step = {"op": "quantize", "method": "rtn", "stored_bytes": budget, "options": [2, 3, 4], "group_size": 16,
                "allow_drop": True, "scale_search": 1} | changes  # fmt: skip
        out = tmp_path / str(number)
        moe_compress.run(recipe(source, texts, step), out)
        achieved = json.loads((out / "manifest.json").read_text())["steps"][0]["targets"][0]["achieved"]
        assert TensorIndex.from_folder(out).nbytes == achieved <= budget
    edit(out / "manifest.json", lambda manifest: manifest["steps"][0]["targets"][0].update(asked=achieved // 2))
    edit(out / "manifest.json", lambda manifest: manifest["steps"][0]["targets"][0].update(achieved=1))
    assert f"stored_bytes {shown_size(achieved, up=True)} (asked: at most" in failed(out)["target"], "counted again"


def test_experts_without_tokens_are_quantized_and_listed(source: Path, texts: Path, tmp_path: Path) -> None:
    calibration = {"dataset": str(texts), "num_samples": 1, "sequence_length": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "check_logits", lambda folder: checks.Check(True, "not computed here."))
        report = moe_compress.run(recipe(source, texts, MIXED | {"allow_drop": False}, calibration=calibration),
                                  tmp_path / "out")  # fmt: skip
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["steps"][0]["coverage"]["starved"] and manifest["steps"][0]["pooled"]
    assert report["checks"]["coverage"]["passed"] and "pooled" in report["checks"]["coverage"]["detail"]
    assert issubclass(RecipeError, MoECompressError)


DROPS = {"op": "quantize", "method": "rtn", "average_bits": 2.0, "options": [4], "group_size": 16, "allow_drop": True,
         "scale_search": 1}  # fmt: skip


@pytest.mark.usefixtures("no_reload")
def test_every_layer_may_lose_as_many_experts(
    source: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The count then stands once in the configuration, and every layer has it."""
    original = QuantizeStep.plan

    def first_four(step: QuantizeStep, *args: Any) -> Any:
        plan = original(step, *args)
        layers = tuple(
            replace(layer, keep=tuple(range(4)), options=dict.fromkeys(layer.options, ("4",) * 4))
            for layer in plan.layers
        )
        return replace(plan, layers=layers, expert_bytes=plan.expert_bytes)

    monkeypatch.setattr(QuantizeStep, "plan", first_four)
    with pytest.raises(VerificationError) as caught:  # whose bytes are not those of the first plan
        moe_compress.run(recipe(source, texts, DROPS), tmp_path / "out")
    assert caught.value.checks["keys"]["passed"]
    config = json.loads((tmp_path / "out.work/step-0/checkpoint/config.json").read_text())
    assert config["moe_compress"]["num_experts"] == 4


def test_experts_in_groups_are_not_dropped_and_this_is_known_early(texts: Path, tmp_path: Path) -> None:
    config = tiny_config("deepseek_v3")
    config.n_group, config.topk_group = 2, 1
    save(tiny_model(config), tmp_path / "model")
    with pytest.raises(UsageError, match="limits its choice to 2 groups"):
        moe_compress.plan(recipe(tmp_path / "model", texts, DROPS | {"group_size": 4}))


@pytest.mark.parametrize("step", [{"method": "rtn", "bits": 3}, {"method": "nf4"}, {"method": "gptq", "bits": 3}])
@pytest.mark.usefixtures("no_reload")
def test_experts_are_quantized_as_many_together_as_memory_allows(
    step: dict[str, Any], source: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few at a time: the same tensors, and with gptq the calibration passes every matrix once all the same."""
    calls = dict[str, list[int]](together=[], counted=[])
    quantize, count = QuantizeChange._quantize, Moments._count

    def seen(change: QuantizeChange, weights: torch.Tensor, *arguments: Any) -> Any:
        calls["together"].append(len(weights))
        return quantize(change, weights, *arguments)

    def counted(moments: Moments, name: str, members: list[int], width: int) -> Any:
        calls["counted"].append(len(members))
        return count(moments, name, members, width)

    monkeypatch.setattr(QuantizeChange, "_quantize", seen)
    monkeypatch.setattr(Moments, "_count", counted)
    settings = recipe(source, texts, {"op": "quantize"} | step)
    moe_compress.run(settings, tmp_path / "whole")
    assert set(calls["together"]) == {8}
    monkeypatch.setattr(apply_module, "QUANTIZED_BYTES", 16 * 32 * 32 * 2)
    calls["together"].clear()
    calls["counted"].clear()
    moe_compress.run(settings, tmp_path / "parts")
    assert set(calls["together"]) == {2, 4}, "a matrix of gate and up is twice that of down"
    assert calls["counted"] == ([8] * 2 * LAYERS if step["method"] == "gptq" else [])
    whole, parts = ({name: read_tensor(i) for name, i in TensorIndex.from_folder(tmp_path / out).items()}
                    for out in ("whole", "parts"))  # fmt: skip
    assert whole.keys() == parts.keys()
    assert step["method"] == "gptq" or all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.usefixtures("no_reload")
def test_a_resumed_run_keeps_its_plan(
    source: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program is not solved again: out of time, a solver need not find the same twice."""
    settings, out = recipe(source, texts, DROPS), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        moe_compress.run(settings, out, progress=Recording("apply"))
    chosen = json.loads((tmp_path / "out.work/step-0/plan.json").read_text())

    def solved_again(*args: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(QuantizeStep, "plan", solved_again)
    moe_compress.run(settings, out, resume=True)
    assert json.loads((out / "plan.json").read_text())["steps"] == [chosen]


def test_a_sweep_needs_no_budget_and_goes_on_where_one_cannot_be_met(source: Path, texts: Path, tmp_path: Path) -> None:
    settings = recipe(source, texts, {key: value for key, value in DROPS.items() if key != "average_bits"})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    words = ["plan", str(tmp_path / "recipe.yaml")]
    assert "a budget can be average_bits 1 to 4 or stored_bytes" in CliRunner().invoke(app, words).output
    moe_compress.score(settings, tmp_path / "scores")
    words += ["--scores", str(tmp_path / "scores")]
    frontier = tmp_path / "frontier.csv"
    done = CliRunner().invoke(app, [*words, "--sweep", "average_bits=0.5:4:1.75", "--output", str(frontier)])
    assert done.exit_code == 0, done.output
    first, *others = csv.DictReader(frontier.open())
    assert "0.5 cannot be reached: the least possible is 1" in first["infeasible"] and first["stored"] == ""
    assert first["infeasible"][:40] in done.output
    assert [float(entry["bits"]) for entry in others] == [4 * 13 / 24, 4.0]  # 13 of 24 experts stay
    assert not any(entry["infeasible"] for entry in others)
    for other in (2.25, 4):  # the same as of the budget in the recipe
        planned = moe_compress.plan(settings, scores=tmp_path / "scores", overrides=[f"steps.0.average_bits={other}"])
        assert f"{planned['predicted']['stored_bytes']}" in [entry["stored"] for entry in others]
    done = CliRunner().invoke(app, [*words, "--sweep", "stored_bytes=1KB:2KB:1KB"])
    assert done.exit_code == 2 and "no budget of the sweep can be met" in done.output
    done = CliRunner().invoke(
        app, [*words, "--sweep", "average_bits=1:4:1", "--output", str(tmp_path / "no" / "x.csv")]
    )
    assert done.exit_code == 2 and "does not exist" in done.output
    done = CliRunner().invoke(app, [*words, "--sweep", "average_bits=1:4:1", "--hours"])
    assert done.exit_code == 2 and "--hours has no effect with --sweep" in done.output
    done = CliRunner().invoke(app, [*words, "--sweep", "average_bits=1:1e9:0.001"])
    assert done.exit_code == 2 and "take 1000 at most" in done.output
    done = CliRunner().invoke(app, [*words, "--sweep", "average_bits=1:4:1", "--output", str(tmp_path)])
    assert done.exit_code == 2 and "is a folder" in done.output
    twin = tiny_checkpoint(tmp_path / "twin", seed=1)
    with pytest.raises(UsageError, match="measured on another model"):
        sweep(load_recipe(settings | {"model": str(twin)}), tmp_path / "scores", "average_bits", [2.0])


def test_starved_experts_are_named(source: Path, texts: Path, tmp_path: Path, no_reload: None) -> None:
    settings = recipe(source, texts, DROPS)
    settings["calibration"] = settings["calibration"] | {"min_tokens_per_expert": 10**6}
    detail = moe_compress.run(settings, tmp_path / "out")["checks"]["coverage"]["detail"]
    assert "statistics pooled over their layer" in detail and "dropped because too few" in detail
