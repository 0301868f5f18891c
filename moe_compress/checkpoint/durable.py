"""Files that are there whole or not at all, after a power cut too.

A rename alone is safe against a killed process; that it and the file's content survive a power cut needs both to be
flushed to the disk, the content before the rename.
"""

from __future__ import annotations

import os
from pathlib import Path


def replace_durably(temporary: Path, file: Path) -> None:
    """Give a finished temporary file, or folder, its name; both lie in the same folder."""
    sync(temporary)
    temporary.rename(file)
    sync(file.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
