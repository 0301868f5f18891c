"""Prune plans: scores against token-by-token arithmetic, counts, groups, protection, the JSON form."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moe_compress.calibrate.scores import LayerScores, Scores
from moe_compress.compress.prune.config import ACCUMULATED_SUMS, PruneConfig
from moe_compress.compress.prune.plan import criterion_scores, keep_count, plan_prune, super_experts
from moe_compress.errors import DataError, UsageError

NAMES = ["random", "frequency", "seer", "ean", "reap", "man", "msan", "easy_ep", "mone"]


def prune(**values: Any) -> PruneConfig:
    return PruneConfig.model_validate({"op": "prune", "criterion": "frequency", "keep": 0.5} | values)


@dataclass
class Visit:
    """One token at one expert: gate value, raw output, and the token's 1 - cos before and after the block."""

    expert: int
    gate: float
    output: list[float]
    shift: float


def simulate(num_experts: int, top_k: int, num_tokens: int, hidden: int, seed: int, never: int) -> list[Visit]:
    """Visits of `num_tokens` tokens; expert `never` is never chosen."""
    rng = np.random.default_rng(seed)
    visits = []
    for _ in range(num_tokens):
        state = rng.normal(size=hidden)
        chosen = rng.permutation([e for e in range(num_experts) if e != never])[:top_k]
        gates = rng.random(top_k)
        outputs = rng.normal(size=(top_k, hidden)) * (1 + chosen[:, None]) + rng.normal(size=(1, hidden))
        after = state + gates @ outputs
        shift = max(0.0, 1 - state @ after / (np.linalg.norm(state) * np.linalg.norm(after)))
        visits += [
            Visit(int(e), float(g), f.tolist(), float(shift)) for e, g, f in zip(chosen, gates, outputs, strict=True)
        ]
    return visits


