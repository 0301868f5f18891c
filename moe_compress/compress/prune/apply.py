"""Dropping experts from a checkpoint: the kept experts' weights and router rows, nothing else changes.

Weights are kept bit for bit and the router is not rescaled: a token that would have used a dropped expert takes the
next best of the kept ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_compress.checkpoint.rewrite import Change
from moe_compress.compress.prune.plan import PrunePlan
from moe_compress.models.families import EXPERT_COUNT_KEYS, OTHER_TOWERS
from moe_compress.models.layers import SECTION, MoELayer
from moe_compress.runtime.families import plugin_config, plugin_section


class PruneChange(Change):
    """Applies a plan; a checkpoint whose layers keep different numbers of experts is one of the tier `plugin`."""

    def __init__(self, plan: PrunePlan) -> None:
        self.keep = {layer.layer: torch.tensor(layer.keep) for layer in plan.layers}
        self.before = plan.layers[0].num_experts

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        return with_counts(config, self.before, {layer: len(keep) for layer, keep in self.keep.items()})

    def layer(self, moe: MoELayer, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The layer's tensors with only the kept experts."""
        return moe.select(state, self.keep[moe.layer])


def with_counts(config: dict[str, Any], before: int, counts: Mapping[int, int]) -> dict[str, Any]:
    """`config.json` with these experts per layer instead of `before`: in the family's own keys, or layer by layer."""
    if SECTION in config or len(set(counts.values())) > 1:
        section = config.get(SECTION) or plugin_section(before)
        layers = {**section["layers"]}
        for layer, count in counts.items():
            layers[str(layer)] = {**layers.get(str(layer), {}), "num_experts": count}
        return plugin_config(config, section | {"layers": layers})
    return _with_count(config, before, next(iter(counts.values())))


def _with_count(config: dict[str, Any], before: int, count: int) -> dict[str, Any]:
    """`config.json` with another expert count, which it may so far have left to its class's default."""
    new = _replaced(config, before, count)
    found = _parsed(new)
    text = found.get_text_config()
    known = text.to_dict()
    unsaid = {key: count for key in EXPERT_COUNT_KEYS if key in known and getattr(text, key) == before != count}
    if unsaid:
        section = next((name for name in found.sub_configs if getattr(found, name, None) is text), None)
        new = new | (unsaid if section is None else {section: (new.get(section) or {}) | unsaid})
        text = _parsed(new).get_text_config()
    assert any(getattr(text, key, None) == count for key in EXPERT_COUNT_KEYS), config["model_type"]
    return new


def _parsed(config: dict[str, Any]) -> Any:
    """The configuration as transformers reads it from a file, which may hold numbers that JSON has not."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(config), encoding="utf-8")
        return CONFIG_MAPPING[config["model_type"]].from_json_file(file)


def _replaced(config: dict[str, Any], before: int, count: int) -> dict[str, Any]:
    """The language model's expert count replaced under every name it has, at any depth."""
    return {
        key: count
        if key in EXPERT_COUNT_KEYS and value == before
        else _replaced(value, before, count)
        if isinstance(value, dict) and key not in OTHER_TOWERS
        else value
        for key, value in config.items()
    }
