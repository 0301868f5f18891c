"""How long work shows itself: a bar on a terminal, plain lines elsewhere, or nothing.

Everything goes to stderr, so that stdout stays clean for results. It does not log, and it never changes what work does.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO

LINE_INTERVAL = 5.0  # seconds between two plain lines of one stage


class Stage(Protocol):
    """One stretch of work of known length."""

    def advance(self, detail: str = "") -> None:
        """One more unit is done; `detail` says what it found, such as `16/16 experts seen`."""


class Progress(Protocol):
    """Where long work reports to."""

    def stage(self, name: str, total: int, unit: str = "layer") -> AbstractContextManager[Stage]:
        """Open a stage called `name` (`step 1/2 prune`) of `total` units."""

    def note(self, text: str) -> None:
        """Say one thing that is not a step forward."""


def format_seconds(seconds: float) -> str:
    """A duration as a person says it: `12 s`, `3 min`, `2 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class _Counter:
    """Counts units, and tells a stage's owner after each one."""

    def __init__(self, show: Callable[[int, str], None]) -> None:
        self.done = 0
        self._show = show

    def advance(self, detail: str = "") -> None:
        self.done += 1
        self._show(self.done, detail)


class SilentProgress:
    """Shows nothing."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str = "layer") -> Iterator[Stage]:
        yield _Counter(lambda done, detail: None)

    def note(self, text: str) -> None:
        pass


class PlainProgress:
    """Lines such as `[step 1/2 prune] layer 3/8, 16/16 experts seen, 12 s left`, at most one every `interval` seconds.

    A stage's last unit always gets its line, so a short stage shows as exactly one.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        interval: float = LINE_INTERVAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._interval = interval
        self._clock = clock

    @contextmanager
    def stage(self, name: str, total: int, unit: str = "layer") -> Iterator[Stage]:
        started = shown = self._clock()

        def show(done: int, detail: str) -> None:
            nonlocal shown
            now = self._clock()
            if done != total and now - shown < self._interval:
                return
            shown = now
            elapsed = now - started
            remaining = elapsed / done * (total - done)
            clock = f"{format_seconds(remaining)} left" if done < total else f"done in {format_seconds(elapsed)}"
            self.note(f"[{name}] " + ", ".join(part for part in (f"{unit} {done}/{total}", detail, clock) if part))

        yield _Counter(show)

    def note(self, text: str) -> None:
        print(text, file=self._stream or sys.stderr, flush=True)


class RichProgress:
    """One bar per stage with its detail and the time left; the bar stays when the stage is done."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)

    @contextmanager
    def stage(self, name: str, total: int, unit: str = "layer") -> Iterator[Stage]:
        from rich.markup import escape
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn(unit),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with Bars(*columns, console=self._console) as bars:
            task = bars.add_task(escape(name), total=total, detail="")
            yield _Counter(lambda done, detail: bars.update(task, completed=done, detail=detail))

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)


def progress_for_terminal() -> Progress:
    """A bar when stderr is a terminal, plain lines otherwise."""
    return RichProgress() if sys.stderr.isatty() else PlainProgress()
