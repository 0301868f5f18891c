"""lm-eval's own sciq, arc_easy, piqa, hellaswag and gsm8k, unmodified and offline, on the reference model.

    python -m benchmarks.lm_eval_reference --data DIR [--model MODEL] [--limit 100] [--output FILE]

DIR holds the data of the tasks in folders named like their Hub ids (`allenai/sciq`, `allenai/ai2_arc`, `baber/piqa`,
`Rowan/hellaswag`, `openai/gsm8k`), as parquet. With that as working directory, `datasets` takes a folder for the id.

The model is far too small for these tasks, so chance is what to expect; what counts is that tasks written for others
run as they are. Prompts longer than its context are cut on the left by lm-eval.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

TASKS = ("sciq", "arc_easy", "piqa", "hellaswag", "gsm8k")
RESULTS = Path(__file__).parent / "results" / "lm_eval_reference.json"


def main() -> None:
    parser = argparse.ArgumentParser(description="lm-eval's own tasks on the reference model, offline.")
    parser.add_argument("--data", type=Path, required=True, help="folder laid out like Hub ids")
    parser.add_argument("--model", default="reference", help="a checkpoint folder, or the packaged reference model")
    parser.add_argument("--limit", type=int, default=100, help="documents per task")
    parser.add_argument("--tasks", default=",".join(TASKS), help="comma-separated")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    # Read once, when these libraries are first imported.
    os.environ["HF_HUB_OFFLINE"] = "1"
    from moe_compress.checkpoint.source import open_checkpoint
    from moe_compress.eval.config import EvalConfig
    from moe_compress.eval.harness import evaluate

    folder, output = open_checkpoint(arguments.model).folder.resolve(), arguments.output.resolve()
    os.chdir(arguments.data)
    started = time.monotonic()
    config = EvalConfig(tasks=arguments.tasks.split(","), limit=arguments.limit)
    found = evaluate(folder, config, arguments.device)
    name = arguments.model if arguments.model == "reference" else folder.name
    result = {"model": name, "seconds": round(time.monotonic() - started, 1)} | found
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for task, metrics in found["tasks"].items():
        print(task, *(f"{metric}={score['value']:.3f}" for metric, score in metrics.items()))


if __name__ == "__main__":
    main()
