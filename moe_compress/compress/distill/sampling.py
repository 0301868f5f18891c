"""Responses sampled token by token, with the experts that each token used; what on-policy learning is made of.

The first tokens of a sequence are its prompt, and every response fills it up. An end-of-sequence token is one like any
other: another text follows it, as in packed training data. Not covered: prompts of different lengths in one batch,
top-p and other ways to leave tokens out, continuous batching.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_compress.checkpoint.durable import replace_durably
from moe_compress.compress.distill.config import DistillConfig
from moe_compress.models.layers import MoELayer
from moe_compress.progress import Stage
from moe_compress.runtime.trace import RoutingTrace

PORTION = 32  # sequences that are sampled side by side


@dataclass(frozen=True)
class Rollout:
    """Prompts with their responses, R tokens each.

    `log_BR` are the log-probabilities of the response's tokens when they were drawn, `rows` by layer the router rows
    [B, S - 1, K] that all tokens but the last were sent to; empty where nobody asked.
    """

    tokens_BS: Tensor
    log_BR: Tensor
    rows: Mapping[int, Tensor]

    def score(self, logits_BSV: Tensor, temperature: float) -> Tensor:
        """The log-probabilities [B, R] of the responses by the logits that all tokens but the last gave."""
        length = self.log_BR.shape[1]
        log_BRV = (logits_BSV[:, -length:].float() / temperature).log_softmax(-1)
        found: Tensor = log_BRV.gather(2, self.tokens_BS[:, -length:, None])[..., 0]
        return found


@torch.no_grad()
def sample(
    model: Any,
    prompt_BP: Tensor,
    length: int,
    temperature: float,
    seeds: Sequence[Sequence[int]],
    layers: Sequence[MoELayer] = (),
) -> Rollout:
    """Fill prompts up to `length` tokens from softmax(logits / temperature); the rows of `layers` are noted.

    What is drawn after a prompt depends on the model, the prompt and its own seed, and on no other prompt.
    """
    drawings = [np.random.default_rng(seed).random(length - prompt_BP.shape[1]) for seed in seeds]
    uniform_RB = torch.from_numpy(np.stack(drawings, axis=1)).to(prompt_BP.device)
    tokens, logs, cache = [prompt_BP], [], None
    has_choice = "logits_to_keep" in inspect.signature(model.forward).parameters
    of_the_last = {"logits_to_keep": 1} if has_choice else {}  # those of a prompt would take the most memory
    with RoutingTrace(layers) if layers else nullcontext() as trace:
        for uniform_B in uniform_RB:
            output = model(input_ids=tokens[-1], past_key_values=cache, use_cache=True, **of_the_last)
            cache = output.past_key_values
            log_BV = (output.logits[:, -1].float() / temperature).log_softmax(-1)
            drawn_B1 = drawn(log_BV, uniform_B)
            tokens.append(drawn_B1)
            logs.append(log_BV.gather(1, drawn_B1))
        rows = {} if trace is None else {moe.layer: trace.rows_BSK(moe.layer, len(prompt_BP)) for moe in layers}
    return Rollout(torch.cat(tokens, dim=1), torch.cat(logs, dim=1), rows)


def drawn(log_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Tokens [B, 1] whose log-probabilities are `log_BV`, by where numbers from [0, 1) fall among their sums.

    `torch.multinomial` draws a number for every token there is.
    """
    sums_BV = log_BV.double().exp().cumsum(dim=1)
    wanted_B1 = uniform_B[:, None] * sums_BV[:, -1:]
    return torch.searchsorted(sums_BV, wanted_B1, right=True).clamp(max=log_BV.shape[1] - 1)


def sample_responses(
    load: Callable[[], Any], prompt_NP: Tensor, config: DistillConfig, length: int, folder: Path, stage: Stage
) -> Tensor:
    """The prompts with sampled responses [N, length], some at a time, going on with what `folder` holds.

    The model is loaded when the first portion is missing.
    """
    folder.mkdir(exist_ok=True)
    model = None
    portions = []
    numbers = range(len(prompt_NP))
    for number, prompts in enumerate(prompt_NP.split(PORTION)):
        file = folder / f"responses-{number:05d}.safetensors"
        if not file.exists():
            model = load() if model is None else model
            seeds = [[config.seed, prompt] for prompt in numbers[number * PORTION :][: len(prompts)]]
            device = next(model.parameters()).device
            found = sample(model, prompts.to(device), length, config.sampling_temperature, seeds)
            temporary = file.with_suffix(".part")
            save_file({"tokens": found.tokens_BS.cpu().contiguous()}, temporary)
            replace_durably(temporary, file)
        portions.append(load_file(file)["tokens"])
        stage.advance()
    return torch.cat(portions)
