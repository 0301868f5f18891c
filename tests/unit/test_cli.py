"""The command line: parsing, printing, sentences and exit codes. The work behind it is replaced by fakes."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

import moe_compress
from moe_compress.cli import app
from moe_compress.errors import CheckpointError, ResumeError, UsageError, VerificationError

HELP_SECONDS = 0.5
FIGURES = {"total_params": 1000, "active_params": 500, "stored_bytes": 2000}
PARTS = {"params_by_part": {"routed_experts": 700}, "bytes_by_part": {"routed_experts": 1400}}
CHECKS = {"keys": {"passed": True, "detail": "12 tensors"}, "target": {"passed": True, "detail": "12 of 16"}}
REPORT = {
    "baseline": FIGURES | {"tasks": {"code": {"bpb": {"value": 1.5, "higher_is_better": False}}}},
    "compressed": FIGURES
    | {"stored_bytes": 1500, "tasks": {"code": {"bpb": {"value": 1.6, "higher_is_better": False}}}},
    "ratio": {"total_params": 1.0, "active_params": 1.0, "stored_bytes": 0.75},
    "recovery": {"code": 0.9375},
    "recovery_by_metric": {"code": {"bpb": {"value": 0.9375, "stderr": None}}},
    "provenance": {"tasks": "measured"},
    "random": [{"seed": 0}],
    "random_summary": {"code": {"bpb": {"mean": 1.9, "best": 1.8, "spread": 0.1, "count": 3}}},
    "checks": CHECKS,
}
PLAN = {
    "steps": [
        {
            "op": "prune",
            "criterion": {"b": 1.0, "alpha": 1, "beta": 1},
            "keep": 0.75,
            "experts_per_layer": 3,
            "summary": ["3 experts stay in each layer."],
        },
        {
            "op": "prune",
            "criterion": "reap",
            "keep": 2,
            "experts_per_layer": 2,
            "summary": ["2 of 3 experts kept."],
            "layers": [{"layer": 1, "num_experts": 3, "keep": [0, 2]}],
        },
    ],
    "baseline": FIGURES | PARTS,
    "predicted": FIGURES | PARTS | {"stored_bytes": 1500},
    "tier": "stock",
    "disk_needed": 3_000_000,
    "memory": {
        "process": 2e9,
        "process_stage": "apply",
        "host": 3e9,
        "host_stage": "verify",
        "evaluation": 0,
        "device": 0,
    },
    "warnings": ["the scores are old."],
}
FACTS = {
    "model": "reference",
    "architecture": "Qwen3MoeForCausalLM",
    "model_type": "qwen3_moe",
    "dtype": "bfloat16",
    "num_layers": 8,
    "moe_layers": list(range(8)),
    "num_experts": 16,
    "top_k": 4,
    "experts_per_token": 4.0,
    "shared_experts": False,
    "params": {"routed_experts": 12_000_000, "router": 4096},
    "total_params": 13_000_000,
    "active_params": 4_000_000,
    "bytes": {"routed_experts": 24_000_000},
    "bytes_are": "measured",
    "context": 512,
    "notes": ["a mixer is not counted"],
    "stored_bytes": 26_000_000,
    "flops_per_token": {"routed_experts": 6_000_000},
    "kv_bytes_per_token": 4096,
    "tiers": ["stock: plain transformers loads it."],
}
SUMMARY = {
    "moe_layers": 8,
    "experts": 128,
    "calibration_tokens": 32768,
    "fewest_tokens_per_expert": 0,
    "starved": [[0, expert] for expert in range(10)],
}

Calls = dict[str, tuple[tuple[Any, ...], dict[str, Any]]]
Fakes = Callable[..., Calls]


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """Replace `moe_compress.pipeline` by fakes that return (or raise, or call) what the test says and record calls."""

    def install(**results: Any) -> Calls:
        calls: Calls = {}

        def fake(name: str, result: Any) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                calls[name] = args, options
                if isinstance(result, BaseException):
                    raise result
                return result(*args, **options) if callable(result) else result

            return call

        fakes = SimpleNamespace(**{name: fake(name, result) for name, result in results.items()})
        monkeypatch.setattr(moe_compress, "pipeline", fakes, raising=False)
        return calls

    return install


def invoke(*arguments: str) -> Result:
    return CliRunner(env={"NO_COLOR": "1"}).invoke(app, list(arguments), prog_name="moe-compress")


def verbs() -> list[list[str]]:
    known: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    inside = {name: getattr(command, "commands", None) for name, command in known.items()}
    return [[name] for name in known if not inside[name]] + [
        [name, verb] for name in known for verb in inside[name] or ()
    ]


def test_the_verbs_are_the_promised_ones() -> None:
    assert {words[0] for words in verbs()} == {
        *("inspect", "validate", "score", "plan", "run", "demo", "eval", "verify", "audit", "report"),
        *("push", "recipes"),
    }
    assert {words[1] for words in verbs() if words[1:]} == {"ls", "show", "cp", "schema"}
    overview = invoke("--help").stdout
    for topic in ("Look", "Compress", "Measure", "Publish"):
        assert topic in overview


@pytest.mark.parametrize("words", verbs(), ids=" ".join)
def test_every_verb_has_examples_that_fit_a_line(words: list[str]) -> None:
    help_text = invoke(*words, "--help").stdout
    assert "Examples" in help_text
    shown = help_text.partition("Examples")[2].strip().splitlines()
    assert shown
    assert all(line.strip().startswith("moe-compress ") for line in shown)
    assert any(" ".join(words) in line for line in shown)


def test_help_is_fast() -> None:
    """Median of five runs, in CPU seconds: the suite's workers share the cores, so wall time would measure them."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "moe_compress", "--help"], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert statistics.median(seconds() for _ in range(5)) < HELP_SECONDS


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from moe_compress.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "assert CliRunner().invoke(app, ['push', '--help']).exit_code == 0\n"
        "assert not {'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version() -> None:
    assert invoke("--version").stdout == f"moe-compress {moe_compress.__version__}\n"


