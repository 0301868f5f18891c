"""Documents of a dataset, wherever it lies: the Hub, a folder, a file, or the package. Read lazily, in seeded order.

Everything but the packaged texts goes through `datasets` in streaming mode, so a huge dataset is read only as far as it
is used; it is imported when first used, for it takes 90 MB and half a second. In a txt file, documents are separated by
blank lines. Not covered: audio, images, datasets that need code to be read.
"""

from __future__ import annotations

import difflib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from transformers import PreTrainedTokenizerBase

from moe_compress.calibrate.config import DatasetPart
from moe_compress.errors import DataError, UnknownDataError
from moe_compress.text import first_line

if TYPE_CHECKING:
    import datasets

REFERENCE = Path(__file__).parents[1] / "reference" / "calibration.jsonl"
# `config_name` of the packaged texts, and the values of their column `kind` that it stands for.
REFERENCE_PARTS = {"text": ("code", "documentation", "prose"), "skills": ("facts", "reasoning")}
READERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# Documents are shuffled inside a window of this many documents or characters, whichever is reached first.
WINDOW_DOCUMENTS = 10_000
WINDOW_CHARACTERS = 64_000_000


def documents(part: DatasetPart, tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[tuple[str, bool]]:
    """The documents of `part` as (text, is_chat) in seeded order; empty ones are left out.

    A chat is rendered by the tokenizer's chat template. Raises `DataError` when there is no such dataset, split or
    column, when it holds something else than text or chats, or when nothing in it is text.
    """
    rows = _packaged(part) if part.dataset == "reference" else _rows(part, seed)
    yield from _shuffled(_rendered(rows, part, tokenizer), random.Random(seed))


def _shuffled(items: Iterable[tuple[str, bool]], rng: random.Random) -> Iterator[tuple[str, bool]]:
    window: list[tuple[str, bool]] = []
    characters = 0
    for item in items:
        window.append(item)
        characters += len(item[0])
        if len(window) >= WINDOW_DOCUMENTS or characters >= WINDOW_CHARACTERS:
            chosen = rng.randrange(len(window))
            window[chosen], window[-1] = window[-1], window[chosen]
            characters -= len(window[-1][0])
            yield window.pop()
    rng.shuffle(window)
    yield from window


def _rendered(
    rows: Iterable[dict[str, Any]], part: DatasetPart, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, bool]]:
    """Each row's text or rendered chat."""
    anything = False
    for row in rows:
        if part.text_field not in row:
            raise unknown("column", part.text_field, list(row), f"dataset {part.dataset}", "text_field")
        value = row[part.text_field]
        text, is_chat = (_chat(value, part, tokenizer), True) if isinstance(value, list) else (value, False)
        if text is None or (isinstance(text, str) and not text.strip()):
            continue
        if not isinstance(text, str):
            raise DataError(
                f"Column `{part.text_field}` of dataset {part.dataset} holds {type(text).__name__} values; "
                "name a column of text or of chat messages in `text_field`."
            )
        anything = True
        yield text, is_chat
    if not anything:
        raise DataError(f"Dataset {part.dataset} holds no text in column `{part.text_field}` of split `{part.split}`.")


