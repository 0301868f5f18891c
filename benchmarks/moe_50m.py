"""A small Mixture-of-Experts checkpoint that has learnt something: 4 layers, 32 experts, hidden 512, expert width 256.

A Qwen3-MoE of 55.6 million parameters (50.3 of them in the routed experts), fitted for a few minutes to the packaged
calibration texts, so that its activations are correlated and its perplexity on other text means something. It is no
good model. The seed decides it, up to what other processors round differently.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_compress
from moe_compress.reference.train import balance_loss

REFERENCE = Path(moe_compress.__file__).parent / "reference"
SEQUENCE_LENGTH = 512
SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": SEQUENCE_LENGTH,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
TRAINING = {"seed": 0, "steps": 150, "rows": 4, "learning_rate": 1e-3, "warmup_steps": 20, "balance": 0.02}


def sequences(files: list[Path], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Token ids [N, SEQUENCE_LENGTH] of the texts of jsonl files, one after the other; the rest is left out."""
    texts = [json.loads(line)["text"] for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    ids = [token for text in tokenizer(texts, verbose=False)["input_ids"] for token in (*text, 0)]
    return torch.tensor(ids[: len(ids) // SEQUENCE_LENGTH * SEQUENCE_LENGTH]).view(-1, SEQUENCE_LENGTH)


def heldout(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Token ids [N, SEQUENCE_LENGTH] of packaged texts that are not among the calibration texts."""
    data = REFERENCE / "tasks" / "data"
    return sequences([data / "code.jsonl", data / "documentation.jsonl"], tokenizer)


def make(folder: Path, threads: int, num_layers: int) -> None:
    """Train the checkpoint, or one of fewer layers, into `folder` (bf16, with its tokenizer), unless it is there."""
    if (folder / "config.json").exists():
        return
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE / "checkpoint")
    tokens = sequences([REFERENCE / "calibration.jsonl"], tokenizer)
    torch.manual_seed(TRAINING["seed"])
    config = Qwen3MoeConfig(**SHAPE | {"num_hidden_layers": num_layers})
    model = Qwen3MoeForCausalLM._from_config(config, experts_implementation="grouped_mm", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    started = time.monotonic()
    order = torch.randperm(len(tokens))
    for step in range(int(TRAINING["steps"])):
        position = torch.arange(step * TRAINING["rows"], (step + 1) * TRAINING["rows"])
        batch = tokens[order[position.long() % len(tokens)]]
        remaining = 1 - step / TRAINING["steps"]
        optimizer.param_groups[0]["lr"] = TRAINING["learning_rate"] * min(
            (step + 1) / TRAINING["warmup_steps"], remaining
        )
        output = model(input_ids=batch, output_router_logits=True, use_cache=False)
        loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        balance = balance_loss(output.router_logits, config.num_experts_per_tok)
        (loss + TRAINING["balance"] * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}, loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)
    part = folder.with_name(f"{folder.name}.part")
    model.bfloat16().save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)