def test_recipes_are_listed_shown_copied_and_described(tmp_path: Path) -> None:
    listed = invoke("recipes", "ls").stdout
    assert all(name in listed for name in ("demo", "prune-reap-25", "prune-man-50"))
    shown = invoke("recipes", "show", "demo").stdout
    assert invoke("recipes", "cp", "demo", str(tmp_path)).exit_code == 0
    assert (tmp_path / "demo.yaml").read_text() == shown
    assert invoke("recipes", "cp", "demo", str(tmp_path / "mine.yaml")).exit_code == 0
    assert invoke("validate", str(tmp_path / "mine.yaml")).exit_code == 0
    refused = invoke("recipes", "cp", "demo", str(tmp_path))
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "exists already" in refused.stderr
    assert "does not exist" in invoke("recipes", "cp", "demo", str(tmp_path / "no" / "x.yaml")).stderr
    assert "Recipe" in json.loads(invoke("recipes", "schema").stdout)["title"]


def test_validate_prints_three_mistakes_and_exits_2(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("modle: a\nmodel: a\nsteps:\n- {op: prune, criterion: raep, keep: 2}\ncalibration: {dataset: 1}\n")
    done = invoke("validate", str(file))
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"error: 3 mistakes in {file}:",
        "  line 1: modle: unknown key; did you mean `model`?",
        "  line 4: steps.0.criterion: unknown value `raep`; did you mean `reap`? (one of: random, frequency, seer, "
        "ean, reap, man, msan, easy_ep, mone, ablation)",
        "  line 5: calibration.dataset: should be a text (quote it) or a list, got `1`",
    ]


