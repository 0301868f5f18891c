"""Calibration tokens: packing, mixes, seeds, every kind of source, and every refusal."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetNotFoundError
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from moe_compress.calibrate import documents
from moe_compress.calibrate.config import CalibrationConfig, DatasetPart
from moe_compress.calibrate.data import Calibration, load_calibration, load_held_out, share
from moe_compress.errors import DataError, UsageError
from tests.byte_tokenizer import END, byte_tokenizer

TEXTS = [f"document {i} " + "x" * (i % 7) for i in range(40)]


def load(dataset: Any, tokenizer: Any = None, max_length: int | None = None, **settings: Any) -> Calibration:
    config = CalibrationConfig.model_validate({"dataset": dataset, "num_samples": 4, "sequence_length": 16} | settings)
    return load_calibration(config, tokenizer or byte_tokenizer(), max_length=max_length)


def refusal(dataset: Any, error: type[Exception] = DataError, **arguments: Any) -> str:
    with pytest.raises(error) as caught:
        load(dataset, **arguments)
    message = str(caught.value)
    assert "\n" not in message and message[-1] in ".?"
    return message


def text_of(calibration: Calibration, tokenizer: Any = None) -> list[str]:
    return [str((tokenizer or byte_tokenizer()).decode(row)) for row in calibration.tokens]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(path: Path, items: list[str] = TEXTS) -> str:
    return jsonl(path, [{"text": item} for item in items])


def test_packing_drops_and_pads_nothing(tmp_path: Path) -> None:
    """One long sequence is the documents with END between, the last cut; shorter ones are the same tokens in pieces."""
    source = texts(tmp_path / "a.jsonl")
    (whole,) = text_of(load(source, num_samples=1, sequence_length=320))
    used = whole.split(END)
    assert len(whole) > 320 and Counter(used[:-1]) <= Counter(TEXTS) and any(t.startswith(used[-1]) for t in TEXTS)
    pieces = load(source, num_samples=20, sequence_length=16)
    assert pieces.tokens.shape == (20, 16)
    tokens = load(source, num_samples=1, sequence_length=320).tokens[0].tolist()
    expected = sorted(tuple(tokens[i : i + 16]) for i in range(0, 320, 16))
    assert sorted(map(tuple, pieces.tokens.tolist())) == expected
    assert pieces.sources == [
        {"dataset": source, "weight": 1.0, "split": "train", "text_field": "text", "config_name": None}
        | {"sequences": 20, "documents": len(used), "tokens": 320}
    ]


def test_seed_decides(tmp_path: Path) -> None:
    source = texts(tmp_path / "a.jsonl")
    first, same, other = load(source, seed=3), load(source, seed=3), load(source, seed=4)
    assert first.tokens.equal(same.tokens) and first.fingerprint == same.fingerprint
    assert sorted(first.tokens.tolist()) != sorted(other.tokens.tolist())  # other documents, not only another order
    assert first.fingerprint != other.fingerprint


def test_fingerprint_covers_tokens_and_settings(tmp_path: Path) -> None:
    source = texts(tmp_path / "a.jsonl")
    before = load(source)
    assert load(source, batch_size=2, min_tokens_per_expert=9).fingerprint == before.fingerprint
    assert load(source, num_samples=8, sequence_length=8).fingerprint != before.fingerprint
    texts(tmp_path / "a.jsonl", [text.replace("document", "Document") for text in TEXTS])
    assert load(source).fingerprint != before.fingerprint


def test_beginning_token_and_missing_end_token(tmp_path: Path) -> None:
    source = texts(tmp_path / "a.jsonl", ["aaaa", "bbbb", "cccc"])
    begin = byte_tokenizer(begin=True)
    (row,) = text_of(load(source, begin, num_samples=1, sequence_length=16), begin)
    assert row.count("<s>") == 3 and row.startswith("<s>") and f"{END}<s>" in row
    (row,) = text_of(load(source, byte_tokenizer(end=False), num_samples=1, sequence_length=12))
    assert sorted([row[:4], row[4:8], row[8:]]) == ["aaaa", "bbbb", "cccc"]


def test_kinds_of_files(tmp_path: Path) -> None:
    """The same documents from txt (blank lines between), json, csv, parquet, compressed and folders."""
    items = ["one and\ntwo", "three", "four five six"]
    (tmp_path / "a.txt").write_text("\n\n".join(items) + "\n\n\n")
    (tmp_path / "a.csv").write_text("text\n" + "".join(f'"{item}"\n' for item in items))
    pq.write_table(pa.table({"text": items}), tmp_path / "a.parquet")
    texts(tmp_path / "a.jsonl", items)
    texts(tmp_path / "folder/part-0.jsonl", items[:1])
    texts(tmp_path / "folder/deep/part-1.jsonl", items[1:])
    wanted = sorted(items)
    for name in ["a.txt", "a.csv", "a.parquet", "a.jsonl", "folder"]:
        (row,) = text_of(load(str(tmp_path / name), num_samples=1, sequence_length=31))
        assert sorted(row.split(END)) == wanted, name


def test_splits_of_a_folder(tmp_path: Path) -> None:
    texts(tmp_path / "d/train.jsonl", ["train " * 20])
    texts(tmp_path / "d/test.jsonl", ["TEST " * 20])
    (row,) = text_of(load(str(tmp_path / "d"), split="test", num_samples=1))
    assert row.startswith("TEST")
    message = refusal(str(tmp_path / "d"), split="tst")
    assert "`train`, `test`" in message and "did you mean `test`?" in message


def test_chat_uses_the_template(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    source = jsonl(tmp_path / "c.jsonl", [{"messages": chat}, {"messages": chat}])
    tokenizer = byte_tokenizer(chat=True, begin=True)
    rendered = "[user]hi[assistant]yes"
    length = 2 * (len(rendered) + 1)
    (row,) = text_of(load(source, tokenizer, text_field="messages", num_samples=1, sequence_length=length), tokenizer)
    assert row == (rendered + END) * 2  # the template's own END is not doubled, no BEGIN is added
    assert "no chat template" in refusal(source, text_field="messages")
    strict = byte_tokenizer(chat=True)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    assert "roles must alternate" in refusal(source, tokenizer=strict, text_field="messages")
    wrong = jsonl(tmp_path / "w.jsonl", [{"messages": [{"from": "human", "value": "hi"}]}])
    assert "`role` and `content`" in refusal(wrong, tokenizer=tokenizer, text_field="messages")


def test_mix_shares_sequences_by_weight(tmp_path: Path) -> None:
    parts: list[dict[str, Any]] = [
        {"dataset": texts(tmp_path / "a.jsonl", ["a" * 500]), "weight": 3},
        {"dataset": jsonl(tmp_path / "b.jsonl", [{"body": "b" * 500}]), "text_field": "body"},
    ]
    mixed = load(parts, num_samples=8)
    assert sorted(text_of(mixed)) == ["a" * 16] * 6 + ["b" * 16] * 2
    assert [(s["weight"], s["sequences"], s["documents"], s["tokens"]) for s in mixed.sources] == [
        (3.0, 6, 1, 96),
        (1.0, 2, 1, 32),
    ]
    parts[1]["weight"] = 0.01
    assert "b.jsonl gets none of the 8" in refusal(parts, UsageError, num_samples=8)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 500))
def test_share_is_exact_and_proportional(weights: list[float], num_samples: int) -> None:
    parts = [DatasetPart(dataset=str(i), weight=weight) for i, weight in enumerate(weights)]
    try:
        counts = share(parts, num_samples)
    except UsageError:
        assert min(weights) / sum(weights) * num_samples < 1
        return
    assert sum(counts) == num_samples
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count - weight / sum(weights) * num_samples) < 1 + 1e-9


def test_too_little_text(tmp_path: Path) -> None:
    source = texts(tmp_path / "a.jsonl", ["a" * 20, "b" * 19])  # with the end token between them 40 tokens
    assert load(source, num_samples=2, sequence_length=20).tokens.shape == (2, 20)
    message = refusal(source, num_samples=3, sequence_length=15)
    assert (
        "only 40 tokens in 2 documents" in message and "45 are needed (3 x 15)" in message and "enough for 2" in message
    )
    message = refusal(source, num_samples=1, sequence_length=41)
    assert "sequence_length" in message and "num_samples" not in message


def test_held_out_text_is_of_other_documents(tmp_path: Path) -> None:
    parts: list[dict[str, Any]] = [
        {"dataset": texts(tmp_path / "a.jsonl", [f"{chr(0x100 + i)} " * 9 for i in range(30)]), "weight": 3},
        {"dataset": texts(tmp_path / "b.jsonl", [f"{chr(0x200 + i)} " * 9 for i in range(30)])},
    ]
    config = CalibrationConfig.model_validate({"dataset": parts, "num_samples": 8, "sequence_length": 16})
    known = load_calibration(config, byte_tokenizer(), max_length=None)
    held_out = load_held_out(config, byte_tokenizer(), 4, max_length=None)
    assert [source["sequences"] for source in held_out.sources] == [3, 1]

    def letters(calibration: Calibration) -> set[str]:
        return {letter for text in text_of(calibration) for letter in text if 0x100 <= ord(letter) < 0x300}

    assert letters(known) and letters(held_out) and not letters(known) & letters(held_out)
    assert load_held_out(config, byte_tokenizer(), 4, max_length=None).fingerprint == held_out.fingerprint
    with pytest.raises(DataError, match="documents beyond those for calibration, but"):
        load_held_out(config, byte_tokenizer(), 64, max_length=None)


def test_longer_than_the_model(tmp_path: Path) -> None:
    source = texts(tmp_path / "a.jsonl")
    assert load(source, max_length=16).tokens.shape == (4, 16)
    assert "15" in refusal(source, UsageError, max_length=15)


@pytest.mark.parametrize(
    ("dataset", "fragment"),
    [
        ("no-such-owner/no-such-dataset", "Hub cannot be reached"),
        ("no-such-dataset", "Hub cannot be reached"),
        ("./missing", "does not exist"),
        ("/missing/data.jsonl", "does not exist"),
        ("missing.jsonl", "does not exist"),
    ],
)
def test_unknown_dataset(dataset: str, fragment: str) -> None:
    assert fragment in refusal(dataset)


def test_dataset_the_hub_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found(*_: Any) -> None:
        raise DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub.\nSecond line.")

    monkeypatch.setattr("datasets.load_dataset_builder", not_found)
    message = refusal("a/b")
    assert "gated" in message and "Second" not in message


def test_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = logged.append  # type: ignore[method-assign]
    monkeypatch.setattr(logging.getLogger("datasets"), "handlers", [handler])
    (tmp_path / "a.jsonl").write_text('{"text": ')
    assert "cannot be read" in refusal(str(tmp_path / "a.jsonl"))
    assert not logged, "the readers' own complaints are not shown beside ours"
    (tmp_path / "a.parquet").write_bytes(b"PAR")
    assert "a.parquet" in refusal(str(tmp_path / "a.parquet"))
    (tmp_path / "a.docx").write_bytes(b"PK")
    assert "none of .txt" in refusal(str(tmp_path / "a.docx"))
    (tmp_path / "empty").mkdir()
    assert "cannot be opened" in refusal(str(tmp_path / "empty"))


def test_folder_of_two_kinds_is_not_half_read(tmp_path: Path) -> None:
    texts(tmp_path / "d/a.jsonl")
    (tmp_path / "d/b.txt").write_text("passed over")
    assert ".jsonl and .txt" in refusal(str(tmp_path / "d"))


def test_wrong_names_list_the_right_ones(tmp_path: Path) -> None:
    source = texts(tmp_path / "a.jsonl")
    assert "(it has `text`); did you mean `text`?" in refusal(source, text_field="txt")
    assert "`train`" in refusal(source, split="validation")
    assert "no effect" in refusal(source, config_name="main")
    texts(tmp_path / "d/a.jsonl")
    assert "`default`" in refusal(str(tmp_path / "d"), config_name="defualt")


def test_nothing_but_empty_text(tmp_path: Path) -> None:
    assert "no text" in refusal(texts(tmp_path / "a.jsonl", ["", " \n"]))
    assert "is empty" in refusal(texts(tmp_path / "a.jsonl", []))
    assert "int values" in refusal(jsonl(tmp_path / "n.jsonl", [{"text": 3}]))


def test_only_what_is_needed_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's end is damaged, and nobody comes that far."""
    monkeypatch.setattr(documents, "WINDOW_DOCUMENTS", 5)
    with (tmp_path / "large.jsonl").open("w") as file:
        for _ in range(300):
            file.write(json.dumps({"text": "x" * 100_000}) + "\n")
        file.write("damaged")
    assert load(str(tmp_path / "large.jsonl")).tokens.shape == (4, 16)


