"""Tiny random MoE checkpoints with a byte tokenizer, and texts to calibrate on: all that a run needs, in a blink."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.byte_tokenizer import byte_tokenizer

VOCABULARY = 258  # of the byte tokenizer
SEVERAL = "40KB"  # shards of the tiny model
FAMILIES: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {"norm_topk_prob": True, "moe_intermediate_size": 16}),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM, {"norm_topk_prob": False}),
}


def tiny_model(family: str = "qwen3_moe", *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random model: hidden 32, 8 experts, top-2, 2 layers unless said otherwise.

    The weights are large enough that the experts matter to the logits.
    """
    config_class, model_class, own = FAMILIES[family]
    given: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": 256,
    }
    torch.manual_seed(seed)
    model: PreTrainedModel = model_class(config_class(**given | own | settings))
    return model.eval()


def tiny_checkpoint(
    folder: Path,
    family: str = "qwen3_moe",
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    max_shard_size: str = SEVERAL,
    **settings: Any,
) -> Path:
    """`tiny_model` saved in several shards, with its tokenizer."""
    tiny_model(family, seed=seed, **settings).to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    byte_tokenizer().save_pretrained(folder)
    assert max_shard_size != SEVERAL or len(list(folder.glob("*.safetensors"))) > 1
    return folder


def write_texts(file: Path, *, documents: int = 40, seed: int = 0) -> Path:
    """Documents of random words, separated by blank lines."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 9))) for _ in range(300)]
    file.write_text("\n\n".join(" ".join(rng.choices(words, k=60)) for _ in range(documents)) + "\n")
    return file


def tiny_recipe(model: Path, texts: Path, *keeps: float | int, **settings: Any) -> dict[str, Any]:
    """A recipe that prunes `model` once for every item of `keeps`, and measures nothing."""
    recipe: dict[str, Any] = {
        "model": str(model),
        "calibration": {"dataset": str(texts), "num_samples": 8, "sequence_length": 64, "batch_size": 2},
        "steps": [{"op": "prune", "criterion": "reap", "keep": keep} for keep in keeps],
        "export": {"max_shard_size": "20KB"},
        "eval": {"tasks": [], "speed": False},
    }
    return recipe | settings
