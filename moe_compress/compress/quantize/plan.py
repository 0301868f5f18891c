"""Which routed experts get how many bits, and which are dropped: numbers in, numbers out.

One width for all is written down as it is; a budget is an integer program over the measured costs (`allocate`).
Predicted losses, with n tokens routed to an expert, N tokens in all, g gate values, f an expert's raw output:

* output error: sum of |g (f - f_b)|^2 / |h|^2 over the expert's tokens when it alone has b bits, or of
  |y - y_without|^2 / |h|^2 when it is dropped, h the residual stream that leaves the layer.
* PMQ (arXiv 2410.06270, eq. 4): phi^alpha w^beta eps^gamma, where phi = n / N and w = sum of g / N are normalised over
  the layer's experts, and eps is the square root of the output error without that division.
* fisher: as the output error, every channel weighted by the mean squared gradient of the loss by the relative change.

An expert with fewer than `FEW_TOKENS` tokens has no cost worth the name: it takes the prior, the error per token of the
whole layer times its tokens plus one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_compress.calibrate.scores import LayerScores, Scores
from moe_compress.compress.allocate import (
    Allocation,
    Budget,
    Item,
    Option,
    Rules,
    by_frequency,
    random_allocation,
    solve,
    uniform_by_layer,
)
from moe_compress.compress.prune.plan import super_experts
from moe_compress.compress.quantize.config import BITSANDBYTES, COSTS, QuantizeConfig, idle
from moe_compress.errors import DataError, UsageError

FORMAT = 1
FEW_TOKENS = 16
KEEP, DROP, WHOLE = "keep", "drop", "expert"
SUPER_EXPERT_BITS = 8
SHAPE_BYTES = 16  # compressed-tensors notes the shape of every matrix, two int64
BITSANDBYTES_BLOCK = 64  # weights that share a float32 maximum
REST = "all but the routed experts"
Array = NDArray[np.float64]


@dataclass(frozen=True)
class ExpertShapes:
    """Sizes of the routed experts of one MoE layer, as they are stored."""

    layer: int
    num_experts: int
    top_k: int
    projections: Mapping[str, tuple[int, int]]  # name -> rows, columns
    weight_bytes: int  # of one weight, and of one scale
    other_bytes: int  # what an expert has besides: biases, its rows of the router
    bias_bytes: int = 0  # of these, those of biases

    @property
    def weights(self) -> int:
        """Weights of one expert."""
        return sum(rows * columns for rows, columns in self.projections.values())

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of the gate (if any), up and down projections, told apart however they are stored."""
        height, width = self.projections["down_proj"]
        rows = sum(rows for name, (rows, _) in self.projections.items() if name != "down_proj")
        names = ["gate_proj", "up_proj"] if rows == 2 * width else ["up_proj"]
        return dict.fromkeys(names, (width, height)) | {"down_proj": (height, width)}


