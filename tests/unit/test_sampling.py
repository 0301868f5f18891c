"""Tokens drawn from probabilities: as often as these say, by numbers of the sequence alone."""

from __future__ import annotations

import torch

from moe_compress.compress.distill.sampling import drawn

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