def test_validate_says_what_is_valid_and_takes_overrides() -> None:
    assert invoke("validate", "demo", "steps.0.keep=0.5").stdout == "demo is valid: prune.\n"
    assert invoke("validate", "demo", "steps.0.keep=2.5").exit_code == 2
    refused = invoke("validate", "demo", "steps.0.scope=global")
    assert refused.exit_code == 2
    assert refused.stderr.startswith(
        "error: demo: steps.0.scope: step 0 (prune): the tier `stock` cannot hold a different number"
    )


@pytest.mark.parametrize("missing", ["model=/no/where", "calibration.dataset=./no-where.jsonl"])
def test_validate_looks_for_what_lies_on_this_disk(missing: str) -> None:
    refused = invoke("validate", "prune-reap-25", missing)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr.endswith(f"{missing.partition('=')[2]} does not exist.\n")


@pytest.mark.parametrize(
    "missing", ["teacher_model=/no/where", "data.dataset=./no-where.jsonl", "accelerate_config=/no/where.yaml"]
)
def test_validate_looks_for_what_a_step_reads(missing: str) -> None:
    refused = invoke("validate", "prune-distill", f"steps.1.{missing}")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert missing.partition("=")[2] in refused.stderr and refused.stderr.endswith("does not exist.\n")


def test_validate_says_that_a_step_makes_the_checkpoint_larger() -> None:
    assert invoke("validate", "tie-2", "steps.0.residual_rank=100").stdout.startswith(
        "warning: steps.0 makes the checkpoint larger: 24.2 MB -> "
    )
    for recipe in ("zeda-50", "tie-8-distill", "budget-joint"):
        assert "larger" not in invoke("validate", recipe).output


def test_a_recipe_without_calibration_measures_nothing(tmp_path: Path) -> None:
    for verb in ("score", "audit"):
        refused = invoke(verb, "nf4", str(tmp_path / "work"))
        assert refused.exit_code == 2 and "give it a `calibration`" in refused.stderr
    assert not (tmp_path / "work").exists()


def test_a_recipe_that_is_not_there() -> None:
    for path in ("/no/mine.yaml", "mine.yml", "no/demo"):
        refused = invoke("validate", path)
        assert (refused.exit_code, refused.stderr) == (2, f"error: the recipe file {path} does not exist.\n")
    assert "did you mean `demo`?" in invoke("validate", "dem").stderr


def test_validate_says_that_groups_are_smaller_than_asked() -> None:
    said = "warning: steps.0.group_size: the largest group of layers that can share a bank is 4.\n"
    assert invoke("validate", "tie-2", "steps.0.group_size=5").stdout == f"{said}tie-2 is valid: tie.\n"
    assert invoke("validate", "tie-2", "steps.0.group_size=4").stdout == "tie-2 is valid: tie.\n"


def test_inspect(pipeline: Fakes) -> None:
    calls = pipeline(inspect=FACTS)
    shown = invoke("inspect", "org/model", "--revision", "main").stdout
    assert calls["inspect"] == (("org/model",), {"revision": "main", "scores": None})
    for text in (
        "Qwen3MoeForCausalLM",
        "16 experts, 4 per token",
        "routed experts",
        "26 MB",
        "stock: plain",
        "a mixer is not",
    ):
        assert text in shown
    assert "a prompt of 512 tokens; stored bytes by part are measured" in shown
    assert json.loads(invoke("inspect", "reference", "--json").stdout) == FACTS


def test_score(pipeline: Fakes, tmp_path: Path) -> None:
    calls = pipeline(score=SimpleNamespace(summary=lambda: SUMMARY))
    done = invoke("score", "demo", str(tmp_path), "steps.0.scope=global", "--device", "cpu")
    (recipe, work), options = calls["score"]
    assert (recipe.steps[0].scope, work) == ("global", tmp_path)
    assert (options["device"], options["force"], options["progress"] is not None) == ("cpu", False, True)
    assert "128 experts in 8 layers, 32,768 calibration tokens" in done.stdout
    assert "0/7 and 2 more" in done.stdout
    assert f"moe-compress plan demo --scores {tmp_path} steps.0.scope=global" in done.stdout
    invoke("score", "demo", str(tmp_path), "--force")
    assert calls["score"][1]["force"]


