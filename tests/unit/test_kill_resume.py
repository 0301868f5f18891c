"""Where the kills of the crash benchmark fall."""

from __future__ import annotations

import random
from typing import Any

from benchmarks.kill_resume import NUM_LAYERS, STAGES, Aim, aim, next_stage


def state(stage: str, scored: int = 0, written: int = 0) -> dict[str, Any]:
    return {"stage": stage, "layers_scored": scored, "layers_written": written}


def test_every_stage_has_its_turn_and_a_missed_one_is_aimed_at_again() -> None:
    kills: list[dict[str, Any]] = []
    while (stage := next_stage(kills, 20)) is not None:
        kills.append({"stage": stage})
    assert [kill["stage"] for kill in kills] == list(STAGES) * 5
    missed = [{"stage": "verify" if stage == "apply" else stage} for stage in list(STAGES) * 5]
    for _ in range(3):
        assert next_stage(missed, 20) == "apply"
        missed.append({"stage": "apply"})
    assert next_stage(missed, 20) is None
    assert next_stage([{"stage": "start"}] * 40, 20) is None, "it gives up"


def test_a_kill_waits_for_its_stage_and_its_layers() -> None:
    wanted = Aim("apply", layers=3)
    for passed in (state("start"), state("score", 8), state("apply", 8, 2)):
        assert not wanted.reached(passed, 99.0)
    for passed in (state("apply", 8, 3), state("verify", 8, 8), state("clean up", 8, 8)):
        assert wanted.reached(passed, 0.0)
    assert not Aim("verify", seconds=2.0).reached(state("verify"), 1.9)
    assert Aim("verify", seconds=2.0).reached(state("verify"), 2.0)


def test_moments_are_spread() -> None:
    rng = random.Random(0)
    assert {aim("score", {}, rng).layers for _ in range(100)} == set(range(NUM_LAYERS))
    moments = [aim("start", {"start": 4.0}, rng).seconds for _ in range(100)]
    assert min(moments) < 0.5 and 3.5 < max(moments) < 4.0
