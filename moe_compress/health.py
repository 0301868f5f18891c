"""How healthy a model's routing is, from scores alone: load, dead and super experts, and whether routing is local.

Local routing consistency decides what experts in slow memory cost (arXiv 2505.16056): SRP says how well one set of
experts serves a window of tokens, and the caches how often an expert is at hand (`calibrate.locality`). SRP by chance
is that of tokens which draw their experts one by one, each expert as often as it is used in its layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_compress.calibrate.locality import (
    CACHE_RATIOS,
    CACHE_SEGMENT,
    SEGMENTS,
    Array,
    by_chance,
    segment_routing,
    windows,
)
from moe_compress.calibrate.scores import LayerScores, Scores
from moe_compress.compress.prune.plan import super_experts
from moe_compress.text import format_bytes, format_percent

SHOWN_SEGMENT, SHOWN_RATIO = 16, 2  # in sentences
NEAR_CHANCE = 0.05  # SRP above chance that is hardly any
NEEDED = ("tokens", "max_abs", "cache_lookups", "cache_hits", *map(windows, SEGMENTS))  # statistics


def routing_health(scores: Scores, num_decoder_layers: int, expert_bytes: float) -> dict[str, Any]:
    """Routing health of a model as its scores show it; `expert_bytes` are those that one routed expert is stored in.

    `load` is an expert's tokens over the mean of its layer, 1 everywhere under perfect balance, and `used_evenly` the
    exponential of the loads' entropy over the number of experts. `srp` and `hit_rates` are missing in scores that hold
    no windows; `offloading` says in sentences what they mean.
    """
    supers = super_experts(scores, num_decoder_layers)
    layers = [
        _layer(layer, sorted(expert for index, expert in supers if index == layer.layer)) for layer in scores.layers
    ]
    found: dict[str, Any] = {
        "tokens": scores.layers[0].num_tokens,
        "layers": layers,
        "dead": [[layer["layer"], expert] for layer in layers for expert in layer["dead"]],
        "super": [[layer["layer"], expert] for layer in layers for expert in layer["super"]],
    }
    if all("cache_hits" in layer.statistics for layer in scores.layers):
        pooled = {name: np.concatenate([one.statistics[name] for one in scores.layers]) for name in NEEDED}
        found |= _locality(pooled, np.concatenate([_probabilities(layer) for layer in scores.layers]))
    return found | {"offloading": _offloading(found, scores, expert_bytes)}


def _layer(layer: LayerScores, supers: list[int]) -> dict[str, Any]:
    statistics = layer.statistics
    tokens = statistics["tokens"]
    load = tokens / max(tokens.mean(), np.finfo(np.float64).tiny)
    share = tokens[tokens > 0] / max(tokens.sum(), 1.0)
    found: dict[str, Any] = {
        "layer": layer.layer,
        "num_experts": layer.num_experts,
        "top_k": layer.top_k,
        "smallest_load": float(load.min()),
        "largest_load": float(load.max()),
        "used_evenly": float(np.exp(-(share * np.log(share)).sum()) / layer.num_experts),
        "dead": np.flatnonzero(tokens == 0).tolist(),
        "super": supers,
    }
    return found | (_locality(statistics, _probabilities(layer)) if "cache_hits" in statistics else {})


def _probabilities(layer: LayerScores) -> Array:
    """How often a token of the layer uses each expert [E]."""
    probabilities: Array = layer.statistics["tokens"] / max(1, layer.num_tokens)
    return probabilities


def _locality(statistics: dict[str, Array], probability_E: Array) -> dict[str, Any]:
    """SRP by window length and hit rates by cache size, of one layer or of all together."""
    found: dict[str, Any] = {"srp": {}, "hit_rates": {}}
    for segment in SEGMENTS:
        routing = segment_routing(statistics[windows(segment)])
        chance = segment_routing(by_chance(probability_E, segment))
        if routing is not None and chance is not None:
            found["srp"][str(segment)] = {
                "value": routing.value,
                "by_chance": chance.value,
                "size_ratio": routing.size_ratio,
            }
    lookups = statistics["cache_lookups"].sum()
    if lookups:
        rates = statistics["cache_hits"].sum(axis=0) / lookups
        found["hit_rates"] = {str(ratio): float(rate) for ratio, rate in zip(CACHE_RATIOS, rates, strict=True)}
    return found


def _offloading(found: dict[str, Any], scores: Scores, expert_bytes: float) -> list[str]:
    """What the figures mean for keeping experts in slow memory, in sentences."""
    if "srp" not in found:
        return ["the scores hold nothing about tokens in a row; score again to see whether experts can be offloaded."]
    sentences = []
    routing = found["srp"].get(str(SHOWN_SEGMENT))
    if routing is None:
        sentences.append(f"the calibration sequences are shorter than {SHOWN_SEGMENT} tokens, too short for SRP.")
    else:
        above = routing["value"] - routing["by_chance"]
        meaning = (
            "tokens near each other use hardly the same experts, so offloaded experts would be fetched again and again"
            if above < NEAR_CHANCE
            else "tokens near each other use the same experts more often than their loads explain, which caches live on"
        )
        sentences.append(
            f"SRP over {SHOWN_SEGMENT} tokens is {routing['value']:.3f}, {routing['by_chance']:.3f} by chance: "
            f"{meaning}."
        )
    if str(SHOWN_RATIO) in found["hit_rates"]:
        rate = found["hit_rates"][str(SHOWN_RATIO)]
        top_k = sum(layer.top_k for layer in scores.layers)
        held = sum(min(layer.num_experts, SHOWN_RATIO * layer.top_k) for layer in scores.layers)
        everything = sum(layer.num_experts for layer in scores.layers)
        sentences.append(
            f"with {SHOWN_RATIO} x top-k experts of every layer in fast memory ({held} of {everything}, "
            f"{format_bytes(held * expert_bytes)}), {format_percent(rate)} of the experts a token needs are there at "
            f"best (a cache that knows the next {CACHE_SEGMENT} tokens): "
            f"{format_bytes((1 - rate) * top_k * expert_bytes)} to fetch per token, of "
            f"{format_bytes(top_k * expert_bytes)} that it uses."
        )
    return sentences
