"""The settings of `op: topk`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

K1_K2, ALLOC_MOE = "2609.04575", "2604.08133"  # arXiv


def _check_k(value: Any) -> Any:
    """One sentence for every wrong `k`, where a plain union would complain once per alternative."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    is_fraction = isinstance(value, float) and 0 < value <= 1
    if not is_count and not is_fraction:
        raise ValueError(
            f"should be a fraction in (0, 1] of the model's own top-k such as 0.5, or a whole number of experts such "
            f"as 4, got `{value}`"
        )
    return value


def _check_normalise_over(value: Any) -> Any:
    if value not in ("picked", "kept") and not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        raise ValueError(f"should be `picked`, `kept` or a whole number of experts such as 16, got `{value}`")
    return value


class TopkConfig(BaseModel):
    """Use fewer experts per token, without training.

    With `normalise_over` a number k2, this is the k1/k2 normalisation of arXiv 2609.04575: run the k with the largest
    gate values of the best k2, and divide by the sum of all k2. `allocation: per_layer` is that of arXiv 2604.08133.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    op: Literal["topk"] = Field(description="Use fewer experts per token.")
    k: Annotated[int | float, BeforeValidator(_check_k)] = Field(
        description="Experts per token: a fraction in (0, 1] of the model's own top-k, or a whole number "
        "(with `allocation: per_layer`, on average over the layers). 1.0 keeps all, 1 keeps one."
    )
    normalise_over: Annotated[int | Literal["picked", "kept"], BeforeValidator(_check_normalise_over)] = Field(
        default="picked",
        description="Whose gate values the kept ones are shares of. picked: as many experts as the model itself picks, "
        "so that kept gate values stay as they are. kept: those that run. A number: the best so many.",
    )
    allocation: Literal["uniform", "per_layer"] = Field(
        default="uniform",
        description="uniform: the same number in every layer. per_layer: an exact dynamic program spends the same sum "
        "where it is measured to matter most.",
    )
    samples: int = Field(
        default=8,
        ge=1,
        description="Calibration sequences that `allocation: per_layer` measures on; each passes the model once for "
        "every layer and number of experts.",
    )


# Rules between settings, judged in the step as it is written (see `recipe.OperationSettings`).

LAST: str | None = None
RELATION: str | None = None  # the Hub has no word for it


def leaves_banks(step: Mapping[str, Any]) -> bool:
    return False


def chance(step: Mapping[str, Any]) -> str | None:
    return None


def needs_tokens(step: Mapping[str, Any]) -> bool:
    return step.get("allocation") == "per_layer"


def idle(step: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "samples" in step and not needs_tokens(step):
        yield "samples", "only `allocation: per_layer` measures"


def beyond_stock(step: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if step.get("allocation") == "per_layer":
        yield "allocation", "the tier `stock` holds one top-k for all layers"
    if step.get("normalise_over", "picked") != "kept":
        yield "normalise_over", "plain transformers normalises over the experts that run, which is `kept`"


def tags(step: Mapping[str, Any], tier: str) -> list[str]:
    return ["expert-skipping"]


def papers(step: Mapping[str, Any]) -> list[str]:
    found = [] if step["normalise_over"] == "kept" else [K1_K2]
    return found + ([ALLOC_MOE] if step["allocation"] == "per_layer" else [])
