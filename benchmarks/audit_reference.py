"""Every expert of the built-in model taken out one by one: which criterion ranks them as the loss does?

    python -m benchmarks.audit_reference [--folder DIR] [--experts N]

`moe-compress audit prune-reap-25` with 32 held-out sequences of 512 tokens, in DIR, which is kept: an interrupted run
goes on, and a larger sample adds to a smaller. Results go to `benchmarks/results/audit_reference.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

import moe_compress
from moe_compress.manifest import hardware
from moe_compress.progress import progress_for_terminal

RESULTS = Path(__file__).parent / "results" / "audit_reference.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("audit-benchmark"))
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = time.process_time()
    found = moe_compress.audit(
        "prune-reap-25",
        arguments.folder,
        overrides=["calibration.batch_size=4"],
        experts=arguments.experts,
        progress=progress_for_terminal(),
    )
    content = found | {
        "processor_seconds_of_this_call": round(time.process_time() - started),
        "hardware": hardware("cpu"),
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
