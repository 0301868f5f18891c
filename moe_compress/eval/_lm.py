"""lm-eval's Hugging Face model, silent, with its progress told to a callback. Slow to import, so import it late."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import resolve_max_length
from transformers import AutoConfig

from moe_compress.checkpoint.source import load_tokenizer


class QuietLM(HFLM):
    """`HFLM` that calls `progress(done, total)` when a kind of request begins, raising the total, and after each."""

    def __init__(self, *args: Any, progress: Callable[[int, int], None] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._progress = progress
        self._done = self._total = 0
        self.set_cache_hook(self)

    def add_partial(self, attribute: str, request: Any, answer: Any) -> None:
        """lm-eval calls this for every finished request."""
        self._tell(done=1)

    def _tell(self, *, done: int = 0, total: int = 0) -> None:
        self._done += done
        self._total += total
        if self._progress is not None:
            self._progress(self._done, self._total)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._tell(total=len(requests))
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        self._tell(total=len(requests))
        answers: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        self._tell(total=len(requests))
        answers: list[str] = super().generate_until(requests, disable_tqdm=True)
        return answers


class WithoutWeights:
    """What `QuietLM` says of a model before its weights are there."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = load_tokenizer(folder)
        self.max_length = resolve_max_length(AutoConfig.from_pretrained(folder), self.tokenizer)
        self.max_gen_toks: int = HFLM.max_gen_toks.fget(self)
