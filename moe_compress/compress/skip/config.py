"""The settings of `op: skip`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

NAEE, ODP = "2402.14800", "2410.06270"  # arXiv


def _check_threshold(value: Any) -> Any:
    is_ratio = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1
    if value != "median" and not is_ratio:
        raise ValueError(f"should be `median` or a ratio between 0 and 1 such as 0.4, got `{value}`")
    return value


class SkipConfig(BaseModel):
    """Leave out an expert whose gate value is small beside the token's largest, without training.

    The rule of NAEE (arXiv 2402.14800), for any top-k: expert j is skipped where g_j < threshold x max g. Thresholds
    are calibrated for each layer. `protect` is that of ODP (arXiv 2410.06270).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    op: Literal["skip"] = Field(description="Skip experts by the ratio of their gate value to the largest.")
    target_skip: float | None = Field(
        default=None, gt=0, lt=1, description="Share of all slots to skip; give this or `threshold`."
    )
    threshold: Annotated[float | Literal["median"], BeforeValidator(_check_threshold)] | None = Field(
        default=None,
        description="A ratio for all layers, or median: each layer's median of the second gate value over the first, "
        "as published for top-2 models.",
    )
    scope: Literal["layer", "global"] = Field(
        default="layer",
        description="Of `target_skip`. layer: every layer skips that share. global: one threshold for all layers, "
        "which then skip different shares.",
    )
    renormalise: bool = Field(
        default=False,
        description="Scale the other gate values up to the sum of all, as published; without, they stay as they are.",
    )
    protect: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of a prompt's tokens that skip nothing, those with the most attention from later tokens "
        "(0.02 as published). Attention is then computed by its plain formula, and a token's output depends on later "
        "ones. Tokens that are generated one by one are never protected.",
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> SkipConfig:
        if (self.target_skip is None) == (self.threshold is None):
            raise ValueError("give either `target_skip` or `threshold`")
        return self


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
    if "scope" in step and step.get("target_skip") is None:
        yield "scope", "only `target_skip` is shared by layers"


def beyond_stock(step: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "op", "plain transformers runs every expert that a router picks"


def tags(step: Mapping[str, Any], tier: str) -> list[str]:
    return ["expert-skipping"]


def papers(step: Mapping[str, Any]) -> list[str]:
    return [NAEE, *([ODP] if step["protect"] else [])]
