"""Tying on the built-in model: which part of it matters, what the bytes cost, and what distillation gives back.

    python -m benchmarks.tie_reference [--folder DIR] [--only TEXT] [--made DIR]

Pairs of the four middle layers, as `op: tie` does it by default: taken as they come, matched, fitted, and with a
difference for each expert. Then all layers, in groups of 2, 4 and 8, with differences of as large a rank as leaves 60 %
of the routed experts' bytes; then the packaged recipes that distil such models, and one of them with more text and
1.8 million tokens. Calibrated as the packaged recipes are, on 256 sequences of 512 tokens, and judged on whole tables
of the `reference` tasks. `resident_bytes` are those of the loaded model's tensors, `seconds` are wall-clock on a shared
machine, `training_seconds` those of distillation alone.

Results go to `benchmarks/results/tie_reference.json` after every row; rows that are there are kept. `--made` is a
folder of finished runs of the distilled rows, by their names, that are judged as they are.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

from benchmarks import merge_reference
from benchmarks.merge_reference import Row, arguments_parser, finished, main
from benchmarks.zeda_texts import write_texts
from moe_compress import run
from moe_compress.checkpoint.source import open_checkpoint
from moe_compress.recipe import load_recipe

RESULTS = Path(__file__).parent / "results" / "tie_reference.json"
CALIBRATION = {"dataset": "reference", "num_samples": 256, "sequence_length": 512, "batch_size": 8}
ALL = {"prelude": 0, "coda": 0}
RANKS = {2: 6, 4: 24, 8: 33}  # group size -> rank at 60 % of the experts' bytes
DISTILLED = ("tie-2-distill", "tie-8-distill")
LONGER = "tie-8-distill, more text"
TEXTS, TEXT_BYTES = "texts.jsonl", 3_900_000  # of `zeda_texts`


def steps() -> dict[str, Row]:
    """Name -> the step of a row, or its recipe's."""
    tie = {"op": "tie"}
    naive = tie | {"match": False, "align": False, "fit": "average"}
    matched = {"match": "output", "align": "weights"}
    found: dict[str, Row] = {
        "middle pairs: average": naive,
        "middle pairs: matched": naive | matched,
        "middle pairs: matched, fitted": tie,
        "middle pairs: matched, fitted by gradient": tie | {"fit": "gradient"},
        "middle pairs: matched, fitted, rank 8": tie | {"residual_rank": 8},
    }
    for size, rank in RANKS.items():
        group, difference = ALL | {"group_size": size}, {"residual_rank": rank}
        if size == 4:
            found[f"groups of {size}: matched, fitted, rank {rank}"] = tie | group | difference
            continue
        found |= {
            f"groups of {size}: average": naive | group,
            f"groups of {size}: average, rank {rank}": naive | group | difference,
            f"groups of {size}: matched": naive | matched | group,
            f"groups of {size}: matched, fitted": tie | group,
            f"groups of {size}: matched, fitted, rank {rank}": tie | group | difference,
        }
    found |= {f"recipe {name}": {"steps": recipe_steps(name)} for name in DISTILLED}
    return found | {LONGER: {"steps": longer_steps()}}


def longer_steps() -> list[Row]:
    """`tie-8-distill` on texts that are not packaged, in 1,765,376 tokens."""
    tie, logits, hidden = recipe_steps("tie-8-distill")
    data = {"dataset": TEXTS, "sequence_length": 512}
    logits |= {"data": data | {"num_samples": 1024}, "epochs": 2, "teacher": "online"}
    hidden |= {"data": data | {"num_samples": 1400, "seed": 1}, "learning_rate": 0.0004}
    return [tie, logits, hidden]


def recipe_steps(name: str) -> list[Row]:
    found: list[Row] = load_recipe(name).model_dump(mode="json", exclude_unset=True)["steps"]
    return found


def make(made: Path | None, title: str, step: Row, folder: Path, calibration: Row) -> Row:
    """One row; those that are distilled by a whole run."""
    if "steps" not in step:
        return merge_reference.run(title, step, folder, calibration)
    started, name = time.monotonic(), title.removeprefix("recipe ")
    out = (made or folder) / name
    if not out.exists():
        run(name if name in DISTILLED else longer_recipe(out.parent), out, **{"eval.tasks": [], "eval.speed": False})
    plans = json.loads((out / "plan.json").read_text(encoding="utf-8"))["steps"]
    trained = [plan for plan in plans if plan["op"] == "distill"]
    row = finished(title, step, open_checkpoint(str(out)), started)
    sums = {key: round(sum(plan[key] for plan in trained), 1) for key in ("tokens", "seconds")}
    return row | {"tokens": sums["tokens"], "training_seconds": sums["seconds"]}


def longer_recipe(folder: Path) -> Row:
    """The recipe of `longer_steps`, with its texts in `folder`."""
    texts = folder / TEXTS
    if not texts.exists():
        write_texts(texts, TEXT_BYTES)
    tie, *trained = longer_steps()
    trained = [step | {"data": step["data"] | {"dataset": str(texts)}} for step in trained]
    return {"model": "reference", "calibration": CALIBRATION, "steps": [tie, *trained], "export": {"tier": "plugin"}}


if __name__ == "__main__":
    parser = arguments_parser(__doc__)
    parser.add_argument("--made", type=Path, help="finished runs of the distilled rows, by their names")
    arguments = parser.parse_args()
    main(RESULTS, steps(), arguments, CALIBRATION, lambda _: CALIBRATION, partial(make, arguments.made))
