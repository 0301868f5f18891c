"""A random bf16 checkpoint of exactly OLMoE-1B-7B's shape (about 13.8 GB), written layer by layer.

    python -m benchmarks.olmoe_shape FOLDER

The weights mean nothing; names, shapes, types and sharding are those of `allenai/OLMoE-1B-7B-0924` on the Hub. A small
byte-level tokenizer is put beside them, so that text can be tokenized.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import OlmoeConfig, PreTrainedTokenizerFast

from moe_compress.checkpoint.writer import ShardWriter

CONFIG = {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


def layer_tensors(index: int, config: OlmoeConfig, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    """One decoder layer's tensors by their names on the Hub."""
    hidden, inner = config.hidden_size, config.intermediate_size

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    prefix = f"model.layers.{index}."
    for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
        yield f"{prefix}{name}.weight", torch.ones(hidden, dtype=torch.bfloat16)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield f"{prefix}self_attn.{name}.weight", normal(hidden, hidden)
    yield f"{prefix}mlp.gate.weight", normal(config.num_experts, hidden)
    for expert in range(config.num_experts):
        for name, shape in (
            ("gate_proj", (inner, hidden)),
            ("up_proj", (inner, hidden)),
            ("down_proj", (hidden, inner)),
        ):
            yield f"{prefix}mlp.experts.{expert}.{name}.weight", normal(*shape)


def write(folder: Path, num_layers: int = CONFIG["num_hidden_layers"]) -> None:
    """Write the checkpoint, one layer in memory at a time; a finished one is left as it is."""
    if (folder / "model.safetensors.index.json").exists():
        return
    config = OlmoeConfig(**CONFIG | {"num_hidden_layers": num_layers}, architectures=["OlmoeForCausalLM"])
    config.dtype = torch.bfloat16
    writer = ShardWriter(folder, max_shard_bytes=5 * 10**9)
    generator = torch.Generator().manual_seed(0)
    ends = torch.empty(config.vocab_size, config.hidden_size, dtype=torch.bfloat16)
    rest = {
        "model.embed_tokens.weight": ends.normal_(0, 0.02, generator=generator),
        "lm_head.weight": ends.clone(),
        "model.norm.weight": torch.ones(config.hidden_size, dtype=torch.bfloat16),
    }
    writer.write("rest", rest)
    parts = [f"layer-{index:05d}" for index in range(num_layers)]
    for index, part in enumerate(parts):
        writer.write(part, dict(layer_tensors(index, config, generator)))
    writer.finish(["rest", *parts])
    config.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {symbol: number for number, symbol in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    arguments = parser.parse_args()
    write(arguments.folder, arguments.layers)
