"""Who may import whom, and what must stay free of torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import moe_compress

PACKAGE = Path(moe_compress.__file__).parent

# Top to bottom: a part imports itself, its own row (without going in circles) and the rows below.
ROWS = (
    ("__main__",),
    ("cli", "api"),
    ("verbs",),
    ("console",),
    ("auditing", "pipeline", "reference", "publish"),
    ("preparation", "output"),
    ("preview",),
    ("health", "estimate"),
    ("measure",),
    ("steps",),
    ("compress", "eval", "report", "verification", "manifest", "workspace"),
    ("calibrate", "checkpoint", "runtime"),
    ("models",),
)
# Imported by all; each imports only what stands here.
COMMON: dict[str, set[str]] = {
    "errors": set(),
    "progress": set(),
    "text": set(),
    "settings": {"errors"},
    "recipe": {
        "errors",
        "settings",
        "calibrate.config",
        "eval.config",
        "compress.distill.config",
        "compress.merge.config",
        "compress.prune.config",
        "compress.quantize.config",
        "compress.tie.config",
        "compress.skip.config",
        "compress.topk.config",
        "compress.zero_experts.config",
    },
}
RANK = {part: row for row, parts in enumerate(ROWS) for part in parts}


def modules() -> list[str]:
    """`calibrate.config` for every module of the package but its root."""
    files = (file.relative_to(PACKAGE).with_suffix("") for file in PACKAGE.rglob("*.py"))
    names = {".".join(file.parts).removesuffix("__init__").rstrip(".") for file in files}
    return sorted(names - {""})


def imports(module: str) -> Iterator[str]:
    """Every module of the package that `module` imports, wherever in its code."""
    file = PACKAGE.joinpath(*module.split("."))
    source = (file / "__init__.py" if file.is_dir() else file.with_suffix(".py")).read_text()
    known = set(modules())
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            inside = name.removeprefix("moe_compress.")
            if inside == name:
                continue
            if inside not in known:
                inside = inside.rpartition(".")[0]
            if inside:
                yield inside


def test_every_module_has_its_place() -> None:
    placed = RANK.keys() | COMMON.keys() | {"recipes"}
    assert {module.partition(".")[0] for module in modules()} <= placed


def test_imports_point_downwards() -> None:
    wrong = [
        f"{module} imports {target}"
        for module in modules()
        if (part := module.partition(".")[0]) in RANK
        for target in imports(module)
        if (other := target.partition(".")[0]) not in COMMON and RANK[other] < RANK[part]
    ]
    assert wrong == []


def test_parts_of_a_row_do_not_import_in_circles() -> None:
    edges = {
        (part, target.partition(".")[0])
        for module in modules()
        for part in [module.partition(".")[0]]
        for target in imports(module)
        if part in RANK and target.partition(".")[0] not in {part, *COMMON}
    }
    while leaves := {left for left, _ in edges} | {right for _, right in edges}:
        ends = {part for part in leaves if all(left != part for left, _ in edges)}
        assert ends, f"a circle among {sorted(leaves)}"
        edges = {(left, right) for left, right in edges if right not in ends}


def test_what_all_import_imports_little() -> None:
    for module, allowed in COMMON.items():
        assert set(imports(module)) <= allowed


def test_no_torch_in_what_must_start_fast() -> None:
    light = ["cli", "console", "api", *COMMON]
    light += [name for name in modules() if name.rpartition(".")[2] in ("config", "plan")]
    light += [name for name in modules() if name.partition(".")[0] in ("report", "publish")]
    code = (
        "import importlib, sys\n"
        f"for name in {light}:\n"
        "    importlib.import_module(f'moe_compress.{name}')\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'lm_eval'} & set(sys.modules)\n"
        "    assert not heavy, f'{name} imports {heavy}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