def test_window_shuffles_without_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [(str(i), False) for i in range(100)]
    monkeypatch.setattr(documents, "WINDOW_DOCUMENTS", 7)
    shuffled = list(documents._shuffled(items, random.Random(0)))
    assert sorted(shuffled) == sorted(items) and shuffled != items
    monkeypatch.setattr(documents, "WINDOW_CHARACTERS", 1)
    assert list(documents._shuffled(items, random.Random(0))) == items  # a window of one


def test_reference_texts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(documents, "REFERENCE", Path(texts(tmp_path / "calibration.jsonl")))
    assert load("reference").sources[0]["dataset"] == "reference"


def test_reference_texts_by_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A part of the packaged texts is what a file of that part alone would be."""
    records = [{"text": f"{kind} {i} " * 9, "kind": kind} for i in range(9) for kind in ("code", "prose", "facts")]
    monkeypatch.setattr(documents, "REFERENCE", Path(jsonl(tmp_path / "all.jsonl", records)))
    alone = jsonl(tmp_path / "skills.jsonl", [record for record in records if record["kind"] == "facts"])
    assert load("reference", config_name="skills").tokens.equal(load(alone).tokens)
    assert "(it has `text`, `skills`)" in refusal("reference", config_name="code")


def test_config_is_strict() -> None:
    weightless = [{"dataset": "a", "weight": 0}]
    mistakes: list[dict[str, Any]] = [{"num_sample": 3}, {"num_samples": 0}, {"dataset": []}, {"dataset": weightless}]
    for wrong in mistakes:
        with pytest.raises(ValidationError):
            CalibrationConfig.model_validate({"dataset": "a"} | wrong)
    single = CalibrationConfig(dataset="a", split="test", text_field="body", config_name="c")
    assert single.parts == [DatasetPart(dataset="a", split="test", text_field="body", config_name="c")]
