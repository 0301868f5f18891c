"""Run by `verify` in a fresh process: load a checkpoint with plain transformers and write the probe's logits.

    python reload.py FOLDER OUTPUT.npy

This package is not imported here, and `verify` sees to it that it cannot be.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

folder, output = Path(sys.argv[1]), sys.argv[2]
config = transformers.AutoConfig.from_pretrained(folder)
named = [getattr(transformers, name, None) for name in config.architectures or ()]
loader = next(filter(None, named), transformers.AutoModelForCausalLM)
model = loader.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
with np.load(folder / "probe.npz") as probe:
    tokens, positions = torch.from_numpy(probe["tokens"]), probe["positions"]
with torch.no_grad():
    logits = model(input_ids=tokens, use_cache=False).logits
np.save(output, logits[0, positions].float().numpy())
