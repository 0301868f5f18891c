"""How long work shows itself."""

from __future__ import annotations

import io

import pytest

from moe_compress.progress import PlainProgress, Progress, RichProgress, SilentProgress, format_seconds


class Clock:
    """A clock that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_say_how_far_and_how_long() -> None:
    clock, stream = Clock(), io.StringIO()
    with PlainProgress(stream, interval=0, clock=clock).stage("step 1/2 prune", 4) as stage:
        for _ in range(4):
            clock.now += 6
            stage.advance("16/16 experts seen")
    assert stream.getvalue().splitlines() == [
        "[step 1/2 prune] layer 1/4, 16/16 experts seen, 18 s left",
        "[step 1/2 prune] layer 2/4, 16/16 experts seen, 12 s left",
        "[step 1/2 prune] layer 3/4, 16/16 experts seen, 6 s left",
        "[step 1/2 prune] layer 4/4, 16/16 experts seen, done in 24 s",
    ]


def test_plain_lines_are_throttled_but_the_last_always_shows() -> None:
    clock, stream = Clock(), io.StringIO()
    with PlainProgress(stream, interval=5, clock=clock).stage("eval", 100, unit="task") as stage:
        for _ in range(100):
            clock.now += 0.1
            stage.advance()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[-1] == "[eval] task 100/100, done in 10 s"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (91, "2 min"), (5000, "83 min"), (7500, "2 h 05 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize("kind", [SilentProgress, PlainProgress, RichProgress])
def test_all_kinds_write_to_stderr_only(kind: type[Progress], capsys: pytest.CaptureFixture[str]) -> None:
    progress: Progress = kind()
    with progress.stage("a [bold]name[/bold]", 2) as stage:
        stage.advance("x")
        progress.note("[note]")
        stage.advance()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert ("[note]" in shown.err) == (kind is not SilentProgress)
    assert ("[bold]" in shown.err) == (kind is not SilentProgress)
