"""What sentences and tables are made of: lists, other libraries' errors, and how numbers are written.

Bytes are decimal (1 GB = 10^9 bytes), as on the Hub.
"""

from __future__ import annotations

from collections.abc import Sequence

UNDEFINED = "undefined"


def listed(items: Sequence[str], limit: int) -> str:
    """`a, b, c`, or the first `limit` of them `and 5 more`."""
    more = f" and {len(items) - limit:,} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def first_line(error: Exception) -> str:
    """What an error of somebody else's says first, to be the end of a sentence; its class where it says nothing."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__).rstrip(".")


def format_bytes(size: float, digits: int = 3) -> str:
    """`13.8 GB`: three digits in decimal units."""
    return _scaled(size, (" B", " kB", " MB", " GB", " TB", " PB"), digits)


def format_count(count: float) -> str:
    """`6.92 B`: parameters in thousands (K), millions (M), billions (B)."""
    return _scaled(count, ("", " K", " M", " B", " T"))


def format_flops(flops: float, digits: int = 3) -> str:
    """`2.43 GFLOP`."""
    return _scaled(flops, (" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP"), digits)


def format_rate(rate: float) -> str:
    """`1,234 tokens/s`."""
    return f"{format_number(rate)} tokens/s"


def format_number(value: float) -> str:
    """Four digits, with separators where there are more before the point: `0.853`, `12.35`, `1,234`."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def format_percent(share: float | None, stderr: float | None = None) -> str:
    """`75.0 %`, `98.2 ± 0.5 %`; `undefined` for None."""
    if share is None:
        return UNDEFINED
    return f"{share * 100:.1f} %" if stderr is None else f"{share * 100:.1f} ± {stderr * 100:.1f} %"


def _scaled(value: float, units: tuple[str, ...], digits: int = 3) -> str:
    """So many digits and the unit, 1000 apart."""
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value /= 1000
        power += 1
    return f"{value:.{digits}g}{units[power]}"
