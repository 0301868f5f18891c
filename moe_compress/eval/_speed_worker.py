"""One model in its own process, measured on demand: `python -m moe_compress.eval._speed_worker SETTINGS`.

SETTINGS is JSON with the fields of `speed.Workload` and `folder`, `device`. The process prints one JSON line when the
model is loaded and warm, and one for every line it reads. All other output goes to stderr.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from moe_compress.eval.precision import compute_dtype
from moe_compress.models.skeleton import model_class

STATUS = Path("/proc/self/status")


class Clock(BaseStreamer):
    """Notes when the prompt went in and when each token came out, on the CPU and so in fact computed."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def peak_rss_bytes() -> int:
    """Largest resident memory of this process; not `ru_maxrss` on Linux, which starts from the parent's."""
    if STATUS.exists():
        line = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings: dict[str, Any] = json.loads(sys.argv[1])
    device, batch, prompt, new = (settings[key] for key in ("device", "batch_size", "prompt_tokens", "new_tokens"))
    config = AutoConfig.from_pretrained(settings["folder"])
    dtype = compute_dtype(config, device)
    model: Any = model_class(config).from_pretrained(settings["folder"], dtype=dtype).to(device).eval()
    vocabulary = int(config.get_text_config().vocab_size)
    ids = torch.randint(vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(settings["seed"]))
    ids = ids.to(device)

    def generate(tokens: int) -> list[float]:
        clock = Clock()
        # min_new_tokens keeps an end token from stopping early.
        generation = GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        model.generate(ids, generation, attention_mask=torch.ones_like(ids), streamer=clock)
        return clock.times

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    generate(2)
    answer({"dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads()})
    for _ in sys.stdin:
        times = generate(new)
        measured = {
            "prefill_tokens_per_s": batch * prompt / (times[1] - times[0]),
            "decode_tokens_per_s": batch * (new - 1) / (times[-1] - times[1]),
            "peak_rss_bytes": peak_rss_bytes(),
        }
        if torch.device(device).type == "cuda":
            measured["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(device)
        answer(measured)


if __name__ == "__main__":
    main()
