"""How the C library's allocator is asked to treat the large buffers that every layer needs anew.

By default glibc gives each freed buffer back to the system and fetches fresh, zeroed pages for the next one. Streaming
layers of one size, that costs more than the copying itself; kept and used again, the same pages serve the whole run.
The price is some fragmentation: about a quarter more resident memory, measured.
"""

from __future__ import annotations

import ctypes
import platform

# Parameters of mallopt(3) and their values.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_SETTINGS = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 64 << 20, _M_ARENA_MAX: 1}


def reuse_freed_memory() -> None:
    """Keep freed memory in this process for its next buffers; does nothing outside glibc."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter, value in _SETTINGS.items():
            libc.mallopt(parameter, value)
