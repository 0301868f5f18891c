"""The whole pipeline on tiny checkpoints: what OUT holds, what a kill leaves, and how every mistake ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig
from typer.testing import CliRunner

import moe_compress
from moe_compress import manifest, pipeline
from moe_compress.checkpoint.hidden import save_hidden
from moe_compress.checkpoint.index import TensorIndex
from moe_compress.cli import app
from moe_compress.errors import CheckpointError, ResumeError, UsageError
from moe_compress.progress import SilentProgress
from moe_compress.workspace import explained_disk_errors
from tests.crashes import killed_and_resumed
from tests.fork_server import PLAIN_TRANSFORMERS
from tests.tiny_checkpoint import tiny_recipe, write_texts

ROOT = Path(__file__).parents[2]
BESIDE_THE_WEIGHTS = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json",
    "recipe.yaml", "plan.json", "experts.json", "manifest.json", "ledger.json", "probe.npz", "report.json", "report.md",
    "report.html", "README.md",
}  # fmt: skip
LAYERS, EXPERTS = 3, 8


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        found |= load_file(shard)
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@contextmanager
def interrupted_at(units: int) -> Iterator[SilentProgress]:
    """A progress that raises when this many layers were passed, over all stages."""
    left = [units]

    class Interrupting(SilentProgress):
        @contextmanager
        def stage(self, name: str, total: int, unit: str = "layer") -> Iterator[Any]:
            class Counter:
                def advance(self, detail: str = "") -> None:
                    left[0] -= 1
                    if not left[0]:
                        raise KeyboardInterrupt

            yield Counter()

    with pytest.raises(KeyboardInterrupt):
        yield Interrupting()


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`moe-compress` in a process of its own; `test_real_kill_of_the_command` starts it as users do."""
    line = [sys.executable, "-c", "from moe_compress.cli import app; app()", *map(str, arguments)]
    return PLAIN_TRANSFORMERS.run(line, env=os.environ | {"PYTHONPATH": str(ROOT)})


def recipe_file(folder: Path, recipe: dict[str, Any]) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


# ------------------------------------------------------------------------------------------------------- what OUT holds


