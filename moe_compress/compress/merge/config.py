"""The settings of `op: merge`. What needs the number of experts is checked in `plan.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from moe_compress.compress.prune.config import SUPER_EXPERTS, check_keep

Criterion = Literal["frequency", "seer", "ean", "reap", "man", "msan", "easy_ep", "mone"]


class KeepDifferences(BaseModel):
    """Members of a group become the stored expert plus low-rank matrices of their own (arXiv 2608.07814)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int | None = Field(default=None, ge=1, description="Mean rank of a member's three (two) matrices.")
    expert_bytes: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Instead of `rank`: the share of the routed experts' bytes that is left, ranks as they fit.",
    )

    @model_validator(mode="after")
    def _one_size(self) -> KeepDifferences:
        if (self.rank is None) == (self.expert_bytes is None):
            raise ValueError("give either `rank` or `expert_bytes`")
        return self


class MergeConfig(BaseModel):
    """Replace groups of experts of a layer by one each.

    Groupings: average-linkage clustering of mean outputs (`hc`, HC-SMoE, arXiv 2410.08589), similarity of router logits
    to the most used experts (`router`, M-SMoE, arXiv 2310.01334), the nearest experts of salient centroids in outputs
    and router logits (`ream`, REAM, arXiv 2604.04356). Super experts (arXiv 2507.23279) stay by themselves.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    op: Literal["merge"] = Field(description="Put routed experts together.")
    grouping: Literal["hc", "router", "ream"] = Field(description="How groups are found.")
    keep: Annotated[int | float, BeforeValidator(check_keep)] = Field(
        description="Groups per layer: a fraction in (0, 1] of the experts, or a whole number."
    )
    multiple_of: int = Field(default=1, ge=1, description="Round the number of groups to the nearest multiple of this.")
    align: Literal["weights", "activations", False] = Field(
        default="weights",
        description="Match the members' neurons to those of the group's dominant expert first, by their weights or by "
        "what they do on the calibration tokens; false averages them as they come.",
    )
    weighting: Literal["frequency", "saliency", "uniform"] = Field(
        default="frequency", description="How much a member counts in its group's average."
    )
    criterion: Criterion = Field(
        default="reap",
        description="The saliency that picks centroids (`ream`), the dominant expert of a group (`hc`), and weighs "
        "members (`weighting: saliency`).",
    )
    max_group_size: int = Field(default=16, ge=2, description="`ream`: the largest group.")
    router: Literal["reduce", "keep"] | None = Field(
        default=None,
        description="reduce (the default): each group has the router row of its dominant expert. keep: the router "
        "stays and members share an expert; needs `export.tier: plugin`.",
    )
    keep_differences: KeepDifferences | None = Field(
        default=None,
        description="Do not average: members keep low-rank matrices of their own, and the router its rows; needs "
        "`export.tier: plugin`.",
    )
    protect_super_experts: bool = Field(default=True, description="Never merge experts with extreme activations.")

    @property
    def keeps_router(self) -> bool:
        """Whether every expert keeps its router row."""
        return self.router == "keep" or self.keep_differences is not None


# Rules between settings, judged in the step as it is written (see `recipe.OperationSettings`).

LAST: str | None = None
RELATION: str | None = None  # the Hub's word `merge` is for models put together
GROUPINGS = {"hc": "2410.08589", "router": "2310.01334", "ream": "2604.04356"}
DIFFERENCES = "2608.07814"


def chance(step: Mapping[str, Any]) -> str | None:
    return None


def needs_tokens(step: Mapping[str, Any]) -> bool:
    return True


def idle(step: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if step.get("grouping") in {"hc", "router"} and "max_group_size" in step:
        yield "max_group_size", "only the grouping `ream` limits the size of groups"
    if step.get("keep_differences") is not None:
        if "weighting" in step:
            yield "weighting", "`keep_differences` averages nothing"
        if step.get("router") == "keep":
            yield "router", "`keep_differences` keeps the router by itself"
    uses_saliency = step.get("grouping") != "router" and step.get("keep_differences") is None
    if "criterion" in step and not (
        uses_saliency or step.get("grouping") == "ream" or step.get("weighting") == "saliency"
    ):
        yield "criterion", "nothing here goes by saliency"


def leaves_banks(step: Mapping[str, Any]) -> bool:
    return step.get("router") == "keep" or step.get("keep_differences") is not None


def beyond_stock(step: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    key = "keep_differences" if step.get("keep_differences") is not None else "router"
    if leaves_banks(step):
        yield key, "plain transformers cannot let a router choose among more experts than there are"


def tags(step: Mapping[str, Any], tier: str) -> list[str]:
    return ["merged"]


def papers(step: Mapping[str, Any]) -> list[str]:
    found = [GROUPINGS[step["grouping"]]] + ([DIFFERENCES] if step["keep_differences"] is not None else [])
    return found + ([SUPER_EXPERTS] if step["protect_super_experts"] else [])
