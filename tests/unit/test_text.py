"""Lists that end somewhere, and the first words of other people's errors."""

from __future__ import annotations

import pytest

from moe_compress.text import first_line, listed


def test_long_lists_are_cut() -> None:
    assert listed([], 2) == ""
    assert listed(["a", "b"], 2) == "a, b"
    assert listed([*"abcde"], 2) == "a, b and 3 more"


@pytest.mark.parametrize(
    ("said", "expected"), [("It broke.\nTraceback", "It broke"), ("\n\n  late  \n", "late"), ("", "ValueError")]
)
def test_first_line(said: str, expected: str) -> None:
    assert first_line(ValueError(said)) == expected
