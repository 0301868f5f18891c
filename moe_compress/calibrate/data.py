"""Calibration tokens: documents packed into sequences of one length, the same for the same seed.

Documents are joined with the end-of-sequence token between them and cut every `sequence_length` tokens, without
padding; what is left of a document goes on in the next sequence. A mix gives every part its share of the sequences.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from moe_compress.calibrate.config import CalibrationConfig, DatasetPart
from moe_compress.calibrate.documents import documents
from moe_compress.errors import DataError, UsageError

# A document longer than the missing tokens can use is cut before it is tokenized; no token is this long on average.
MAX_CHARACTERS_PER_TOKEN = 32


@dataclass(frozen=True)
class Calibration:
    """`tokens` [num_samples, sequence_length]; `sources` says what each part gave."""

    tokens: torch.LongTensor
    fingerprint: str
    sources: list[dict[str, Any]]


def load_calibration(
    config: CalibrationConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    after: Sequence[int] | None = None,
) -> Calibration:
    """Exactly `num_samples` sequences of `sequence_length` tokens.

    The documents that hold the first `after` sequences of each part, if given, are left out.

    `max_length` is the longest sequence the model takes. Raises `UsageError` when a sequence would be longer,
    `DataError` when a dataset, split or column does not exist, or when there is too little text. `fingerprint` is the
    sha256 of the token ids and of the settings that decide them.
    """
    if max_length is not None and config.sequence_length > max_length:
        raise UsageError(
            f"`sequence_length` is {config.sequence_length}, but the model takes {max_length} tokens at "
            f"most; set it to {max_length} or less."
        )
    parts = config.parts
    sequences: list[list[int]] = []
    sources = []
    for position, (part, count) in enumerate(zip(parts, share(parts, config.num_samples), strict=True)):
        with quiet_readers():
            skipped = after[position] if after is not None else 0
            tokens, num_documents = _pack(part, tokenizer, count, config, config.seed + position, skipped)
        sequences += [tokens[i : i + config.sequence_length] for i in range(0, len(tokens), config.sequence_length)]
        sources.append(part.model_dump() | {"sequences": count, "documents": num_documents, "tokens": len(tokens)})
    random.Random(config.seed).shuffle(sequences)
    tensor = torch.LongTensor(sequences)
    return Calibration(tensor, fingerprint(tensor, config), sources)


def load_held_out(
    config: CalibrationConfig, tokenizer: PreTrainedTokenizerBase, num_sequences: int, *, max_length: int | None
) -> Calibration:
    """`num_sequences` more sequences of the same data: of the documents that come after those for calibration.

    No document is in both. Raises `DataError` as `load_calibration` does.
    """
    further = config.model_copy(update={"num_samples": num_sequences})
    used = share(config.parts, config.num_samples)
    return load_calibration(further, tokenizer, max_length=max_length, after=used)


@contextmanager
def quiet_readers() -> Iterator[None]:
    """Keep `datasets` from logging what it also raises: we say it in one sentence."""
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def share(parts: list[DatasetPart], num_samples: int) -> list[int]:
    """Sequences of each part in proportion to the weights, largest remainders first; they sum to `num_samples`."""
    total = sum(part.weight for part in parts)
    exact = [part.weight / total * num_samples for part in parts]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: num_samples - sum(counts)]:
        counts[i] += 1
    if 0 in counts:
        raise UsageError(
            f"Dataset {parts[counts.index(0)].dataset} gets none of the {num_samples} sequences; raise `num_samples` "
            "or its weight."
        )
    return counts


def _pack(
    part: DatasetPart,
    tokenizer: PreTrainedTokenizerBase,
    num_sequences: int,
    config: CalibrationConfig,
    seed: int,
    after: int,
) -> tuple[list[int], int]:
    """`num_sequences * sequence_length` tokens, and the number of documents they came from.

    The documents of the first `after` sequences are left out.
    """
    to_skip = after * config.sequence_length
    needed = to_skip or num_sequences * config.sequence_length
    tokens: list[int] = []
    num_documents = 0
    for text, is_chat in documents(part, tokenizer, seed):
        if tokens and tokenizer.eos_token_id is not None and tokens[-1] != tokenizer.eos_token_id:
            tokens.append(tokenizer.eos_token_id)
        text = text[: MAX_CHARACTERS_PER_TOKEN * (needed - len(tokens))]
        # a chat template writes its own special tokens
        tokens += tokenizer(text, add_special_tokens=not is_chat, verbose=False)["input_ids"]
        num_documents += 1
        if len(tokens) >= needed and not to_skip:
            return tokens[:needed], num_documents
        if len(tokens) >= needed:
            tokens, num_documents, to_skip = [], 0, 0
            needed = num_sequences * config.sequence_length
    enough = len(tokens) // config.sequence_length
    advice = f"lower `num_samples` (there is enough for {enough}) or" if enough else "lower"
    found = f"{len(tokens):,} tokens in {num_documents:,} documents" + " beyond those for calibration" * bool(after)
    raise DataError(
        f"Dataset {part.dataset} has only {found}, but {needed:,} are needed ({num_sequences} x "
        f"{config.sequence_length}); {advice} `sequence_length`, or add data."
    )


def fingerprint(tokens: torch.Tensor, config: CalibrationConfig) -> str:
    """sha256 over the settings that decide the tokens and over the token ids [N, L]."""
    settings = config.model_dump(exclude={"batch_size", "min_tokens_per_expert"})
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(tokens.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