@dataclass(frozen=True)
class QuantizedLayer:
    """One MoE layer: the experts that stay (ascending), and each one's option by projection."""

    layer: int
    num_experts: int
    keep: tuple[int, ...]
    options: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class QuantizePlan:
    """What a quantize step does to every MoE layer; `allocation` says how a budget was met."""

    config: QuantizeConfig
    layers: tuple[QuantizedLayer, ...]
    average_bits: float
    expert_bytes: int
    allocation: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-able values; `summary` is for the reader."""
        return {
            "format": FORMAT,
            "op": "quantize",
            "summary": self._summary(),
            "config": effective(self.config),
            "average_bits": self.average_bits,
            "expert_bytes": self.expert_bytes,
            "allocation": self.allocation,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def _summary(self) -> list[str]:
        config, found = self.config, self.allocation
        names = Counter(name for layer in self.layers for options in layer.options.values() for name in options)
        shares = ", ".join(f"{count / names.total():.1%} at {name}" for name, count in sorted(names.items()))
        lines = [
            f"{config.method}, {_grouping(config)}: {self.average_bits:.3f} bits per routed expert weight, "
            f"scales not counted; matrices: {shares}."
        ]
        if self.num_dropped:
            lines.append(f"{self.num_dropped} experts dropped.")
        if found is not None:
            proof = "proven optimal" if found["optimal"] else f"gap {found['gap']:.2%}"
            lines.append(
                f"Chosen by {found['solver']} ({proof}): predicted loss {found['loss']:.6g}, bound of the relaxation "
                f"{found['relaxation_bound']:.6g}."
            )
        return lines

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> QuantizePlan:
        """What `to_json` gave."""
        layers = tuple(
            QuantizedLayer(
                layer["layer"],
                layer["num_experts"],
                tuple(layer["keep"]),
                {part: tuple(names) for part, names in layer["options"].items()},
            )
            for layer in content["layers"]
        )
        config = QuantizeConfig.model_validate(content["config"])
        return cls(config, layers, content["average_bits"], content["expert_bytes"], content["allocation"])

    @property
    def num_dropped(self) -> int:
        """Experts of all layers that are dropped."""
        return sum(layer.num_experts - len(layer.keep) for layer in self.layers)


def plan_quantize(
    config: QuantizeConfig,
    shapes: Sequence[ExpertShapes],
    scores: Scores | None,
    *,
    fixed_bytes: int,
    num_decoder_layers: int,
    num_groups: int = 1,
    tier: str = "plugin",
) -> QuantizePlan:
    """Choose every expert's bits.

    `fixed_bytes` is what the checkpoint holds besides routed experts; `num_groups` the router's expert groups. Raises
    `UsageError` for a budget that cannot be met, `DataError` for costs that are not finite.
    """
    if not config.has_budget:
        name = config.method if config.method in BITSANDBYTES else str(config.bits)
        everywhere = {s.layer: {part: [name] * s.num_experts for part in s.projections} for s in shapes}
        return _plan(config, shapes, everywhere, None)
    assert scores is not None, "a budget needs measured costs"
    _require_same_measurement(config, scores)
    if config.allow_drop:
        require_equal_groups(num_groups)
    protected = super_experts(scores, num_decoder_layers) if config.protect_super_experts else set()
    items = _items(config, shapes, scores, protected, tier)
    if config.stored_bytes is not None:
        items.append(Item(REST, None, 1, (Option(KEEP, config.average_bits or 0.0, fixed_bytes, 0.0, 0.0),)))
    rules = Rules(
        pins=_pins(items, protected, tier),
        pinned_by="protect_super_experts",
        minimum_counts={str(bits): count for bits, count in config.minimum_counts.items()},
        max_drops_per_layer={layer.layer: layer.num_experts - layer.top_k for layer in shapes},
        equal_drops=tier == "stock",
        same_option=tier == "stock",
    )
    budget = Budget(config.average_bits, config.stored_bytes, config.active_bytes)
    found = _allocate(config, items, budget, rules, scores)
    chosen = dict(zip((item.name for item in items), found.chosen, strict=True))
    return _plan(config, shapes, _by_expert(shapes, chosen), found)


def effective(config: QuantizeConfig) -> dict[str, Any]:
    """The settings that have an effect, as JSON-able values."""
    dumped: dict[str, Any] = config.model_dump(mode="json")
    without = {key for key, _ in idle({key: value for key, value in dumped.items() if value is not None})}
    return {key: value for key, value in dumped.items() if key not in without}


def _grouping(config: QuantizeConfig) -> str:
    """Which weights share a scale."""
    if config.method in ("nf4", "fp4"):
        return f"blocks of {BITSANDBYTES_BLOCK} weights"
    if config.method == "int8" or config.group_size == "channel":
        return "a scale per row"
    return f"groups of {config.group_size} weights"


def require_equal_groups(num_groups: int) -> None:
    """Raise `UsageError` for a router whose experts are in groups, from which single ones cannot be dropped."""
    if num_groups > 1:
        raise UsageError(
            f"allow_drop: the router limits its choice to {num_groups} groups, which must stay equal; prune first."
        )


def measured_settings(config: QuantizeConfig) -> dict[str, Any]:
    """The settings that decide what an option costs; scores measured with others do not serve."""
    names = ("method", "group_size", "symmetric", "scale_search", "act_order", "damping", "measured_by")
    return {name: getattr(config, name) for name in names}


def _require_same_measurement(config: QuantizeConfig, scores: Scores) -> None:
    """Raise `UsageError` when the costs in the scores are those of another way to quantize."""
    measured = scores.fingerprint.get("quantize")
    if measured is None:
        raise UsageError("the scores hold no costs of quantization; score again with this recipe.")
    for name, value in measured_settings(config).items():
        if measured.get(name) != value:
            raise UsageError(
                f"the costs were measured with {name}: {measured.get(name)}, the recipe says {value}; score again."
            )


def option_bits(option: str) -> float:
    """Bits per weight, without scales; 16 for an expert that stays, 0 for one that is dropped."""
    named = {KEEP: 16.0, DROP: 0.0, "nf4": 4.0, "fp4": 4.0, "int8": 8.0}
    return named[option] if option in named else float(option)


def matrix_bytes(option: str, rows: int, columns: int, config: QuantizeConfig, weight_bytes: int) -> int:
    """Stored bytes of one matrix, scales and zero points included."""
    if option == DROP:
        return 0
    if option == KEEP:
        return rows * columns * weight_bytes
    if option == "int8":
        return rows * columns + 4 * rows
    if option in BITSANDBYTES:
        return ceil(rows * columns / 2) + 4 * ceil(rows * columns / BITSANDBYTES_BLOCK)
    bits = int(option)
    groups = 1 if config.group_size == "channel" else columns // int(config.group_size)
    symmetric = config.symmetric or bits == 1
    zeros = 0 if symmetric else 4 * ceil(rows * bits / 32) * groups
    return 4 * rows * ceil(columns * bits / 32) + weight_bytes * rows * groups + zeros


def expert_costs(config: QuantizeConfig, scores: LayerScores, part: str, option: str) -> tuple[Array, list[int]]:
    """Predicted loss [E] of one option for a part (a projection, or `WHOLE`), and the experts that took the prior."""
    statistics = scores.statistics
    pmq = COSTS.get(config.cost) if isinstance(config.cost, str) else config.cost
    kind = "error" if pmq is not None else "relative_fisher" if config.cost == "fisher" else "relative_error"
    if option == KEEP:
        return np.zeros(scores.num_experts), []
    try:
        error = statistics[f"{kind}.{part}.{option}"]
    except KeyError:
        raise UsageError(
            f"the scores hold no {kind.replace('_', ' ')} for {option} bits of {part}; score again with this recipe."
        ) from None
    if not np.isfinite(error).all():
        expert = int(np.flatnonzero(~np.isfinite(error))[0])
        raise DataError(f"the cost of layer {scores.layer}, expert {expert} is not finite; its weights are damaged.")
    tokens = statistics["tokens"]
    few = np.flatnonzero(tokens < FEW_TOKENS)
    if few.size:
        error = error.copy()
        error[few] = error.sum() / max(1.0, tokens.sum()) * (tokens[few] + 1)
    if pmq is not None:
        frequency, weight = (_shares(statistics[name]) for name in ("tokens", "gate_sum"))
        return frequency**pmq.alpha * weight**pmq.beta * np.sqrt(error) ** pmq.gamma, few.tolist()
    return error, few.tolist()


def _shares(values: Array) -> Array:
    shares: Array = values / max(values.sum(), np.finfo(np.float64).tiny)
    return shares


def _items(
    config: QuantizeConfig, shapes: Sequence[ExpertShapes], scores: Scores, protected: set[tuple[int, int]], tier: str
) -> list[Item]:
    """What the program chooses for, each with all its options.

    With `granularity: layer` the experts of a layer are one item, but for those that are protected.
    """
    noted = SHAPE_BYTES if tier == "stock" else 0  # comes with each matrix
    items = []
    for shape, measured in zip(shapes, scores.layers, strict=True):
        assert shape.layer == measured.layer
        used = measured.statistics["tokens"] / max(1, measured.num_tokens)
        own = {expert for layer, expert in protected if layer == shape.layer}
        parts = list(shape.projections) if config.granularity == "projection" else [WHOLE]
        for part in parts:
            matrices = list(shape.projections.values()) if part == WHOLE else [shape.projections[part]]
            names = [str(bits) for bits in dict.fromkeys(config.options)]
            names += [KEEP] if config.keep_option else []
            wider = dict.fromkeys([*names, *protected_options(tier)]) if own else names
            costs = {name: expert_costs(config, measured, part, name)[0] for name in wider}
            if config.allow_drop:  # of an expert's projections, the first answers for the drop of them all
                drop = expert_costs(config, measured, WHOLE, DROP)[0]
                costs[DROP] = drop if part == parts[0] else np.zeros(shape.num_experts)
            options = []
            for expert in range(shape.num_experts):
                offered = [*(wider if expert in own else names), *([DROP] if config.allow_drop else [])]
                other = noted * len(matrices) + (shape.other_bytes if part == parts[0] else 0)
                options.append([
                    _option(name, matrices, costs[name][expert], used[expert], shape.weight_bytes, other, config)
                    for name in offered
                ])  # fmt: skip
            weights = sum(rows * columns for rows, columns in matrices)
            together = [expert for expert in range(shape.num_experts) if expert not in own]
            if config.granularity == "layer" and together:
                items.append(_layer_item(shape.layer, [options[expert] for expert in together], weights))
            for expert in sorted(own) if config.granularity == "layer" else range(shape.num_experts):
                items.append(
                    Item(_name(shape.layer, expert, part), shape.layer, weights, tuple(options[expert]), expert)
                )
    return items


def protected_options(tier: str) -> tuple[str, ...]:
    """What super experts take; nothing of their own in the tier `stock`, whose one scheme holds for all experts."""
    return () if tier == "stock" else (str(SUPER_EXPERT_BITS),)


def _pins(items: Sequence[Item], protected: set[tuple[int, int]], tier: str) -> dict[str, tuple[str, ...]]:
    """The options that super experts may take, by the names of their items, where that is not all."""
    found = {}
    for item in items:
        names = tuple(option.name for option in item.options)
        allowed = protected_options(tier) or tuple(name for name in names if name != DROP)
        if (item.layer, item.expert) in protected and allowed != names:
            found[item.name] = allowed
    return found


def _option(
    name: str,
    matrices: Sequence[tuple[int, int]],
    loss: float,
    used: float,
    weight_bytes: int,
    other_bytes: int,
    config: QuantizeConfig,
) -> Option:
    stored = sum(matrix_bytes(name, rows, columns, config, weight_bytes) for rows, columns in matrices)
    other = 0 if name == DROP else other_bytes
    return Option(name, option_bits(name), stored + other, stored * float(used), float(loss))


def _layer_item(layer: int, options: Sequence[Sequence[Option]], weights: int) -> Item:
    """Experts of a layer, each of so many weights, as one item."""
    summed = [
        Option(
            column[0].name,
            column[0].bits,
            sum(option.stored_bytes for option in column),
            sum(option.active_bytes for option in column),
            sum(option.loss for option in column),
        )
        for column in zip(*options, strict=True)
    ]
    return Item(_name(layer, None, WHOLE), layer, weights * len(options), tuple(summed))


def _name(layer: int, expert: int | None, part: str) -> str:
    name = f"layer {layer}" if expert is None else f"layer {layer} expert {expert}"
    return name if part == WHOLE else f"{name} {part}"


def _allocate(
    config: QuantizeConfig, items: Sequence[Item], budget: Budget, rules: Rules, scores: Scores
) -> Allocation:
    if config.allocation == "optimal":
        return solve(items, budget, rules)
    if config.allocation == "random":
        return random_allocation(items, budget, rules, config.seed)
    if config.allocation == "layer":
        return uniform_by_layer(items, budget, rules)
    tokens = {(layer.layer, e): float(n) for layer in scores.layers for e, n in enumerate(layer.statistics["tokens"])}
    usage = [tokens.get((item.layer or 0, item.expert or 0), 0.0) for item in items]
    return by_frequency(items, usage, budget, rules)


def _by_expert(shapes: Sequence[ExpertShapes], chosen: Mapping[str, str]) -> dict[int, dict[str, list[str]]]:
    """Layer -> projection -> option of every expert, from those of the items, each the smallest that holds it."""

    def option(layer: int, expert: int, part: str) -> str:
        names = (_name(layer, expert, part), _name(layer, expert, WHOLE), _name(layer, None, WHOLE))
        return next(chosen[name] for name in names if name in chosen)

    return {
        shape.layer: {
            part: [option(shape.layer, expert, part) for expert in range(shape.num_experts)]
            for part in shape.projections
        }
        for shape in shapes
    }


def _plan(
    config: QuantizeConfig,
    shapes: Sequence[ExpertShapes],
    tables: Mapping[int, Mapping[str, Sequence[str]]],
    found: Allocation | None,
) -> QuantizePlan:
    layers = []
    bits = weights = stored = 0.0
    for shape in shapes:
        table = tables[shape.layer]
        first = next(iter(table.values()))
        keep = tuple(expert for expert in range(shape.num_experts) if first[expert] != DROP)
        options = {part: tuple(names[expert] for expert in keep) for part, names in table.items()}
        layers.append(QuantizedLayer(shape.layer, shape.num_experts, keep, options))
        weights += shape.weights * shape.num_experts
        stored += shape.other_bytes * len(keep)
        for part, names in options.items():
            rows, columns = shape.projections[part]
            bits += sum(option_bits(name) for name in names) * rows * columns
            stored += sum(matrix_bytes(name, rows, columns, config, shape.weight_bytes) for name in names)
    return QuantizePlan(
        config, tuple(layers), bits / weights, int(stored), None if found is None else _described(found)
    )


def _described(found: Allocation) -> dict[str, Any]:
    described = asdict(found)
    described.pop("chosen")
    described.pop("seconds")
    return described