def _chat(messages: list[Any], part: DatasetPart, tokenizer: PreTrainedTokenizerBase) -> str:
    if not all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages):
        raise DataError(
            f"Column `{part.text_field}` of dataset {part.dataset} holds lists that are not chats; "
            "every message must have `role` and `content`."
        )
    if not messages:
        return ""
    if not tokenizer.chat_template:
        raise DataError(
            f"Column `{part.text_field}` of dataset {part.dataset} holds chats, but the model's tokenizer has no chat "
            "template; choose a dataset of plain text, or add a `chat_template.jinja` to the checkpoint."
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except jinja2.TemplateError as error:
        raise DataError(f"The tokenizer's chat template refused a chat of dataset {part.dataset}: {error}.") from error


def _packaged(part: DatasetPart) -> list[dict[str, Any]]:
    """The rows of the texts in this package."""
    where = "dataset reference"
    if part.config_name is not None and part.config_name not in REFERENCE_PARTS:
        raise unknown("configuration", part.config_name, list(REFERENCE_PARTS), where, "config_name")
    if part.split != "train":
        raise unknown("split", part.split, ["train"], where, "split")
    rows = [json.loads(line) for line in REFERENCE.read_text(encoding="utf-8").splitlines()]
    kinds = REFERENCE_PARTS.get(part.config_name or "")
    return rows if kinds is None else [row for row in rows if row["kind"] in kinds]


def _rows(part: DatasetPart, seed: int) -> Iterator[dict[str, Any]]:
    stream = _open(part).shuffle(seed=seed, buffer_size=1)  # the order of the shards
    try:
        yield from stream
    except Exception as error:  # every reader of `datasets` has its own exceptions
        raise DataError(f"Dataset {part.dataset} cannot be read: {first_line(error)}.") from error


def _open(part: DatasetPart) -> datasets.IterableDataset:
    """The split of `part`, nothing read yet."""
    from datasets.exceptions import DatasetNotFoundError

    try:
        builder = _builder(part)
        if getattr(builder.config, "sample_by", None) == "line":
            builder.config.sample_by = "paragraph"
        splits = builder.as_streaming_dataset()
    except DataError:
        raise
    except DatasetNotFoundError as error:
        raise DataError(
            f"Dataset {part.dataset} is neither a local file or folder nor a dataset on the Hub that you may read "
            f"({first_line(error)})."
        ) from error
    except ConnectionError as error:
        raise DataError(
            f"Dataset {part.dataset} is not a local file or folder, and the Hub cannot be reached to look for it; "
            "go online, or name a local file."
        ) from error
    except Exception as error:  # every reader of `datasets` has its own exceptions
        raise DataError(f"Dataset {part.dataset} cannot be opened: {first_line(error)}.") from error
    if part.split not in splits:
        raise unknown("split", part.split, list(splits), f"dataset {part.dataset}", "split")
    return splits[part.split]


def _builder(part: DatasetPart) -> datasets.DatasetBuilder:
    import datasets

    path = Path(part.dataset).expanduser()
    if path.is_file():
        if part.config_name is not None:
            raise DataError(f"`config_name` has no effect for the file {part.dataset}; leave it out.")
        if not path.stat().st_size:
            raise DataError(f"The calibration file {path} is empty; name another.")
        return datasets.load_dataset_builder(_reader(path), data_files={"train": [str(path)]})
    require_local(part)
    if path.is_dir():
        _refuse_mixed_folder(path)
    name = str(path) if path.is_dir() else part.dataset
    if part.config_name is not None:
        known = datasets.get_dataset_config_names(name)
        if part.config_name not in known:
            raise unknown("configuration", part.config_name, known, f"dataset {part.dataset}", "config_name")
    return datasets.load_dataset_builder(name, part.config_name)


def require_local(part: DatasetPart) -> None:
    """Raise `UnknownDataError` where a path is named and nothing is there; a Hub id passes."""
    path = Path(part.dataset).expanduser()
    if not path.exists() and (part.dataset.startswith((".", "/", "~")) or path.suffix in READERS):
        raise UnknownDataError(f"The calibration file or folder {part.dataset} does not exist.")


def _reader(path: Path) -> str:
    suffix = Path(path.stem).suffix if path.suffix in {".gz", ".zst", ".xz", ".bz2"} else path.suffix
    if suffix not in READERS:
        raise DataError(f"The calibration file {path} is none of {', '.join(READERS)}; convert it to one of these.")
    return READERS[suffix]


def _refuse_mixed_folder(folder: Path) -> None:
    """`datasets` reads the most frequent kind of file and passes over the others in silence."""
    if (folder / "README.md").exists():  # a dataset card says which files are meant
        return
    suffixes = sorted({path.suffix for path in folder.rglob("*") if path.suffix in READERS})
    if len({READERS[suffix] for suffix in suffixes}) > 1:
        raise DataError(
            f"The folder {folder} mixes {' and '.join(suffixes)} files; put them into folders of one kind and list "
            "these as parts of `calibration.dataset`."
        )


def unknown(what: str, name: str, known: Sequence[str], where: str, setting: str) -> UnknownDataError:
    """The error for a name that does not exist, with the names that do."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean `{close[0]}`?" if close else f"set `{setting}` to one of them."
    listed = ", ".join(f"`{item}`" for item in known)
    return UnknownDataError(f"There is no {what} `{name}` in {where} (it has {listed}); {hint}")
