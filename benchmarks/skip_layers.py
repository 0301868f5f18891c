"""Time of OLMoE-shaped models with half of the slots skipped, beside the original's: a part of `skip_speed`.

Both models are in memory, get the same random tokens one after the other, and take turns; medians are reported.

* whole: embeddings, layers and head, whose logits are computed for the last token of a prompt. Four layers carry a head
  that weighs as much as the experts of two of them.
* layers: the decoder layers and the norm behind them, on given hidden states (embeddings of those tokens).

Random routers send the zero experts more slots in one text than in another. So before each measurement they are
steered: the rows of the zero experts are scaled, layer by layer, until half of the slots of the tokens that will be
timed are skipped; what is skipped while they are timed is counted again by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from moe_compress.models.layers import MoELayer, find_moe_layers
from moe_compress.runtime.trace import RoutingTrace, router_of

PROMPT, STEPS = 256, 16  # tokens of a prompt, and those decoded after it one by one
REPEATS = 5
BATCHES = (1, 16)
SIDES = ("original", "adapted")
PARTS = {"whole": "four layers of OLMoE's shape, embeddings and head", "layers": "four layers of OLMoE's shape alone"}
Call = Callable[..., Any]


@torch.no_grad()
def rows(original: Path, adapted: Path) -> list[dict[str, Any]]:
    """Tokens per second of both models, whole and layers alone, in prefill and decode."""
    models = {
        name: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        for name, folder in zip(SIDES, (original, adapted), strict=True)
    }
    weights = {moe.layer: router_of(moe).weight.clone() for moe in find_moe_layers(models["adapted"])}
    found = []
    for batch in BATCHES:
        size = (batch, PROMPT + STEPS)
        ids_BS = torch.randint(models["original"].config.vocab_size, size, generator=torch.Generator().manual_seed(0))
        skipped: dict[str, float] = {}
        rates: dict[tuple[str, str], dict[str, float]] = {}
        for phase, span in {"prefill": slice(PROMPT), "decode": slice(PROMPT, None)}.items():
            steer(models["adapted"], weights, ids_BS, span)
            skipped[phase] = share(models["adapted"], ids_BS, span)
            for part in PARTS:
                rates[part, phase] = measured(models, part, phase, ids_BS)
        settings = {"batch_size": batch, "prompt_tokens": PROMPT, "new_tokens": STEPS, "repeats": REPEATS}
        for part, name in PARTS.items():
            speeds = {side: {f"{phase}_tokens_per_s": rates[part, phase][side] for phase in skipped} for side in SIDES}
            found.append({"model": name, "skipped": skipped, "speeds": speeds, "settings": settings})
    return found


def measured(models: dict[str, Any], part: str, phase: str, ids_BS: Tensor) -> dict[str, float]:
    """Tokens per second of each model."""
    calls = {name: called(model, part, ids_BS) for name, model in models.items()}
    caches = {name: call(slice(PROMPT), None) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(REPEATS):
        for name in list(models)[:: 1 if turn % 2 == 0 else -1]:
            started = time.perf_counter()
            if phase == "prefill":
                calls[name](slice(PROMPT), None)
            else:
                for position in range(PROMPT, PROMPT + STEPS):
                    calls[name](slice(position, position + 1), caches[name])
            seconds[name].append(time.perf_counter() - started)
            if phase == "decode":
                caches[name].crop(-STEPS)
    tokens = len(ids_BS) * (PROMPT if phase == "prefill" else STEPS)
    return {name: tokens / median(times) for name, times in seconds.items()}


def called(model: Any, part: str, ids_BS: Tensor) -> Call:
    """What is timed: a span of the tokens, after those in a cache, which is given back."""
    if part == "whole":
        return lambda span, cache: (
            model(input_ids=ids_BS[:, span], past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
        )
    hidden_BSH = model.get_input_embeddings()(ids_BS)
    return lambda span, cache: (
        model.model(inputs_embeds=hidden_BSH[:, span], past_key_values=cache, use_cache=True).past_key_values
    )


def steer(model: Any, weights: dict[int, Tensor], ids_BS: Tensor, span: slice) -> None:
    """Scale the zero experts' rows of each router until half of the slots of a span of the tokens are skipped."""

    def fit(moe: MoELayer, router: Any, hidden: Tensor) -> None:
        hidden_TH = hidden.view(*ids_BS.shape, -1)[:, span].flatten(0, 1)
        own_RH, low, high = weights[moe.layer], 0.25, 4.0
        for _ in range(20):
            scale = (low * high) ** 0.5
            router.weight.copy_(own_RH)
            router.weight[moe.num_experts :] *= scale
            picked_TK = F.linear(hidden_TH, router.weight).topk(moe.top_k).indices
            zeros = float((picked_TK >= moe.num_experts).float().mean())
            low, high = (scale, high) if zeros < 0.5 else (low, scale)

    with ExitStack() as hooks:
        for moe in find_moe_layers(model):
            hook = router_of(moe).register_forward_pre_hook(lambda router, given, moe=moe: fit(moe, router, given[0]))
            hooks.callback(hook.remove)
        model.model(input_ids=ids_BS, use_cache=False)


def share(model: Any, ids_BS: Tensor, span: slice) -> float:
    """Share of the slots of a span of the tokens that are skipped, mean over layers."""
    with RoutingTrace(find_moe_layers(model)) as trace:
        model.model(input_ids=ids_BS, use_cache=False)
    shares = [
        passes[-1].skipped_TK.view(*ids_BS.shape, -1)[:, span].double().mean() for passes in trace.passes.values()
    ]
    return float(torch.stack(shares).mean())
