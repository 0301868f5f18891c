"""How the routing of single layers departs from their family's: what the section `moe_compress` of config.json says.

    "layers": {"3": {"zero_experts": 32}, "4": {"top_k": 4, "normalise_over": 8}, "5": {"skip": {"threshold": 0.4}}}

* `zero_experts`: the router has so many rows more; a token that takes one of them uses an expert less. They are stored
  behind the routed experts' rows, in each of the router's groups (`router_rows`).
* `top_k`: routed experts that run, the ones with the largest gate values among those that the router picks. The router
  picks `normalise_over`, and divides by their sum if it divides at all.
* `skip`: an expert whose gate value is below `threshold` times the token's largest does not run. With `renormalise` the
  others' gate values are scaled up to the sum of all. `protect` is the share of a prompt's tokens that keep all.
* `experts_per_token`: how many routed experts a token used on average, where that was measured.

Gate values are never divided by the sum of the experts that are left, unless `renormalise` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SECTION = "moe_compress"  # in the config.json of a compressed family: how the layers depart from it
EXPERTS_PER_TOKEN = "experts_per_token"  # in a layer's entry: measured
USE_ZERO_EXPERTS = "use_zero_experts"  # in that section: false gives the original model back


@dataclass(frozen=True)
class Skip:
    """Experts that a token leaves out by the ratio of their gate value to its largest."""

    threshold: float
    renormalise: bool = False
    protect: float = 0.0


@dataclass(frozen=True)
class Routing:
    """One layer's departures; the defaults are the family's own routing."""

    zero_experts: int = 0
    top_k: int | None = None
    normalise_over: int | None = None
    skip: Skip | None = None
    experts_per_token: float | None = None

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Routing:
        """Of a layer's entry in the section."""
        skip = entry.get("skip")
        return cls(
            zero_experts=entry.get("zero_experts", 0),
            top_k=entry.get("top_k"),
            normalise_over=entry.get("normalise_over", entry.get("top_k")),
            skip=None if skip is None else Skip(**skip),
            experts_per_token=entry.get(EXPERTS_PER_TOKEN),
        )

    @property
    def departs(self) -> bool:
        """Whether the layer routes otherwise than its family."""
        return bool(self.zero_experts or self.top_k or self.skip)

    @property
    def is_uncertain(self) -> bool:
        """Whether tokens differ in how many experts they use, and it was not measured how many that are."""
        return self.experts_per_token is None and (self.zero_experts > 0 or self.skip is not None)

    def expected(self, num_experts: int, top_k: int) -> float:
        """Routed experts that a token uses on average: as measured, else by the numbers alone.

        `top_k` is the family's. Unmeasured zero experts count as if all rows of the router were chosen alike.
        """
        if self.experts_per_token is not None:
            return self.experts_per_token
        slots = self.top_k or top_k
        return slots * num_experts / (num_experts + self.zero_experts)


FAMILY_ROUTING = Routing()


def layer_routings(config: Any) -> dict[int, Routing]:
    """The decoder layers whose entry in the section says something about routing."""
    layers = (getattr(config, SECTION, None) or {}).get("layers", {})
    found = {int(layer): Routing.from_json(entry) for layer, entry in layers.items()}
    return {layer: routing for layer, routing in found.items() if routing != FAMILY_ROUTING}


def router_rows(num_experts: int, zero_experts: int, num_groups: int) -> tuple[list[int], list[int]]:
    """The router's rows of the routed experts, in their order, and those of the zero experts.

    A router of several groups divides its rows into runs of equal length, so every group ends with its own zero
    experts. Both counts are multiples of `num_groups`.
    """
    assert num_experts % num_groups == zero_experts % num_groups == 0, "groups are equal"
    own, zeros = num_experts // num_groups, zero_experts // num_groups
    length = own + zeros
    experts = [group * length + position for group in range(num_groups) for position in range(own)]
    others = [group * length + own + position for group in range(num_groups) for position in range(zeros)]
    return experts, others