def test_an_interrupted_score_is_continued_by_the_same_command(pipeline: Fakes, tmp_path: Path) -> None:
    pipeline(score=KeyboardInterrupt())
    done = invoke("score", "demo", str(tmp_path), "calibration.seed=1", "--force", "--device", "cpu")
    again = f"moe-compress score demo {tmp_path} calibration.seed=1 --device cpu"
    assert (done.exit_code, done.stderr) == (
        130,
        f"error: interrupted; what is done is kept in {tmp_path}; continue with: {again}\n",
    )
    assert "nothing was written" in invoke("score", "demo", str(tmp_path / "no")).stderr


def test_plan(pipeline: Fakes, tmp_path: Path) -> None:
    calls = pipeline(plan=PLAN)
    done = invoke("plan", "demo", "steps.0.scope=global", "--scores", str(tmp_path))
    (recipe,), options = calls["plan"]
    assert (recipe.steps[0].scope, options) == ("global", {"scores": tmp_path, "device": "auto", "clocked_at": None})
    for text in (
        "steps.1: prune, criterion reap, keep 2",
        "0 2",
        "1.5 kB",
        "75.0 %",
        "3 experts stay",
        "3 MB",
        "warning: the scores",
    ):
        assert text in done.stdout
    assert json.loads(invoke("plan", "demo", "--json").stdout) == PLAN
    assert calls["plan"][1] == {"scores": None, "device": "auto", "clocked_at": None}


def test_run_passes_everything_on_and_prints_the_table(pipeline: Fakes, tmp_path: Path) -> None:
    calls = pipeline(run=REPORT)
    out, work, scores = tmp_path / "out", tmp_path / "work", tmp_path / "scores"
    done = invoke(
        *("run", "demo", str(out), "steps.0.keep=0.5", "--force", "--resume", "--keep-steps", "--work", str(work)),
        *("--device", "cpu", "--scores", str(scores)),
    )
    assert done.exit_code == 0
    (recipe, folder), options = calls["run"]
    assert (recipe.steps[0].keep, folder, options.pop("progress") is not None) == (0.5, out, True)
    given = {"force": True, "resume": True, "keep_steps": True, "work": work, "scores": scores}
    assert options == given | {"device": "cpu"}
    for text in ("stored size", "1.5 kB", "code · bpb ↓", "93.8 %", "1.9", "12 tensors", "passed", "report.md"):
        assert text in done.stdout


def test_a_dry_run_plans_and_writes_nothing(pipeline: Fakes, tmp_path: Path) -> None:
    calls = pipeline(dry_run=PLAN)
    done = invoke("run", "demo", str(tmp_path / "out"), "--dry-run", "--keep-steps", "--work", str(tmp_path / "work"))
    assert (done.exit_code, list(calls), list(tmp_path.iterdir())) == (0, ["dry_run"], [])
    (_, out), options = calls["dry_run"]
    given = {"resume": False, "force": False, "keep_steps": True, "work": tmp_path / "work", "scores": None}
    given |= {"device": "auto", "hours": False}
    assert (out, options) == (tmp_path / "out", given)
    assert "nothing was written" in done.stdout and "disk needed while it runs: 3 MB" in done.stdout
    assert invoke("run", "demo", str(tmp_path / "out"), "--dry-run", "steps.0.scope=global").exit_code == 2


def test_an_interrupt_says_how_to_continue(pipeline: Fakes, tmp_path: Path) -> None:
    work = tmp_path / "my work"

    def interrupted(*_: Any, **__: Any) -> None:
        work.mkdir()
        raise KeyboardInterrupt

    pipeline(run=interrupted)
    done = invoke("run", "demo", str(tmp_path / "out"), "steps.0.keep=0.5", "--work", str(work), "--force")
    assert done.exit_code == 130
    again = f"moe-compress run demo {tmp_path / 'out'} steps.0.keep=0.5 --resume --force --work '{work}'"
    assert done.stderr == f"error: interrupted; what is done is kept in {work}; continue with: {again}\n"


