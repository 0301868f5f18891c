"""What a step did to a checkpoint, as `step.json` and `manifest.json` keep it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moe_compress.settings import shown_size

SIZE = "size"  # of `Target.shown`: bytes in human units


@dataclass(frozen=True)
class Target:
    """A figure that a step was asked for; with `at_most` it may be smaller. `tolerance` is in the figure's own unit.

    With `on_disk` it is the bytes of the checkpoint's tensors, counted again whenever the checkpoint is verified.
    """

    what: str
    asked: float
    achieved: float
    tolerance: float
    at_most: bool = False
    shown: str = ",.6g"  # format of the figures; or `SIZE`
    on_disk: bool = False

    @property
    def is_met(self) -> bool:
        """Whether the figure is near enough to what was asked."""
        over = self.achieved - self.asked
        return (over if self.at_most else abs(over)) <= self.tolerance

    def __str__(self) -> str:
        most = "at most " if self.at_most else ""
        if self.shown == SIZE:
            return f"{self.what} {shown_size(self.achieved, up=True)} (asked: {most}{shown_size(self.asked)})"
        return f"{self.what} {self.achieved:{self.shown}} (asked: {most}{self.asked:{self.shown}})"


Experts = Sequence[tuple[int, int]]  # (decoder layer, expert as numbered in the step's source)


@dataclass(frozen=True)
class Record:
    """What a finished step did, for the manifest, the checks and the report; `step.json` holds it.

    Of the experts that fewer calibration tokens reached than asked, `starved_kept` are there as they were,
    `starved_dropped` are gone, `pooled` were given statistics of their layer. `dropped_bytes` is by how much the
    weights on disk shrank. `label` is the step's choice in a word or two.
    """

    op: str
    config: dict[str, Any]
    label: Any
    dropped_bytes: int
    targets: Sequence[Target] = ()
    coverage: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    starved_kept: Experts = ()
    starved_dropped: Experts = ()
    pooled: Experts = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Record:
        """What `to_json` gave."""
        return cls(**{**content, "targets": [Target(**target) for target in content["targets"]]})
