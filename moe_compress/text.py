"""Two small things that sentences are made of."""

from __future__ import annotations

from collections.abc import Sequence


def listed(items: Sequence[str], limit: int) -> str:
    """`a, b, c`, or the first `limit` of them `and 5 more`."""
    more = f" and {len(items) - limit:,} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def first_line(error: Exception) -> str:
    """What an error of somebody else's says first, to be the end of a sentence; its class where it says nothing."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__).rstrip(".")
