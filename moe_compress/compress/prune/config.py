"""The settings of `op: prune`.

What needs no model is checked here; what needs the number of experts is checked in `plan.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
)

CriterionName = Literal["random", "frequency", "seer", "ean", "reap", "man", "msan", "easy_ep", "mone", "ablation"]


# (alpha, beta) whose sum of g^alpha * |f|^beta over routed tokens is accumulated, and the statistic that holds it.
ACCUMULATED_SUMS: dict[tuple[int, int], str] = {
    (0, 0): "tokens",
    (1, 0): "gate_sum",
    (0, 1): "norm_sum",
    (1, 1): "gate_norm_sum",
    (0, 2): "norm_sq_sum",
    (2, 2): "gate_sq_norm_sq_sum",
}


class CustomCriterion(BaseModel):
    """A member of the family S = n^(-b) * sum of g^alpha * |f|^beta over the routed tokens (arXiv 2606.15716)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    b: float = Field(ge=0, allow_inf_nan=False, description="Exponent of the token count: 0 is a sum, 1 a mean.")
    alpha: int = Field(ge=0, description="Exponent of the gate value that multiplies the expert's output.")
    beta: int = Field(ge=0, description="Exponent of the L2 norm of the expert's raw output.")

    @field_validator("beta")
    @classmethod
    def _accumulated(cls, beta: int, info: ValidationInfo) -> int:
        alpha = info.data.get("alpha")
        if alpha is not None and (alpha, beta) not in ACCUMULATED_SUMS:
            pairs = ", ".join(str(pair) for pair in ACCUMULATED_SUMS)
            raise ValueError(f"(alpha, beta) = ({alpha}, {beta}) is not accumulated; choose one of {pairs}")
        return beta


def _criterion_form(value: Any) -> str:
    return "custom" if isinstance(value, (dict, CustomCriterion)) else "name"


def check_keep(value: Any) -> Any:
    """One sentence for every wrong `keep`, where a plain union would complain once per alternative."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    is_fraction = isinstance(value, float) and 0 < value <= 1
    if not is_count and not is_fraction:
        raise ValueError(
            f"should be a fraction in (0, 1] such as 0.75, or a whole number of experts such as 48, got `{value}`"
        )
    return value


class PruneConfig(BaseModel):
    """Drop whole routed experts and their router rows, the lowest scores first.

    Criteria: the (b, alpha, beta) family with frequency, SEER, EAN, MAN and MSAN (arXiv 2606.15716), REAP
    (arXiv 2510.13999), EASY-EP (arXiv 2504.06792), the variance score of MoNE (arXiv 2507.00390), `ablation`, the
    measured loss without the expert, and `random`, the baseline. Super experts (arXiv 2507.23279) are kept whatever
    they score. Dropped experts may leave their mean output behind (`replace: constant`, the novices of MoNE).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    op: Literal["prune"] = Field(description="Drop routed experts.")
    criterion: Annotated[
        Annotated[CriterionName, Tag("name")] | Annotated[CustomCriterion, Tag("custom")],
        Discriminator(_criterion_form),
    ] = Field(description="How experts are scored: a name, or {b, alpha, beta} of the unified family.")
    keep: Annotated[int | float, BeforeValidator(check_keep)] = Field(
        description="Experts to keep: a fraction in (0, 1] of all, or a whole number of experts per layer "
        "(with `scope: global`, per layer on average). 1.0 keeps all, 1 keeps one."
    )
    multiple_of: int = Field(
        default=1,
        ge=1,
        description="Round the count of kept experts to the nearest multiple of this (half rounds up).",
    )
    protect_super_experts: bool = Field(
        default=True,
        description="Never drop experts with extreme activations; a few of them carry the model's attention sinks.",
    )
    scope: Literal["layer", "global"] = Field(
        default="layer",
        description="layer: the same count in every layer. global: one ranking over all layers, counts differ.",
    )
    replace: Literal["constant"] | None = Field(
        default=None,
        description="constant: a dropped expert keeps its row of the router and becomes its mean output; needs "
        "`export.tier: plugin`.",
    )
    ablation_samples: int = Field(
        default=32,
        ge=1,
        description="criterion ablation: calibration sequences that the loss without each expert is measured on.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of `criterion: random`.")

    @field_validator("multiple_of")
    @classmethod
    def _count_is_multiple(cls, multiple_of: int, info: ValidationInfo) -> int:
        keep = info.data.get("keep")
        if isinstance(keep, int) and keep % multiple_of:
            below, above = keep // multiple_of * multiple_of, (keep // multiple_of + 1) * multiple_of
            nearest = f"{below} or {above}" if below else str(above)
            raise ValueError(f"keep: {keep} is not a multiple of {multiple_of}; ask for keep: {nearest}")
        return multiple_of


# Rules between settings, judged in the step as it is written (see `recipe.OperationSettings`).

LAST: str | None = None
RELATION: str | None = None  # the Hub has no word for pruned
FAMILY = "2606.15716"
SUPER_EXPERTS = "2507.23279"
CRITERIA = {"reap": "2510.13999", "easy_ep": "2504.06792", "mone": "2507.00390"} | dict.fromkeys(
    ("seer", "man", "msan"), FAMILY
)


def leaves_banks(step: Mapping[str, Any]) -> bool:
    return step.get("replace") is not None


def chance(step: Mapping[str, Any]) -> str | None:
    return "pruning"


def needs_tokens(step: Mapping[str, Any]) -> bool:
    return True


def idle(step: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "seed" in step and step.get("criterion", "random") != "random":
        yield "seed", "only the criterion `random` draws numbers"
    if "ablation_samples" in step and step.get("criterion", "ablation") != "ablation":
        yield "ablation_samples", "only the criterion `ablation` takes experts out"


def beyond_stock(step: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if step.get("replace") is not None:
        yield "replace", "plain transformers knows no expert that is a constant"
    if step.get("scope") == "global":
        yield (
            "scope",
            "the tier `stock` cannot hold a different number of experts in each layer, as `scope: global` leaves it",
        )


def tags(step: Mapping[str, Any], tier: str) -> list[str]:
    criterion = step["criterion"]
    return ["pruned", *([criterion] if isinstance(criterion, str) and criterion != "random" else [])]


def papers(step: Mapping[str, Any]) -> list[str]:
    criterion = step["criterion"]
    found = [CRITERIA[criterion]] if isinstance(criterion, str) and criterion in CRITERIA else []
    found += [] if isinstance(criterion, str) else [FAMILY]
    return found + ([SUPER_EXPERTS] if step["protect_super_experts"] else [])
