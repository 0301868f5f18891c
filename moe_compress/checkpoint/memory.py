"""Memory that was freed and is still the process's own.

glibc keeps what lies below the top of its heap, and after a layer that is a layer's worth. Elsewhere nothing is done.
"""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Hand freed memory back to the operating system."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
