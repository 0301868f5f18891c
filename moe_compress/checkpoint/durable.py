"""Files that are there whole or not at all, after a power cut too, and their hashes.

A rename alone is safe against a killed process; that it and the file's content survive a power cut needs both to be
flushed to the disk, the content before the rename.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

CHUNK_BYTES = 16 << 20


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


def sha256_of(file: Path) -> str:
    """Hash of a whole file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
