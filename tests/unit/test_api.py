"""The Python API: the verbs as functions, their sources of settings, and that importing it costs nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import moe_compress
from moe_compress.errors import RecipeError, UsageError
from moe_compress.eval.config import EvalConfig


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Fakes in the place of `moe_compress.pipeline`; each call's arguments under the function's name."""
    seen: dict[str, Any] = {}

    def fake(name: str) -> Any:
        return lambda *args, **options: seen.update({name: (args, options)}) or {"called": name}

    names = ("inspect", "score", "plan", "run", "evaluate_checkpoint", "verify")
    monkeypatch.setattr(
        moe_compress, "pipeline", SimpleNamespace(**{name: fake(name) for name in names}), raising=False
    )
    return seen


def test_verbs_reach_the_pipeline_with_loaded_recipes(calls: dict[str, Any], tmp_path: Path) -> None:
    report = moe_compress.run(
        "demo", str(tmp_path), overrides=["steps.0.keep=0.5"], force=True, revision="main", model="org/model"
    )
    assert report == {"called": "run"}
    (recipe, out), options = calls["run"]
    assert (recipe.steps[0].keep, recipe.revision, recipe.model, out) == (0.5, "main", "org/model", tmp_path)
    assert (options["force"], options["resume"], options["work"], options["device"]) == (True, False, None, "auto")
    moe_compress.run("demo", tmp_path, scores="work")
    assert (options["scores"], calls["run"][1]["scores"]) == (None, Path("work"))
    moe_compress.score({"model": "a"}, "work", force=True)
    assert (calls["score"][0][1], calls["score"][1]["force"]) == (Path("work"), True)
    moe_compress.plan("demo", scores="work", overrides=["steps.0.scope=global"])
    assert calls["plan"][1] == {"scores": Path("work"), "device": "auto", "clocked_at": None}
    moe_compress.inspect("reference", scores="work")
    assert calls["inspect"] == (("reference",), {"revision": None, "scores": Path("work")})
    moe_compress.verify("out")
    assert calls["verify"][0] == (Path("out"),)


def test_push_reaches_the_publisher(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def fake(out: Path, repo_id: str, **options: Any) -> dict[str, Any]:
        seen.update(options, out=out, repo_id=repo_id)
        return {"called": "push"}

    monkeypatch.setattr("moe_compress.publish.push.push", fake)
    assert moe_compress.push("out", "me/small", private=True, token="t") == {"called": "push"}
    assert seen == {
        "out": Path("out"), "repo_id": "me/small", "private": True, "revision": None, "force": False,
        "dry_run": False, "token": "t", "progress": None,
    }  # fmt: skip


def test_evaluate_takes_a_config_or_settings(calls: dict[str, Any]) -> None:
    moe_compress.evaluate("out", baseline="org/model", tasks=["a"], limit=3)
    assert calls["evaluate_checkpoint"][1]["config"] == EvalConfig(tasks=["a"], limit=3)
    moe_compress.evaluate("out", config=EvalConfig(tasks=["b"]), num_fewshot=5)
    assert calls["evaluate_checkpoint"][1]["config"] == EvalConfig(tasks=["b"], num_fewshot=5)
    with pytest.raises(RecipeError, match="did you mean `limit`"):
        moe_compress.evaluate("out", limt=3)


def test_validate_returns_the_recipe_or_raises_every_mistake() -> None:
    assert moe_compress.validate("demo", ["steps.0.keep=5"]).steps[0].keep == 5
    with pytest.raises(UsageError, match="leaves 3 of 16 experts"):
        moe_compress.validate("demo", ["steps.0.keep=3"])
    with pytest.raises(RecipeError) as caught:
        moe_compress.validate("demo", ["steps.0.scope=global"], revsion="auto", export={"tier": "stokc"})
    assert {problem.path for problem in caught.value.problems} == {"steps.0.scope", "revsion", "export.tier"}


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, moe_compress\n"
        "assert {'run', 'verify'} <= set(dir(moe_compress)) and moe_compress.__version__\n"
        "assert not {'torch', 'pydantic', 'typer', 'numpy'} & set(sys.modules)\n"
        "from moe_compress import inspect, validate, score, plan, run, evaluate, verify, push\n"
        "assert not {'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'compress_all'"):
        moe_compress.compress_all  # noqa: B018