def test_an_interrupt_before_anything_was_written(pipeline: Fakes, tmp_path: Path) -> None:
    pipeline(run=KeyboardInterrupt(), inspect=KeyboardInterrupt())
    done = invoke("demo", str(tmp_path / "out"))
    assert (done.exit_code, done.stderr) == (130, "error: interrupted; nothing was written yet.\n")
    assert (invoke("inspect", "x").exit_code, invoke("inspect", "x").stderr) == (130, "error: interrupted.\n")


def test_a_scheduler_that_ends_the_job_interrupts_it(pipeline: Fakes, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    pipeline(run=lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    done = invoke("run", "demo", str(tmp_path / "out"))
    assert (done.exit_code, done.stderr) == (130, "error: interrupted; nothing was written yet.\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_demo_runs_the_packaged_recipe(pipeline: Fakes, tmp_path: Path) -> None:
    calls = pipeline(run=REPORT)
    assert invoke("demo", str(tmp_path / "out"), "--force").exit_code == 0
    (recipe, out), options = calls["run"]
    assert (recipe.model, recipe.eval.random_baselines, out) == ("reference", 3, tmp_path / "out")
    assert (options["force"], options["resume"], options["device"]) == (True, False, "auto")
    invoke("demo")
    assert calls["run"][0][1] == Path("demo-out")


def test_eval(pipeline: Fakes, tmp_path: Path) -> None:
    calls = pipeline(evaluate_checkpoint={key: value for key, value in REPORT.items() if key != "checks"})
    done = invoke(
        *("eval", "out", "--baseline", "org/model", "--tasks", "gsm8k, arc_easy", "--limit", "10"),
        *("--output", str(tmp_path), "num_fewshot=5"),
    )
    assert done.exit_code == 0
    assert "recovery" in done.stdout
    (ckpt,), options = calls["evaluate_checkpoint"]
    config = options.pop("config")
    assert options.pop("progress") is not None
    assert (ckpt, options) == ("out", {"baseline": "org/model", "output": tmp_path, "device": "auto"})
    assert (config.tasks, config.limit, config.num_fewshot) == (["gsm8k", "arc_easy"], 10, 5)
    wrong = invoke("eval", "out", "num_fewshots=5")
    assert wrong.exit_code == 2
    assert "did you mean `num_fewshot`?" in wrong.stderr


def test_verify_shows_the_checks_and_exits_3_when_one_fails(pipeline: Fakes, tmp_path: Path) -> None:
    calls = pipeline(verify=CHECKS)
    done = invoke("verify", str(tmp_path))
    assert done.exit_code == 0 and calls["verify"][1]["progress"] is not None
    assert "12 of 16" in done.stdout
    failed = {"keys": {"passed": False, "detail": "a tensor is missing"}}
    failure = VerificationError("check `keys` failed: a tensor is missing.", failed)
    pipeline(verify=failure, run=failure)
    for arguments in (
        ("verify", str(tmp_path)),
        ("run", "demo", str(tmp_path / "out")),
        ("demo", str(tmp_path / "out")),
    ):
        done = invoke(*arguments)
        assert done.exit_code == 3
        assert "FAILED" in done.stdout
        assert done.stderr == "error: check `keys` failed: a tensor is missing.\n"


PUSH: dict[str, Any] = {
    "repo_id": "me/small",
    "revision": "main",
    "private": True,
    "exists": False,
    "files": {"config.json": 700, "model.safetensors": 5_000_000},
    "bytes": 5_000_700,
    "removed": ["model-00002-of-00002.safetensors"],
    "left_out": [".env"],
    "note": None,
}


def test_push_says_what_it_will_do_before_it_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    options: dict[str, Any] = {}

    def prepare(out: Path, repo_id: str, hub: Any, **given: Any) -> Any:
        seen.append("prepare")
        options.update(given, out=out, repo_id=repo_id)
        return SimpleNamespace(to_json=lambda: PUSH)

    def upload(planned: Any, hub: Any, progress: Any) -> dict[str, Any]:
        seen.append("upload")
        if seen.count("upload") == 2:
            raise KeyboardInterrupt
        return PUSH | {"url": "https://hub/me/small", "commit": "c0ffee"}

    monkeypatch.setattr("moe_compress.publish.push.prepare", prepare)
    monkeypatch.setattr("moe_compress.publish.push.upload", upload)
    dry = invoke("push", "out", "me/small", "--dry-run", "--private", "--revision", "b", "--force")
    assert dry.exit_code == 0 and seen == ["prepare"]
    assert options.pop("progress") is not None
    assert options == {
        "out": Path("out"), "repo_id": "me/small", "private": True, "revision": "b", "force": True, "dry_run": True,
    }  # fmt: skip
    for fragment in (
        *("/me/small (new, private), branch main", "2 files, 5 MB (5,000,700 bytes), in one commit", "config.json"),
        *("of an earlier checkpoint: model-00002-of-00002.safetensors", "left out, no run wrote it: .env"),
    ):
        assert fragment in dry.stdout
    done = invoke("push", "out", "me/small")
    assert done.stdout.endswith("https://hub/me/small\ncommit: c0ffee\n")
    assert (options["private"], options["revision"], options["force"], options["dry_run"]) == (
        False,
        None,
        False,
        False,
    )
    interrupted = invoke("push", "out", "me/small")
    assert interrupted.exit_code == 130 and "nothing is visible yet" in interrupted.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CheckpointError("shard 2 is truncated; download it again."), 1),
        (UsageError("OUT exists; use --force."), 2),
        (ResumeError("the recipe changed; start again without --resume."), 2),
        (VerificationError("target missed."), 3),
    ],
)
def test_errors_are_one_sentence_with_their_exit_code(
    pipeline: Fakes, tmp_path: Path, error: Exception, code: int
) -> None:
    pipeline(run=error)
    done = invoke("run", "demo", str(tmp_path / "out"))
    assert (done.exit_code, done.stdout, done.stderr) == (code, "", f"error: {error}\n")
    traced = invoke("run", "demo", str(tmp_path / "out"), "--debug")
    assert traced.exit_code == code
    assert "Traceback" in traced.stderr
    assert traced.stderr.endswith(f"error: {error}\n")