def test_prune_from_start_to_finish(source: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = moe_compress.run(tiny_recipe(source, texts, 0.75), out)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"], "the work folder is gone"
    assert {name for name in content(out) if not name.startswith("model-")} == BESIDE_THE_WEIGHTS
    assert json.loads((out / "report.json").read_text()) == report
    files = json.loads((out / "manifest.json").read_text())["files"]
    assert content(out).keys() - files.keys() == {"manifest.json", "README.md", "report.html"}
    measured = json.loads((out / "experts.json").read_text())["steps"][0]["layers"]
    assert [(layer["layer"], len(layer["statistics"]["tokens"])) for layer in measured] == [
        (layer, EXPERTS) for layer in range(LAYERS)
    ]
    page = (out / "report.html").read_bytes()
    assert moe_compress.write_page(out).read_bytes() == page, "it is made of what is in the folder and nothing else"
    assert {name: check["passed"] for name, check in report["checks"].items()} == dict.fromkeys(
        ("coverage", "bytes", "keys", "logits", "target"), True
    )
    before, after = tensors(source), tensors(out)
    plan = json.loads((out / "plan.json").read_text())["steps"][0]["layers"]
    assert [layer["layer"] for layer in plan] == list(range(LAYERS))
    assert all(len(layer["keep"]) == 6 and layer["num_experts"] == EXPERTS for layer in plan)
    expected = {name: tensor for name, tensor in before.items() if ".mlp." not in name}
    for layer in plan:
        prefix = f"model.layers.{layer['layer']}.mlp."
        expected[f"{prefix}gate.weight"] = before[f"{prefix}gate.weight"][layer["keep"]]
        for new, old in enumerate(layer["keep"]):
            for part in ("gate_proj", "up_proj", "down_proj"):
                expected[f"{prefix}experts.{new}.{part}.weight"] = before[f"{prefix}experts.{old}.{part}.weight"]
    assert after.keys() == expected.keys()
    for name, tensor in expected.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    assert AutoConfig.from_pretrained(out).num_experts == 6
    stored = sum(tensor.nbytes for tensor in expected.values())
    assert (
        report["compressed"]["stored_bytes"]
        == json.loads((out / "manifest.json").read_text())["stored_bytes"]
        == stored
    )
    assert report["ratio"]["stored_bytes"] == pytest.approx(stored / sum(tensor.nbytes for tensor in before.values()))
    assert max(file.stat().st_size for file in out.glob("*.safetensors")) < 24_000, "max_shard_size is kept"


@pytest.mark.usefixtures("no_reload")
def test_what_is_published_names_no_place_but_the_licence(own_source: Path, texts: Path, tmp_path: Path) -> None:
    (own_source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    (own_source / "LICENSE").write_text("Its text.\n")
    out = tmp_path / "out"
    recipe = tiny_recipe(own_source, texts, 0.75, 0.5)
    data = {"dataset": str(texts), "num_samples": 2, "sequence_length": 32}
    step = {"op": "distill", "teacher_model": str(own_source), "data": data, "trainable": ["routers"]}
    moe_compress.run(recipe | {"steps": [*recipe["steps"], step]}, out)
    for name, data in content(out).items():
        assert str(tmp_path).encode() not in data and str(texts.parent).encode() not in data, name
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert (recipe["model"], recipe["calibration"]["dataset"]) == ("model", "texts.txt")
    card = (out / "README.md").read_text()
    matter = yaml.safe_load(card.split("---\n")[1])
    assert matter["license"] == "apache-2.0" and "pruned" in matter["tags"]
    assert (
        "with moe-compress (prune, prune, distill)" in card
        and ": None" not in card
        and (out / "LICENSE").read_text() == "Its text.\n"
    )


@pytest.mark.usefixtures("no_reload")
def test_foreign_manifest_is_no_result_to_resume(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text('{"name": "an extension of a browser"}')
    with pytest.raises(UsageError, match="exists"):
        moe_compress.run({"model": str(source), "steps": [], "eval": {"speed": False}}, out, resume=True)


@pytest.mark.usefixtures("no_reload")
def test_no_steps_is_the_identity(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = {"model": str(source), "steps": [], "eval": {"speed": False}}
    report = moe_compress.run(recipe, out)
    before, after = tensors(source), tensors(out)
    assert before.keys() == after.keys()
    assert all(
        after[name].dtype == tensor.dtype and torch.equal(after[name], tensor) for name, tensor in before.items()
    )
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((out / "plan.json").read_text()) == {"steps": []}
    ratios = report["ratio"]
    assert {share for key in ratios.copy() if key.endswith("_by_part") for share in ratios.pop(key).values()} | {
        *ratios.values()
    } == {1.0}


@pytest.mark.usefixtures("no_reload")
def test_two_steps_prune_what_the_first_left(source: Path, texts: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "elsewhere"
    moe_compress.run(tiny_recipe(source, texts, 0.75, 0.5), out, work=work, keep_steps=True)
    first, second = json.loads((out / "plan.json").read_text())["steps"]
    before, after = tensors(source), tensors(out)
    for one, two in zip(first["layers"], second["layers"], strict=True):
        assert (one["num_experts"], len(one["keep"])) == (8, 6)
        assert (two["num_experts"], len(two["keep"])) == (6, 3)
        prefix = f"model.layers.{one['layer']}.mlp."
        kept = [one["keep"][index] for index in two["keep"]]
        assert torch.equal(after[f"{prefix}gate.weight"], before[f"{prefix}gate.weight"][kept])
        for new, old in enumerate(kept):
            name = "down_proj.weight"
            assert torch.equal(after[f"{prefix}experts.{new}.{name}"], before[f"{prefix}experts.{old}.{name}"])
        assert f"{prefix}experts.3.down_proj.weight" not in after
    assert AutoConfig.from_pretrained(out).num_experts == 3
    assert AutoConfig.from_pretrained(work / "step-0" / "checkpoint").num_experts == 6, "--keep-steps"
    manifest = json.loads((out / "manifest.json").read_text())
    assert [step["targets"][0]["achieved"] for step in manifest["steps"]] == [0.75, 0.5]


@pytest.mark.usefixtures("no_reload")
def test_rounding_to_a_multiple_misses_no_target(source: Path, texts: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(source, texts, 0.6)
    recipe["steps"][0]["multiple_of"] = 4
    moe_compress.run(recipe, tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").num_experts == 4


@pytest.mark.usefixtures("no_reload")
def test_existing_out(source: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("precious")
    recipe = tiny_recipe(source, texts, 0.75)
    with pytest.raises(UsageError, match="--force"):
        moe_compress.run(recipe, out)
    for resume in (False, True):
        with pytest.raises(UsageError, match="not made by moe-compress"):
            moe_compress.run(recipe, out, force=True, resume=resume)
    assert content(tmp_path) == {"out/old": b"precious"}
    (out / "manifest.json").write_text('{"tool": "moe-compress 0.0.1"}')
    with interrupted_at(LAYERS + 2) as progress:
        moe_compress.run(recipe, out, force=True, progress=progress)
    assert content(out)["old"] == b"precious", "the old one stays until the new one is complete"
    moe_compress.run(recipe, out, force=True, resume=True)
    assert "old" not in content(out) and [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("no_reload")
def test_scores_serve_other_budgets_but_no_other_calibration(source: Path, texts: Path, tmp_path: Path) -> None:
    recipe, work = tiny_recipe(source, texts, 0.75), tmp_path / "scores"
    scores = moe_compress.score(recipe, work)
    before = content(work)
    planned = moe_compress.plan(recipe, scores=work, overrides=["steps.0.keep=0.5"])
    assert [len(layer["keep"]) for layer in planned["steps"][0]["layers"]] == [4] * LAYERS
    again = moe_compress.score(recipe, work)
    assert again.fingerprint == scores.fingerprint and content(work) == before
    with pytest.raises(ResumeError, match=r"calibration\.seed: 0 -> 1"):
        moe_compress.score(recipe, work, overrides=["calibration.seed=1"])
    assert content(work) == before


def test_dry_run_writes_nothing(source: Path, texts: Path, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, tiny_recipe(source, texts, 0.75, 0.5))
    before = content(tmp_path), content(source)
    done = CliRunner().invoke(app, ["run", str(recipe), str(tmp_path / "out"), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "nothing was written" in done.stdout and "6" in done.stdout and "3" in done.stdout
    assert (content(tmp_path), content(source)) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.yaml"]


# ------------------------------------------------------------------------------------------------------ kill and resume


def states(answer: dict[str, Any]) -> set[str]:
    return {state for kill in answer["kills"] for state in kill["between"]}


@pytest.mark.usefixtures("no_reload")
def test_killed_anywhere_and_resumed_ends_bit_identical(source: Path, texts: Path, tmp_path: Path) -> None:
    """Just before file operations from the first to the last, every second run twice."""
    answer = killed_and_resumed(tmp_path / "runs", recipe=tiny_recipe(source, texts, 0.75, 0.5), kills=12)
    assert answer["operations"] > 150 and set(answer["files"]) > BESIDE_THE_WEIGHTS
    assert states(answer) == {"nothing", "new"}, "never half an OUT"


@pytest.mark.usefixtures("no_reload")
def test_what_a_kill_cut_short_is_no_part_of_the_result(
    source: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = tiny_recipe(source, texts, 0.75), tmp_path / "out"

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pipeline.verification, "verify", killed)
        moe_compress.run(recipe, out)
    (folder,) = tmp_path.glob("out.work/step-*/checkpoint")
    for name in ("manifest.json.part", "report.html.part", ".eval_results/x.yaml.part"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("half")
    moe_compress.run(recipe, out, resume=True)
    assert not list(out.rglob("*.part"))
    assert not any(name.endswith(".part") for name in json.loads((out / "manifest.json").read_text())["files"])


@pytest.mark.usefixtures("no_reload")
def test_killed_while_replacing_an_older_result(source: Path, texts: Path, tmp_path: Path) -> None:
    recipe, options = tiny_recipe(source, texts, 0.75), {"force": True}
    answer = killed_and_resumed(tmp_path / "runs", recipe=recipe, kills=6, options=options, old=True, seed=1)
    assert states(answer) == {"old", "new"}, "the older result is there until the new one is"


@pytest.mark.usefixtures("no_reload")
def test_killed_identity(source: Path, tmp_path: Path) -> None:
    recipe = {"model": str(source), "steps": [], "export": {"max_shard_size": "20KB"}, "eval": {"speed": False}}
    answer = killed_and_resumed(tmp_path / "runs", recipe=recipe, kills=3, seed=2)
    assert states(answer) <= {"nothing", "new"}


def test_real_kill_of_the_command(source: Path, texts: Path, tmp_path: Path) -> None:
    """`kill -9` of the process while it writes layers, and `--resume`."""
    recipe, out = recipe_file(tmp_path, tiny_recipe(source, texts, 0.75)), tmp_path / "out"
    line = [sys.executable, "-m", "moe_compress", "run", str(recipe), str(out)]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    try:
        while not (tmp_path / "out.work" / "step-0" / "checkpoint" / "parts.json").exists():
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.001)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL and not out.exists()
    with pytest.raises(UsageError, match="--resume"):
        moe_compress.run(str(recipe), out)
    done = subprocess.run([*line, "--resume"], capture_output=True, text=True, cwd=ROOT, check=False, timeout=3000)
    assert done.returncode == 0, done.stderr
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "recipe.yaml"]
    uninterrupted = tmp_path / "uninterrupted"
    moe_compress.run(str(recipe), uninterrupted)
    assert content(out) == content(uninterrupted)


@pytest.fixture
def own_source(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "model"))


@pytest.mark.usefixtures("no_reload")
def test_another_run_is_not_resumed(
    own_source: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out, work = tiny_recipe(own_source, texts, 0.75), tmp_path / "out", tmp_path / "out.work"
    with interrupted_at(LAYERS + 1) as progress:
        moe_compress.run(recipe, out, progress=progress)
    before = content(work)

    def refusal(**changed: Any) -> str:
        with pytest.raises(ResumeError) as caught:
            moe_compress.run(recipe, out, resume=True, **changed)
        assert content(work) == before and not out.exists()
        return str(caught.value)

    message = refusal(overrides=["steps.0.keep=0.5", "calibration.seed=3"])
    assert "recipe.steps.0.keep: 0.75 -> 0.5" in message and "recipe.calibration.seed: 0 -> 3" in message
    assert "fingerprint" not in message

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "__version__", "99")
        assert f'version: "{moe_compress.__version__}" -> "99"' in refusal()

    shard = sorted(own_source.glob("*.safetensors"))[1]
    times = shard.stat().st_atime_ns, shard.stat().st_mtime_ns
    os.utime(shard)
    message = refusal()
    assert "source.fingerprint" in message and "recipe" not in message
    os.utime(shard, ns=times)
    moe_compress.run(recipe, out, resume=True)
    assert out.exists() and not work.exists()


@pytest.mark.usefixtures("no_reload")
def test_other_texts_are_not_resumed(source: Path, texts: Path, tmp_path: Path) -> None:
    own = Path(shutil.copyfile(texts, tmp_path / "texts.txt"))
    recipe, out = tiny_recipe(source, own, 0.75), tmp_path / "out"
    with interrupted_at(2) as progress:
        moe_compress.run(recipe, out, progress=progress)
    write_texts(own, seed=1)
    with pytest.raises(ResumeError, match="calibration data"):
        moe_compress.run(recipe, out, resume=True)
    shutil.copyfile(texts, own)
    moe_compress.run(recipe, out, resume=True)


@pytest.mark.usefixtures("no_reload")
def test_resuming_what_is_complete_gives_its_report(source: Path, texts: Path, tmp_path: Path) -> None:
    recipe, out = tiny_recipe(source, texts, 0.75), tmp_path / "out"
    report = moe_compress.run(recipe, out)
    before = content(out)
    assert moe_compress.run(recipe, out, resume=True) == report
    assert content(out) == before and [entry.name for entry in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UsageError, match="--force"):
        moe_compress.run(recipe, out, resume=True, overrides=["steps.0.keep=0.5"])


# --------------------------------------------------------------------------------------------------------------- errors


def failure(
    recipe: dict[str, Any], folder: Path, code: int, out: Path | None = None, *, work_left: bool = False
) -> str:
    """The one sentence with which a run of the command ends."""
    out = out or folder / "out"
    done = command("run", recipe_file(folder, recipe), out)
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("[")]  # progress
    assert len(lines) == 1 and lines[0].startswith("error: ") and lines[0].endswith("."), done.stderr
    assert "Traceback" not in done.stderr and "unexpected" not in done.stderr
    assert not out.exists() and out.with_name("out.work").exists() == work_left
    return lines[0]


def test_dense_model(texts: Path, tmp_path: Path) -> None:
    model = tmp_path / "dense"
    model.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 258}  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    save_hidden(model, 0, [torch.zeros(2, 2)])  # some safetensors file
    assert "LlamaForCausalLM has no routed experts" in failure(tiny_recipe(model, texts, 0.75), tmp_path, 1)


def test_pickle_checkpoint(own_source: Path, texts: Path, tmp_path: Path) -> None:
    for file in (*own_source.glob("*.safetensors"), own_source / "model.safetensors.index.json"):
        file.unlink()
    torch.save({"a": torch.zeros(2)}, own_source / "pytorch_model.bin")
    assert "pickle" in failure(tiny_recipe(own_source, texts, 0.75), tmp_path, 1)


def test_truncated_shard(own_source: Path, texts: Path, tmp_path: Path) -> None:
    shard = sorted(own_source.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 10)
    message = failure(tiny_recipe(own_source, texts, 0.75), tmp_path, 1)
    assert shard.name in message and "cut short" in message and "download it again" in message


def test_unknown_dataset(source: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(source, Path("nobody/nothing"), 0.75)
    assert "nobody/nothing" in failure(recipe, tmp_path, 1)


def test_more_experts_than_there_are(source: Path, texts: Path, tmp_path: Path) -> None:
    """Said before anything is measured, also where only the second step asks for too much."""
    message = failure(tiny_recipe(source, texts, 9), tmp_path, 2)
    assert "keep: 9" in message and "8" in message
    with pytest.raises(UsageError, match="keep: 7 asks for more experts than the 6"):
        moe_compress.run(tiny_recipe(source, texts, 0.75, 7), tmp_path / "out")
    assert not (tmp_path / "out.work").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Any]:
    """Mounts a tmpfs of so many bytes, or makes it larger."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def sized(size: int) -> Path:
        nonlocal mounted
        options = f"{'remount,' if mounted else ''}size={size}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("a tmpfs can only be mounted by root")
        mounted = True
        return place

    yield sized
    if mounted:
        subprocess.run(["umount", place], check=True)


def test_full_disk(source: Path, texts: Path, tmp_path: Path, small_disk: Any) -> None:
    """Too small is said at once; what only turns out on the way is a sentence too, and can be continued."""
    recipe = tiny_recipe(
        source, texts, 1.0, calibration={"dataset": str(texts), "num_samples": 4, "sequence_length": 32}
    )
    needed = moe_compress.plan(recipe)["disk_needed"]
    weights = TensorIndex.from_folder(source).nbytes
    assert needed > weights
    disk = small_disk(weights)
    out = disk / "out"
    message = failure(recipe, tmp_path, 1, out)
    assert "needs about" in message and "--work" in message and not any(disk.iterdir())

    small_disk(needed + 4096)  # enough for what was foreseen, but not for the tokenizer and the scores beside it
    message = failure(recipe, tmp_path, 1, out, work_left=True)
    assert "is full" in message and "--resume" in message

    with pytest.raises(CheckpointError, match="is full"), explained_disk_errors(disk):
        save_hidden(disk, 0, [torch.zeros(needed)])

    small_disk(needed * 4)
    moe_compress.run(recipe, out, resume=True)
    assert [entry.name for entry in disk.iterdir()] == ["out"]


@pytest.mark.usefixtures("no_reload")
def test_work_folder_on_another_disk(source: Path, texts: Path, tmp_path: Path, small_disk: Any) -> None:
    """OUT is copied there, still all at once; that it does not fit is said before any work."""
    recipe, out = tiny_recipe(source, texts, 0.75), small_disk(50_000) / "out"
    with pytest.raises(CheckpointError, match="needs about"):
        moe_compress.run(recipe, out, work=tmp_path / "work")
    assert not any(out.parent.iterdir()) and not (tmp_path / "work").exists()
    small_disk(10**6)
    moe_compress.run(recipe, out, work=tmp_path / "work")
    assert [entry.name for entry in out.parent.iterdir()] == ["out"] and not (tmp_path / "work").exists()
    moe_compress.run(recipe, tmp_path / "out")
    assert content(out) == content(tmp_path / "out")
