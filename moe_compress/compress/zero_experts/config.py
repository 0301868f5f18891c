"""The settings of `op: zero_experts`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

ZEDA, ADAMOE = "2605.18643", "2406.13233"  # arXiv


def _check_count(value: Any) -> Any:
    """One sentence for every wrong `count`, where a plain union would complain once per alternative."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    is_fraction = isinstance(value, float) and value > 0 and value != float("inf")
    if not is_count and not is_fraction:
        raise ValueError(
            f"should be a fraction of the routed experts such as 0.5, or a whole number of zero experts such as 32, "
            f"got `{value}`"
        )
    return value


class ZeroExpertsConfig(BaseModel):
    """Give the router experts that do nothing, so that tokens may use fewer (ZEDA, arXiv 2605.18643).

    Without training this is a control, not a method: about as many slots as there are zero experts among all are
    skipped, whatever the token. `init: tile` is that of AdaMoE (arXiv 2406.13233).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    op: Literal["zero_experts"] = Field(description="Add experts that cost nothing.")
    count: Annotated[int | float, BeforeValidator(_check_count)] = Field(
        default=0.5,
        description="Zero experts per layer: a fraction of its routed experts, or a whole number. 1 is one of them, "
        "1.0 as many as there are routed experts.",
    )
    init: Literal["normal", "tile"] = Field(
        default="normal",
        description="Their rows in the router. normal: drawn per coordinate from the mean and deviation of the routed "
        "experts' rows. tile: copies of these rows, in their order.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of `init: normal`.")


# Rules between settings, judged in the step as it is written (see `recipe.OperationSettings`).

LAST: str | None = None
RELATION: str | None = None  # the Hub has no word for it


def leaves_banks(step: Mapping[str, Any]) -> bool:
    return False


def chance(step: Mapping[str, Any]) -> str | None:
    return None


def needs_tokens(step: Mapping[str, Any]) -> bool:
    return True


def idle(step: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "seed" in step and step.get("init", "normal") != "normal":
        yield "seed", "only `init: normal` draws numbers"


def beyond_stock(step: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "op", "plain transformers knows no experts that do nothing"


def tags(step: Mapping[str, Any], tier: str) -> list[str]:
    return ["expert-skipping"]


def papers(step: Mapping[str, Any]) -> list[str]:
    return [ZEDA if step["init"] == "normal" else ADAMOE]