def accumulate(visits: list[Visit], num_experts: int, top_k: int, layer: int = 0) -> LayerScores:
    """The sums a calibration sweep would leave."""
    expert = np.array([v.expert for v in visits])
    gate = np.array([v.gate for v in visits])
    output = np.array([v.output for v in visits])
    norm = np.linalg.norm(output, axis=1)
    shift = np.array([v.shift for v in visits])
    one_hot = np.eye(num_experts)[expert].T
    statistics = {
        "tokens": one_hot.sum(1),
        "gate_sum": one_hot @ gate,
        "norm_sum": one_hot @ norm,
        "norm_sq_sum": one_hot @ norm**2,
        "gate_norm_sum": one_hot @ (gate * norm),
        "gate_sq_norm_sq_sum": one_hot @ (gate * norm) ** 2,
        "max_abs": (one_hot * np.abs(output).max(1)).max(1),
        "easy_ep": one_hot @ (gate * norm * shift),
        "output_sum": one_hot @ output,
        "output_sq_sum": one_hot @ output**2,
    }
    return LayerScores(layer, num_experts, top_k, len(visits) // top_k, 0.9, statistics)


def naive_family(visits: list[Visit], expert: int, b: float, alpha: int, beta: int) -> float:
    mine = [v for v in visits if v.expert == expert]
    if not mine:
        return 0.0
    total = sum((v.gate**alpha * math.hypot(*v.output) ** beta for v in mine), 0.0)
    return float(total / len(mine) ** b)


def naive_easy_ep(visits: list[Visit], expert: int) -> float:
    return sum((v.gate * math.hypot(*v.output) * v.shift for v in visits if v.expert == expert), 0.0)


def naive_mone(visits: list[Visit], expert: int) -> float:
    mine = [v for v in visits if v.expert == expert]
    if not mine:
        return 0.0
    variances = []
    for channel in range(len(mine[0].output)):
        values = [v.output[channel] for v in mine]
        mean = sum(values) / len(values)
        variances.append(sum((value - mean) ** 2 for value in values) / len(values))
    return math.sqrt(sum(variances)) * sum(v.gate for v in mine) / len(mine)


def from_frequencies(*layers: Any, top_k: int = 1, peaks: Any = None) -> Scores:
    """Scores whose `frequency` criterion is exactly the given numbers."""
    result = []
    for index, counts in enumerate(layers):
        tokens = np.asarray(counts, dtype=np.float64)
        max_abs = np.zeros_like(tokens) if peaks is None else np.asarray(peaks[index], dtype=np.float64)
        result.append(LayerScores(index, len(tokens), top_k, 10, 0.9, {"tokens": tokens, "max_abs": max_abs}))
    return Scores(result, {})


# Scores


@pytest.mark.parametrize(
    ("name", "exponents"),
    [
        ("frequency", (0, 0, 0)),
        ("seer", (0, 1, 0)),
        ("ean", (0, 0, 1)),
        ("reap", (1, 1, 1)),
        ("man", (1, 0, 1)),
        ("msan", (1, 0, 2)),
    ],
)
def test_named_criteria_equal_token_by_token_sums(name: str, exponents: tuple[int, int, int]) -> None:
    visits = simulate(num_experts=4, top_k=2, num_tokens=50, hidden=6, seed=1, never=2)
    layer = accumulate(visits, 4, 2)
    expected = [naive_family(visits, expert, *exponents) for expert in range(4)]
    np.testing.assert_allclose(criterion_scores(prune(criterion=name), layer), expected, rtol=1e-12)
    assert expected[2] == 0.0


@pytest.mark.parametrize("pair", sorted(ACCUMULATED_SUMS))
@pytest.mark.parametrize("b", [0, 0.5, 1, 2])
def test_custom_criteria_equal_token_by_token_sums(pair: tuple[int, int], b: float) -> None:
    visits = simulate(num_experts=4, top_k=2, num_tokens=50, hidden=6, seed=2, never=0)
    alpha, beta = pair
    scores = criterion_scores(prune(criterion={"b": b, "alpha": alpha, "beta": beta}), accumulate(visits, 4, 2))
    expected = [naive_family(visits, expert, b, alpha, beta) for expert in range(4)]
    np.testing.assert_allclose(scores, expected, rtol=1e-12)


@pytest.mark.parametrize(("name", "naive"), [("easy_ep", naive_easy_ep), ("mone", naive_mone)])
def test_criteria_outside_the_family(name: str, naive: Any) -> None:
    visits = simulate(num_experts=4, top_k=2, num_tokens=50, hidden=6, seed=3, never=1)
    scores = criterion_scores(prune(criterion=name), accumulate(visits, 4, 2))
    np.testing.assert_allclose(scores, [naive(visits, expert) for expert in range(4)], rtol=1e-9)
    assert scores[1] == 0.0


def test_mone_survives_an_output_that_never_varies() -> None:
    visits = [Visit(0, 0.3, [0.1, 0.7], 0.0)] * 7 + [Visit(1, 0.3, [0.1, -0.2 * i], 0.0) for i in range(7)]
    scores = criterion_scores(prune(criterion="mone"), accumulate(visits, 2, 1))
    assert scores[0] == pytest.approx(0, abs=1e-7)
    assert scores[1] > 0.1


def test_random_depends_on_seed_and_layer_only() -> None:
    scores = from_frequencies(range(16), range(16))
    config = prune(criterion="random", seed=3)
    first, second = (criterion_scores(config, layer) for layer in scores.layers)
    assert not np.array_equal(first, second)
    assert np.array_equal(first, criterion_scores(config, scores.layers[0]))
    assert not np.array_equal(first, criterion_scores(prune(criterion="random", seed=4), scores.layers[0]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_statistic_that_is_not_finite_is_refused(bad: float) -> None:
    scores = from_frequencies([1, 2, 3, 4])
    scores.layers[0].statistics["gate_sum"] = np.array([1, bad, 1, 1])
    with pytest.raises(DataError, match="layer 0, expert 1"):
        plan_prune(prune(criterion="seer"), scores, num_decoder_layers=1)
    scores.layers[0].statistics["max_abs"] = np.array([1, bad, 1, 1])
    with pytest.raises(DataError, match="layer 0, expert 1"):
        plan_prune(prune(), scores, num_decoder_layers=1)


# Settings


@pytest.mark.parametrize("keep", [0, -1, 0.0, 1.5, -0.5, True, "0.5", None, math.nan, math.inf])
def test_impossible_keep_is_one_sentence(keep: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        prune(keep=keep)
    assert [error["loc"] for error in caught.value.errors()] == [("keep",)]


def test_whole_numbers_are_counts_and_fractions_fractions() -> None:
    assert type(prune(keep=1).keep) is int
    assert type(prune(keep=1.0).keep) is float


@pytest.mark.parametrize("pair", [(1, 2), (0, 3), (2, 1), (2, 0), (0.5, 1)])
def test_pairs_that_are_not_accumulated_are_refused(pair: tuple[float, int]) -> None:
    with pytest.raises(ValidationError):
        prune(criterion={"b": 1, "alpha": pair[0], "beta": pair[1]})


@pytest.mark.parametrize("criterion", ["reep", {"b": -1, "alpha": 0, "beta": 0}, {"b": 0}, 3, None])
def test_unknown_criteria_are_refused(criterion: Any) -> None:
    with pytest.raises(ValidationError):
        prune(criterion=criterion)


def test_a_count_must_fit_multiple_of() -> None:
    with pytest.raises(ValidationError, match="ask for keep: 8 or 16"):
        prune(keep=12, multiple_of=8)


# Counts


@pytest.mark.parametrize(
    ("keep", "multiple_of", "expected"),
    [
        (0.75, 1, 12),
        (0.6, 1, 10),
        (0.03, 1, 1),
        (1.0, 1, 16),
        (5, 1, 5),
        (0.75, 8, 16),
        (0.7, 8, 8),
        (0.1, 8, 8),
        (1.0, 6, 12),
    ],
)
def test_counts(keep: float, multiple_of: int, expected: int) -> None:
    assert keep_count(prune(keep=keep, multiple_of=multiple_of), num_experts=16, top_k=1) == expected


@pytest.mark.parametrize(
    ("values", "arguments", "message"),
    [
        ({"keep": 17}, {}, "more experts than the 16"),
        ({"keep": 0.2}, {"top_k": 4}, "smallest possible is keep: 4"),
        ({"keep": 0.2, "multiple_of": 3}, {"top_k": 4}, "smallest possible is keep: 6"),
        ({"keep": 10}, {"num_groups": 4}, "nearest possible is keep: 8 or 12"),
        ({"keep": 15, "multiple_of": 3}, {"num_groups": 4}, "nearest possible is keep: 12"),
        ({"keep": 4}, {"num_groups": 4}, "smallest possible is keep: 8"),
        ({"keep": 8}, {"num_groups": 4, "groups_per_token": 2, "top_k": 5}, "smallest possible is keep: 12"),
        ({"keep": 0.5, "multiple_of": 17}, {}, "lower multiple_of"),
    ],
)
def test_impossible_counts_say_what_is_possible(
    values: dict[str, Any], arguments: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        keep_count(prune(**values), **({"num_experts": 16, "top_k": 1} | arguments))


def test_asked_and_achieved_are_recorded() -> None:
    plan = plan_prune(prune(keep=0.7, multiple_of=4), from_frequencies(range(16), range(16)), num_decoder_layers=2)
    content = plan.to_json()
    assert content["asked"] == {"keep": 0.7, "experts": pytest.approx(22.4)}
    assert content["achieved"] == {"keep": 0.75, "experts": 24, "of": 32}


# Choices


def test_the_lowest_scores_go_and_ties_keep_the_lower_index() -> None:
    plan = plan_prune(prune(), from_frequencies([5, 1, 5, 5, 0, 9]), num_decoder_layers=1)
    assert plan.layers[0].keep == (0, 2, 5)
    assert list(plan.layers[0].scores) == [5, 1, 5, 5, 0, 9]
    plan = plan_prune(prune(), from_frequencies([7] * 6), num_decoder_layers=1)
    assert plan.layers[0].keep == (0, 1, 2)


def test_groups_drop_equally_though_scores_would_not() -> None:
    plan = plan_prune(prune(), from_frequencies([9, 8, 7, 6, 1, 2, 3, 4]), num_decoder_layers=1, num_groups=2)
    assert plan.layers[0].keep == (0, 1, 6, 7)


def test_with_constants_the_router_asks_for_nothing() -> None:
    """Neither top-k nor routing groups matter where the router keeps its rows."""
    scores = from_frequencies([9, 8, 7, 6, 1, 2, 3, 4], top_k=4)
    kept = prune(keep=3, replace="constant", scope="layer")
    assert plan_prune(kept, scores, num_decoder_layers=1, num_groups=2).layers[0].keep == (0, 1, 2)
    assert keep_count(kept, num_experts=8, top_k=4, num_groups=2) == 3
    with pytest.raises(UsageError, match="smallest possible is keep: 4"):
        keep_count(prune(keep=3), num_experts=8, top_k=4)


def test_global_scope_takes_from_the_weak_layer_down_to_top_k() -> None:
    scores = from_frequencies([9, 8, 7, 6], [1, 2, 3, 4], top_k=1)
    plan = plan_prune(prune(scope="global"), scores, num_decoder_layers=2)
    assert [layer.keep for layer in plan.layers] == [(0, 1, 2), (3,)]
    scores = from_frequencies([9, 8, 7, 6], [1, 2, 3, 4], top_k=2)
    plan = plan_prune(prune(scope="global"), scores, num_decoder_layers=2)
    assert [layer.keep for layer in plan.layers] == [(0, 1), (2, 3)]
    with pytest.raises(UsageError, match="smallest possible is 4"):
        plan_prune(prune(scope="global", keep=0.3), scores, num_decoder_layers=2)


def test_global_scope_counts_are_a_mean_per_layer() -> None:
    scores = from_frequencies([9, 8, 7, 6], [1, 2, 3, 4])
    plan = plan_prune(prune(scope="global", keep=2), scores, num_decoder_layers=2)
    assert plan.num_kept == 4
    assert plan.num_asked == 4
    with pytest.raises(UsageError, match="more experts than the 4"):
        plan_prune(prune(scope="global", keep=5), scores, num_decoder_layers=2)


def test_global_scope_respects_groups() -> None:
    scores = from_frequencies([90, 80, 70, 60, 50, 40, 30, 20], [8, 7, 6, 5, 4, 3, 2, 1], top_k=2)
    plan = plan_prune(prune(scope="global", keep=0.75), scores, num_decoder_layers=2, num_groups=2)
    assert [layer.keep for layer in plan.layers] == [tuple(range(8)), (0, 1, 4, 5)]


# Super experts


def planted(peaks: dict[tuple[int, int], float], layers: int, experts: int) -> Scores:
    rng = np.random.default_rng(0)
    grid = rng.uniform(1, 60, size=(layers, experts))
    for place, value in peaks.items():
        grid[place] = value
    return from_frequencies(*np.ones_like(grid), peaks=grid)


def test_super_experts_of_the_published_shape() -> None:
    published = {(1, 68): 744.0, (2, 92): 540.0, (3, 82): 430.0}
    scores = planted(published | {(5, 7): 63.5}, layers=48, experts=128)
    assert super_experts(scores, 48) == set(published)
    single = planted({(1, 3): 5600.0, (4, 0): 302.0}, layers=32, experts=8)
    assert super_experts(single, 32) == {(1, 3)}


def test_super_experts_in_the_last_quarter_do_not_count() -> None:
    scores = planted({(1, 5): 700.0, (36, 0): 9000.0, (47, 1): 9000.0}, layers=48, experts=128)
    assert super_experts(scores, 48) == {(1, 5)}


def test_layer_indices_are_those_of_the_decoder() -> None:
    """With dense layers in front, the early part is counted in decoder layers, not in MoE layers."""
    scores = planted({(0, 1): 700.0, (2, 0): 900.0}, layers=4, experts=64)
    for layer in scores.layers:
        layer.layer += 4
    assert super_experts(scores, 8) == {(4, 1)}


def test_super_experts_need_tokens_and_a_strict_margin() -> None:
    scores = planted({(0, 3): 700.0, (0, 4): 800.0}, layers=4, experts=128)
    scores.layers[0].statistics["tokens"][4] = 0
    assert super_experts(scores, 4) == {(0, 3)}
    assert super_experts(from_frequencies([1] * 8, peaks=[[5.0] * 8]), 1) == set()
    assert super_experts(from_frequencies([1] * 8), 1) == set()
    exactly_a_tenth = from_frequencies([1] * 400, peaks=[[1.0] * 397 + [10.0, 10.0, 100.0]])
    assert super_experts(exactly_a_tenth, 1) == {(0, 399)}


def test_protected_experts_survive_the_lowest_score() -> None:
    scores = from_frequencies([1, 9, 9, 9], peaks=[[500, 1, 1, 1]])
    plan = plan_prune(prune(), scores, num_decoder_layers=1)
    assert plan.layers[0].protected == (0,)
    assert plan.layers[0].keep == (0, 1)
    plan = plan_prune(prune(protect_super_experts=False), scores, num_decoder_layers=1)
    assert plan.layers[0].protected == ()
    assert plan.layers[0].keep == (1, 2)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_more_protected_than_kept_is_an_error(scope: str) -> None:
    scores = from_frequencies([1] * 600, peaks=[[500.0] * 2 + [1.0] * 598])
    with pytest.raises(UsageError, match=r"super experts"):
        plan_prune(prune(keep=1, scope=scope), scores, num_decoder_layers=1)


def test_global_scope_makes_room_for_the_protected() -> None:
    scores = from_frequencies([9] * 300, [1] * 300, peaks=[[1.0] * 300, [1.0] * 298 + [500.0, 400.0]])
    plan = plan_prune(prune(scope="global"), scores, num_decoder_layers=4)
    assert plan.layers[1].keep == (298, 299)
    assert len(plan.layers[0].keep) == 298


# Properties

shapes = st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 4]), st.integers(2, 5))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Scores, int, PruneConfig]:
    """Scores with ties and peaks, a number of groups, and a prune setting that is possible more often than not."""
    num_layers, num_groups, per_group = draw(shapes)
    num_experts = num_groups * per_group
    counts = st.lists(st.integers(0, 6), min_size=num_experts, max_size=num_experts)
    peaks = st.lists(st.sampled_from([1.0, 2.0, 90.0]), min_size=num_experts, max_size=num_experts)
    scores = from_frequencies(
        *[draw(counts) for _ in range(num_layers)],
        top_k=draw(st.integers(1, 3)),
        peaks=[draw(peaks) for _ in range(num_layers)],
    )
    config = prune(
        criterion=draw(st.sampled_from(["frequency", "random"])),
        keep=draw(st.one_of(st.floats(0.3, 1.0), st.integers(1, num_experts))),
        scope=draw(st.sampled_from(["layer", "global"])),
        protect_super_experts=draw(st.booleans()),
    )
    return scores, num_groups, config


def is_possible(scores: Scores, num_groups: int, config: PruneConfig) -> bool:
    """Whether `keep` leaves every layer its top-k and its super experts, in equal shares of the routing groups."""
    found = super_experts(scores, len(scores.layers)) if config.protect_super_experts else set()
    fewest = []
    for layer in scores.layers:
        size = layer.num_experts // num_groups
        share = math.ceil(layer.top_k / num_groups)
        share = share if num_groups == 1 else max(share, 2)
        protected = [expert // size for index, expert in found if index == layer.layer]
        fewest.append(num_groups * max([share, *(protected.count(group) for group in range(num_groups))]))
    each = [layer.num_experts for layer in scores.layers]
    if any(needed > there for needed, there in zip(fewest, each, strict=True)):
        return False
    if config.scope == "layer":
        asked = config.keep if isinstance(config.keep, int) else math.floor(config.keep * each[0] + 0.5)
        return max(asked, 1) % num_groups == 0 and max(asked, 1) >= max(fewest)
    wanted = config.keep * len(each) if isinstance(config.keep, int) else math.floor(config.keep * sum(each) + 0.5)
    return min(max(math.floor(wanted / num_groups + 0.5), 1) * num_groups, sum(each)) >= sum(fewest)


@settings(max_examples=300, deadline=None)
@given(cases())
def test_a_plan_keeps_its_promises(case: tuple[Scores, int, PruneConfig]) -> None:
    scores, num_groups, config = case
    if not is_possible(scores, num_groups, config):
        with pytest.raises(UsageError):
            plan_prune(config, scores, num_decoder_layers=len(scores.layers), num_groups=num_groups)
        return
    plan = plan_prune(config, scores, num_decoder_layers=len(scores.layers), num_groups=num_groups)
    found = super_experts(scores, len(scores.layers)) if config.protect_super_experts else set()
    asked: float
    total = sum(layer.num_experts for layer in scores.layers)
    if config.scope == "layer":
        asked = (
            config.keep
            if isinstance(config.keep, int)
            else math.floor(config.keep * scores.layers[0].num_experts + 0.5)
        )
        assert {len(layer.keep) for layer in plan.layers} == {max(asked, 1)}
    else:
        asked = config.keep * len(scores.layers) if isinstance(config.keep, int) else config.keep * total
        assert abs(plan.num_kept - asked) <= num_groups / 2 + 0.5
    for layer, source in zip(plan.layers, scores.layers, strict=True):
        assert list(layer.keep) == sorted(set(layer.keep))
        assert len(layer.keep) >= source.top_k
        assert {expert for index, expert in found if index == layer.layer} == set(layer.protected) <= set(layer.keep)
        groups = np.asarray(layer.keep) // (layer.num_experts // num_groups)
        assert len(set(np.bincount(groups, minlength=num_groups).tolist())) == 1
        for group in range(num_groups):
            members = range(group * layer.num_experts // num_groups, (group + 1) * layer.num_experts // num_groups)
            kept = [(layer.scores[e], -e) for e in members if e in layer.keep and e not in layer.protected]
            lost = [(layer.scores[e], -e) for e in members if e not in layer.keep]
            assert not kept or not lost or min(kept) > max(lost)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_only_the_order_of_scores_matters(case: tuple[Scores, int, PruneConfig]) -> None:
    """Within a layer always; over layers where experts are added one by one."""
    scores, num_groups, config = case
    num_groups = num_groups if config.scope == "layer" else 1
    stretched = from_frequencies(
        *[np.exp(layer.statistics["tokens"]) - 1 for layer in scores.layers],
        top_k=scores.layers[0].top_k,
        peaks=[layer.statistics["max_abs"] for layer in scores.layers],
    )
    assume(is_possible(scores, num_groups, config))
    outcomes = []
    for variant in (scores, stretched):
        plan = plan_prune(config, variant, num_decoder_layers=len(scores.layers), num_groups=num_groups)
        outcomes.append([layer.keep for layer in plan.layers])
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("name", NAMES)
def test_every_criterion_plans(name: str) -> None:
    visits = simulate(num_experts=8, top_k=2, num_tokens=60, hidden=4, seed=5, never=6)
    scores = Scores([accumulate(visits, 8, 2)], {})
    plan = plan_prune(prune(criterion=name, keep=6), scores, num_decoder_layers=1)
    assert len(plan.layers[0].keep) == 6
    if name != "random":
        assert 6 not in plan.layers[0].keep


# JSON


def test_the_json_form_says_all_of_the_plan() -> None:
    config = prune(criterion={"b": 0.5, "alpha": 1, "beta": 1}, keep=1.0)
    scores = Scores([accumulate(simulate(4, 2, 20, 3, 0, never=3), 4, 2)], {})
    plan = plan_prune(config, scores, num_decoder_layers=1)
    content: dict[str, Any] = json.loads(json.dumps(plan.to_json(), allow_nan=False))
    assert content["format"] == 1 and PruneConfig.model_validate(content["config"]) == config
    assert content["achieved"] == {"keep": 1.0, "experts": 4, "of": 4}
    (layer,) = content["layers"]
    assert (layer["layer"], layer["num_experts"], layer["keep"]) == (0, 4, [0, 1, 2, 3])
    assert (tuple(layer["protected"]), tuple(layer["scores"])) == (plan.layers[0].protected, plan.layers[0].scores)
