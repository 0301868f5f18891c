"""More text of the kinds that the built-in model was trained on, from what is at hand without a network.

Code and documentation are the training side of the standard library, skills are drawn anew, prose is that of the
packaged calibration texts. Not covered: the texts themselves differ between versions of Python.
"""

from __future__ import annotations

import json
from pathlib import Path

from moe_compress.calibrate.documents import REFERENCE
from moe_compress.reference import corpus
from moe_compress.reference.export_data import calibration, write


def write_texts(file: Path, num_bytes: int) -> None:
    """About `num_bytes` of records in the mixture of the training, as JSON lines."""
    packaged = [json.loads(line) for line in REFERENCE.read_text(encoding="utf-8").splitlines()]
    sources = {"code": corpus.stdlib_code(), "documentation": corpus.stdlib_documentation()}
    training = {
        name: [text for title, text in items if not corpus.is_heldout(title)] for name, items in sources.items()
    }
    training["prose"] = [record["text"] for record in packaged if record["kind"] == "prose"]
    write(file, calibration(training, num_bytes))
