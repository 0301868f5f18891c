"""What quantizing did to a model: perplexity on held-out tokens, and how far every layer's output moved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from moe_compress.verification.reload import to_float32


def load(folder: Path, tokens: Tensor) -> Any:
    """A checkpoint by plain transformers, computing in float32 with the very values that it stands for."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if getattr(model.config, "quantization_config", None) is not None:
        to_float32(model, tokens[:1], torch.bfloat16)
    return model


@torch.no_grad()
def perplexity(model: Any, tokens_NS: Tensor) -> float:
    """exp of the mean negative log-likelihood of every token but the first of its sequence."""
    losses = []
    for batch in tokens_NS.split(4):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        losses.append(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"))
    return math.exp(torch.cat(losses).double().mean())


@torch.no_grad()
def layer_errors(original: Any, quantized: Any, tokens_NS: Tensor) -> list[float]:
    """Per decoder layer |Q(x) - L(x)| / |L(x) - x| over the original's hidden states x: what the layer adds to them."""
    layers = original.model.layers
    error, change = torch.zeros(2, len(layers), dtype=torch.float64)
    handles = []
    for index, layer in enumerate(layers):

        def compare(module: Any, inputs: Any, keywords: Any, output: Tensor, index: int = index) -> None:
            entering = inputs[0] if inputs else keywords["hidden_states"]
            found = quantized.model.layers[index](*inputs, **keywords)
            error[index] += (found - output).double().square().sum()
            change[index] += (output - entering).double().square().sum()

        handles.append(layer.register_forward_hook(compare, with_kwargs=True))
    for batch in tokens_NS.split(4):
        original(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return [round(float(value), 5) for value in (error / change).sqrt()]


def measure(folders: dict[str, Path], tokens_NS: Tensor) -> dict[str, dict[str, Any]]:
    """Perplexity of each checkpoint; for all but the first, which is the original, the errors of its layers too."""
    original, *_ = models = [load(folder, tokens_NS) for folder in folders.values()]
    found: dict[str, dict[str, Any]] = {}
    for name, model in zip(folders, models, strict=True):
        found[name] = {"perplexity": round(perplexity(model, tokens_NS), 4)}
        if model is not original:
            found[name]["layer_output_error"] = layer_errors(original, model, tokens_NS)
    return found
