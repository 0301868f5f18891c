"""llm-compressor's side of `gptq_speed`, run by the Python of its own virtual environment.

    python gptq_theirs.py MODEL TOKENS OUT

MODEL is a checkpoint, TOKENS a safetensors file with `tokens` [N, S]; the last line printed is JSON: the seconds
of `oneshot` alone, as wall and as processor time, the process's peak resident memory by its end, and what it was made
with. Imports nothing of this package.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

LIBRARIES = ("llmcompressor", "compressed-tensors", "transformers", "torch")


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def main(source: str, tokens: str, out: str) -> None:
    ids = load_file(tokens)["tokens"]
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    started, used = time.monotonic(), time.process_time()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=rows,
        recipe=GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head", r"re:.*mlp\.gate$"]),
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
    )
    seconds, processor = time.monotonic() - started, time.process_time() - used
    memory = peak_rss_bytes()
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)
    taken = {"quantize_seconds": round(seconds, 2), "quantize_processor_seconds": round(processor, 2)}
    taken["quantize_peak_rss_bytes"] = memory
    print(json.dumps(taken | {"versions": {name: version(name) for name in LIBRARIES}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
