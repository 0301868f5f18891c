"""Our side of `gptq_speed`: `moe-compress run RECIPE OUT`, with a clock around the quantize step.

    python -m benchmarks.gptq_ours RECIPE OUT

The last line printed is JSON: the seconds of the step alone, as wall and as processor time, and the
process's peak resident memory by its end.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from moe_compress import pipeline
from moe_compress.cli import app


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def main(recipe: str, out: str) -> None:
    taken: dict[str, float] = {}
    step = pipeline.run_step

    def timed(*arguments: Any) -> Any:
        started, used = time.monotonic(), time.process_time()
        result = step(*arguments)
        taken["quantize_seconds"] = round(time.monotonic() - started, 2)
        taken["quantize_processor_seconds"] = round(time.process_time() - used, 2)
        taken["quantize_peak_rss_bytes"] = peak_rss_bytes()
        return result

    pipeline.run_step = timed
    app(["run", recipe, out, "--device", "cpu"], standalone_mode=False)
    print(json.dumps(taken))


if __name__ == "__main__":
    main(*sys.argv[1:])
