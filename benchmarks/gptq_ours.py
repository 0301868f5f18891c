"""Our side of `gptq_speed`: `moe-compress run RECIPE OUT`, with a clock around the quantize step.

    python -m benchmarks.gptq_ours RECIPE OUT

The last line printed is JSON: the seconds of the step alone, as wall and as processor time.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from moe_compress import pipeline
from moe_compress.cli import app


def main(recipe: str, out: str) -> None:
    taken: dict[str, float] = {}
    step = pipeline.run_step

    def timed(*arguments: Any) -> Any:
        started, used = time.monotonic(), time.process_time()
        result = step(*arguments)
        taken["quantize_seconds"] = round(time.monotonic() - started, 2)
        taken["quantize_processor_seconds"] = round(time.process_time() - used, 2)
        return result

    pipeline.run_step = timed
    app(["run", recipe, out, "--device", "cpu"], standalone_mode=False)
    print(json.dumps(taken))


if __name__ == "__main__":
    main(*sys.argv[1:])
