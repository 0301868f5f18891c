"""lm-eval's Hugging Face model, silent, with its progress told to a callback. Slow to import, so import it late."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM


class QuietLM(HFLM):
    """`HFLM` that calls `progress(done, total)` after every request; the total grows as request types begin."""

    def __init__(self, *args: Any, progress: Callable[[int, int], None] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._progress = progress
        self._done = self._total = 0
        self.set_cache_hook(self)

    def add_partial(self, attribute: str, request: Any, answer: Any) -> None:
        """lm-eval calls this for every finished request."""
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._total += len(requests)
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        self._total += len(requests)
        answers: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        self._total += len(requests)
        answers: list[str] = super().generate_until(requests, disable_tqdm=True)
        return answers
