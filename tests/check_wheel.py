"""Builds the wheel, installs it into an empty virtual environment with the pinned versions, and uses it there.

    python tests/check_wheel.py

`make wheel-test` runs it. It needs nothing but Python, and pip's access to packages. Everything happens in a temporary
folder outside the repository, offline once the packages are there, so what works here works from the wheel alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[1]
PACKAGE = "moe_compress"
METADATA = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
# What the package reads at run time besides its modules; each must be there, and more than nothing of it.
DATA = ("recipes/", "reference/checkpoint/", "reference/tasks/", "reference/calibration.jsonl", "report/templates/")


def main() -> None:
    """Build, look inside, install, use; the first thing that is wrong ends it."""
    with tempfile.TemporaryDirectory(prefix="moe-compress-wheel-") as scratch:
        folder = Path(scratch)
        venv.create(folder / "env", with_pip=True)
        pip = [folder / "env" / "bin" / "python", "-m", "pip"]
        say("build")
        call([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT])
        (wheel,) = folder.glob("*.whl")
        check_content(wheel)
        say("install")
        call([*pip, "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel])
        call([*pip, "check"])
        (folder / "elsewhere").mkdir()
        use(folder / "env" / "bin", folder / "elsewhere")
    say("the wheel is whole and works")


def check_content(wheel: Path) -> None:
    """The package as it is in the repository, what describes it, and nothing else."""
    names = ZipFile(wheel).namelist()
    described = {name.partition("/")[2] for name in names if name.partition("/")[0].endswith(".dist-info")}
    inside = {name for name in names if not name.partition("/")[0].endswith(".dist-info")}
    expected = repository_files()
    require(described == METADATA, f"metadata: {sorted(described ^ METADATA)}")
    require(inside == expected, f"missing: {sorted(expected - inside)}; not expected: {sorted(inside - expected)}")
    for part in DATA:
        count = sum(name.startswith(f"{PACKAGE}/{part}") for name in inside)
        require(count > 0, f"the wheel has nothing of {part}")
        say(f"  {part}: {count} file{'s' * (count != 1)}")
    say(f"  {len(inside)} files in all, {wheel.stat().st_size / 1e6:.1f} MB")


def repository_files() -> set[str]:
    """The package's files, those that git ignores left out; in a source distribution, all but caches."""
    if (ROOT / ".git").exists():
        listing = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", PACKAGE]
        return {name for name in call(listing).split("\0") if name and (ROOT / name).is_file()}
    files = (file for file in (ROOT / PACKAGE).rglob("*") if file.is_file() and file.parent.name != "__pycache__")
    return {file.relative_to(ROOT).as_posix() for file in files}


def use(programs: Path, folder: Path) -> None:
    """The command line, start to finish, where there is nothing but the installed package."""

    def moe_compress(*arguments: str) -> str:
        say(f"  moe-compress {' '.join(arguments)}")
        return call([programs / "moe-compress", *arguments], folder)

    say("use")
    where = call([programs / "python", "-c", f"import {PACKAGE}; print({PACKAGE}.__file__)"], folder)
    require(where.startswith(str(programs.parent)), f"imported from {where}")
    require("Usage" in moe_compress("--help"), "--help does not help")
    recipes = {file.stem for file in (ROOT / PACKAGE / "recipes").glob("*.yaml")}
    shown = moe_compress("recipes", "ls")
    require(bool(recipes) and all(name in shown for name in recipes), f"recipes ls: {shown}")
    facts = json.loads(moe_compress("inspect", "reference", "--json"))
    require(facts["num_experts"] == 16 and facts["bytes_are"] == "measured", f"inspect: {facts}")

    few = ["calibration.num_samples=4", "calibration.sequence_length=128", "eval.speed=false"]
    moe_compress("run", "prune-reap-25", "out", *few)
    report = json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))
    require(len(report["checks"]) == 5 and all(one["passed"] for one in report["checks"].values()), "checks failed")
    require(report["ratio"]["stored_bytes"] < 0.85, f"nothing was dropped: {report['ratio']}")
    page = folder / "out" / "report.html"
    page.unlink()
    moe_compress("report", "out")
    text = page.read_text(encoding="utf-8")
    require("</html>" in text and "<style" in text and "reap" in text, "the page is not whole")
    scored = moe_compress("eval", "out", "--tasks", "reference", "--limit", "1", "speed=false")
    require("reference_facts" in scored and "reference_code" in scored, f"eval: {scored}")


def call(command: list[str | Path], folder: Path | None = None) -> str:
    """What a command prints; its whole output, and an end, when it fails. In `folder` it has a clean, offline place."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    if folder is not None:
        environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "huggingface")}
        environment |= {"COLUMNS": "200"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    require(done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def require(holds: bool, otherwise: str) -> None:
    """End with a sentence when something does not hold."""
    if not holds:
        sys.exit(f"wheel-test failed: {otherwise}")


def say(what: str) -> None:
    """Where we are."""
    print(what, flush=True)


if __name__ == "__main__":
    main()
