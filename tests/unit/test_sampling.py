"""Tokens drawn from probabilities: as often as these say, by numbers of the sequence alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_compress.compress.distill.sampling import drawn, sample

PROBABILITY = torch.tensor([0.1, 0.0, 0.45, 0.25, 0.2, 0.0], dtype=torch.float64)


def test_tokens_come_as_often_as_their_probabilities_say() -> None:
    count = 20_000
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count  # evenly spread over [0, 1)
    tokens = drawn(PROBABILITY.log().expand(count, -1), places)
    assert tokens.shape == (count, 1)
    torch.testing.assert_close(torch.bincount(tokens[:, 0], minlength=6) / count, PROBABILITY.float())


def test_the_ends_are_tokens_that_can_be() -> None:
    ends = torch.tensor([0.0, 0.1 + 1e-9, 1 - 2**-53], dtype=torch.float64)
    assert drawn(PROBABILITY.log().expand(3, -1), ends).flatten().tolist() == [0, 2, 4]
    assert drawn(torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]]), torch.rand(2).double()).tolist() == [[0], [1]]


@pytest.mark.parametrize("has_choice", [True, False])
def test_no_logits_of_a_prompt_but_the_last(has_choice: bool) -> None:
    """Where the model can leave the others out; what is drawn is the same."""
    counts = []

    def logits(input_ids: Tensor, keep: int) -> Any:
        counts.append(keep or input_ids.shape[1])
        logits_BSV = torch.nn.functional.one_hot((input_ids + 1) % 9, 9) * 100.0  # the next number follows
        return SimpleNamespace(logits=logits_BSV[:, -keep:], past_key_values=None)

    class Chosen(torch.nn.Module):
        def forward(self, input_ids: Tensor, past_key_values: Any, use_cache: bool, logits_to_keep: int = 0) -> Any:
            return logits(input_ids, logits_to_keep)

    class Whole(torch.nn.Module):
        def forward(self, input_ids: Tensor, past_key_values: Any, use_cache: bool) -> Any:
            return logits(input_ids, 0)

    found = sample(Chosen() if has_choice else Whole(), torch.tensor([[1, 2, 3], [4, 5, 6]]), 6, 1.0, [[0], [1]])
    assert found.tokens_BS.tolist() == [[1, 2, 3, 4, 5, 6], [4, 5, 6, 7, 8, 0]]
    assert counts == ([1, 1, 1] if has_choice else [3, 1, 1])
