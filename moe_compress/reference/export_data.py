"""Write the reference model's evaluation and calibration data: `python -m moe_compress.reference.export_data`.

Evaluation (`tasks/data/*.jsonl`) is text and questions that training never shows, calibration (`calibration.jsonl`)
is the training side in the training mixture. Everything follows from the seed, the standard library of the Python
that runs this, and enwik8; the packaged files were written once, by Python 3.11.

Not covered: the tasks themselves; they are the YAML files beside the data.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moe_compress.reference import corpus, skills
from moe_compress.reference.train import END, ROWS, Settings, documents

SEED = 0
EVALUATION_BYTES = 60_000  # of each text task
CALIBRATION_BYTES = 600_000
EVALUATION_PIECE = (200, 1_500)  # fewest and most bytes; the most is about 450 tokens, less than the model's window
CALIBRATION_PIECE = (200, 2_000)
SKILL_RECORD_BYTES = 1_500
# With the reference tokenizer; they turn the token mixture `ROWS` into bytes.
BYTES_PER_TOKEN = {"code": 3.40, "documentation": 3.48, "prose": 3.18, "facts": 2.82, "reasoning": 2.68}
# A held-out module whose docstrings make up this share of it counts as documentation, any other as code.
DOCSTRING_SHARE = 0.15
# A held-out piece is left out when more than this share of its lines also stands on the training side.
MAX_KNOWN_SHARE = 0.2
DATA = Path("tasks", "data")

Record = dict[str, Any]


def pieces(text: str, sizes: tuple[int, int]) -> Iterator[str]:
    """Cut a text at blank lines into pieces of `sizes` bytes.

    A stretch without a blank line that is too long (a data table) is left out, and so is a rest that is too short.
    """
    fewest, most = sizes
    piece = ""
    for block in [*re.findall(r".+?(?:\n(?:[ \t]*\n)+|\Z)", text, re.DOTALL), ""]:
        if block and len((piece + block).encode()) <= most:
            piece += block
            continue
        if len(piece.encode()) >= fewest:
            yield piece.rstrip() + "\n"
        piece = block if len(block.encode()) <= most else ""


def docstrings(source: str) -> str:
    """All docstrings of a module, blank lines between."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, owners)]
    return "\n\n".join(text for text in found if text)


def heldout_texts() -> dict[str, list[tuple[str, str]]]:
    """Named held-out documents of code and of documentation; no text is in both."""
    texts: dict[str, list[tuple[str, str]]] = {"code": [], "documentation": []}
    for name, text in corpus.stdlib_code():
        if corpus.is_heldout(name):
            described = docstrings(text)
            if len(described) >= DOCSTRING_SHARE * len(text):
                texts["documentation"].append((name, described))
            else:
                texts["code"].append((name, text))
    texts["documentation"] += [item for item in corpus.stdlib_documentation() if corpus.is_heldout(item[0])]
    return texts


def telling_lines(text: str) -> list[str]:
    """Lines long enough to be recognised elsewhere."""
    return [line.strip() for line in text.split("\n") if len(line.strip()) >= 20]


def evaluation_texts(training: Iterable[str]) -> dict[str, list[Record]]:
    """Held-out pieces in seeded order, so that the first N are a fair sample."""
    known = {line for text in training for line in telling_lines(text)}
    records: dict[str, list[Record]] = {}
    for kind, texts in heldout_texts().items():
        candidates = [
            {"text": piece, "source": name}
            for name, text in texts
            for piece in pieces(text, EVALUATION_PIECE)
            if sum(line in known for line in telling_lines(piece)) <= MAX_KNOWN_SHARE * len(telling_lines(piece))
        ]
        random.Random(f"{kind}-{SEED}").shuffle(candidates)
        records[kind] = list(_until(candidates, EVALUATION_BYTES))
    return records


def evaluation_questions() -> dict[str, list[Record]]:
    """The facts as four-way choices, and 200 test instances of each reasoning skill."""
    rng = random.Random(f"choices-{SEED}")
    facts = []
    for question in skills.fact_questions():
        choices = [question.answer, *question.choices]
        rng.shuffle(choices)
        facts.append({"prompt": question.prompt, "choices": choices, "label": choices.index(question.answer)})
    rng.shuffle(facts)
    instances = {
        skill: [{"prompt": question.prompt, "answer": question.answer} for question in skills.test_set(skill)]
        for skill in skills.REASONING
    }
    return {"facts": facts} | instances


def calibration(training: dict[str, list[str]], num_bytes: int = CALIBRATION_BYTES) -> list[Record]:
    """Training-side records, each kind by its share of the training tokens, shuffled; less where there is less text.

    A record of skills holds several documents with the end token between them, as a training row does.
    """
    weights = {kind: rows * BYTES_PER_TOKEN[kind] for kind, rows in ROWS.items()}
    records: list[Record] = []
    for kind, weight in weights.items():
        rng = random.Random(f"calibration-{kind}-{SEED}")
        source = _text_records(training[kind], rng) if kind in training else _skill_records(kind, rng)
        budget = num_bytes * weight / sum(weights.values())
        records += _until(({"text": text, "kind": kind} for text in source), budget)
    random.Random(f"calibration-{SEED}").shuffle(records)
    return records


def _text_records(texts: Iterable[str], rng: random.Random) -> Iterator[str]:
    cut = [piece for text in texts for piece in pieces(text, CALIBRATION_PIECE)]
    rng.shuffle(cut)
    yield from cut


def _skill_records(kind: str, rng: random.Random) -> Iterator[str]:
    world = skills.facts()
    while True:
        record = ""
        while len(record) < SKILL_RECORD_BYTES:
            if kind == "facts":
                document = skills.fact_document(rng.choice(world), rng)
            else:
                document = skills.draw(rng.choice(list(skills.REASONING)), rng, test=False).document()
            record += (END if record else "") + document
        yield record


def _until(records: Iterable[Record], budget: float) -> Iterator[Record]:
    """Records up to and with the one that reaches `budget` bytes of text."""
    for record in records:
        yield record
        budget -= len(record["text"].encode())
        if budget <= 0:
            return


def write(file: Path, records: Iterable[Record]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    file.write_text("".join(lines), encoding="utf-8")
    print(f"{file}: {len(lines)} records, {file.stat().st_size:,} bytes")


def export(data: Path, out: Path) -> None:
    """Write every file below `out`; `data` holds enwik8.gz, or it is downloaded there."""
    training = documents(Settings(), data)
    records = evaluation_texts(training["code"] + training["documentation"]) | evaluation_questions()
    for name, items in records.items():
        write(out / DATA / f"{name}.jsonl", items)
    write(out / "calibration.jsonl", calibration(training))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the reference model's evaluation and calibration data.")
    parser.add_argument("--data", type=Path, default=Path.home() / ".cache" / "moe_compress")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    export(arguments.data, arguments.out)


if __name__ == "__main__":
    main()