def test_an_unexpected_error_is_a_sentence_too(pipeline: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline(inspect=ZeroDivisionError("division by zero"))
    done = invoke("inspect", "x")
    assert done.exit_code == 1
    assert done.stderr == "error: unexpected error: division by zero (run again with --debug for the traceback)\n"
    monkeypatch.setattr("moe_compress.recipe.packaged_recipes", lambda: 1 / 0)
    done = invoke("recipes", "ls")
    assert (done.exit_code, done.stderr) == (1, "error: unexpected error: division by zero\n"), "it has no --debug"
    pipeline(inspect=AssertionError())
    assert "unexpected error: AssertionError" in invoke("inspect", "x").stderr


def test_wrong_words_are_usage_errors() -> None:
    assert invoke("rum").exit_code == 2
    assert invoke("run", "demo").exit_code == 2
    assert invoke("run", "demo", "out", "--device", "tpu").exit_code == 2
    unknown = invoke("run", "dmeo", "out")
    assert unknown.exit_code == 2
    assert "did you mean `demo`?" in unknown.stderr
    assert "is not an override" in invoke("run", "demo", "out", "fast").stderr


def test_no_colour_codes_outside_a_terminal() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
    done = subprocess.run(
        [sys.executable, "-m", "moe_compress", "recipes", "ls"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert not re.search("\x1b", done.stdout + done.stderr)
