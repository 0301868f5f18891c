"""The exceptions a user can meet. Each message is one sentence that says what to do; each class has its exit code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class MoECompressError(Exception):
    """Something failed; the base of all our errors."""

    exit_code = 1


class UsageError(MoECompressError):
    """The arguments are wrong."""

    exit_code = 2


class NoAllocationError(UsageError):
    """No allocation keeps to a budget and its rules, or none was found in time."""


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe: the setting's dotted path, its line in the file if there is one, and what is wrong."""

    path: str
    message: str
    line: int | None = None

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line is not None else ""
        return f"{where}{self.path}: {self.message}" if self.path else f"{where}{self.message}"


class RecipeError(MoECompressError):
    """The recipe is wrong; `problems` holds every mistake found."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class ResumeError(MoECompressError):
    """A run cannot be continued, because it is not the same run."""

    exit_code = 2


class CheckpointError(MoECompressError):
    """A checkpoint cannot be read or written."""


class UnsupportedModelError(CheckpointError):
    """The checkpoint is whole, but it is nothing we can compress."""


class MeasurementError(CheckpointError):
    """A checkpoint is whole, but its quality or speed cannot be measured here."""


class TrainingError(MoECompressError):
    """A training cannot go on; the last good state is kept."""


class DataError(MoECompressError):
    """Calibration or evaluation data cannot be had."""


class UnknownDataError(DataError):
    """A setting names data that there is not: no such path, task, split or column."""

    exit_code = 2


class PublishError(MoECompressError):
    """A checkpoint cannot be pushed; what the Hub holds is what it held before."""


class VerificationError(MoECompressError):
    """A check failed, or a target was missed; `checks` holds the outcome of all of them."""

    exit_code = 3

    def __init__(self, message: str, checks: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.checks = checks or {}
        super().__init__(message)
