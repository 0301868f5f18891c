"""The settings of `op: tie`. What needs the number of layers is checked in `plan.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moe_compress.settings import Size


class TieConfig(BaseModel):
    """Let groups of consecutive MoE layers use one bank of experts, each with its own router.

    Expert Tying (arXiv 2606.16825) trains such models; this makes one of a trained model: experts of the layers are
    matched, their neurons aligned, the bank fitted to all layers, and a low-rank difference kept for each expert.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    op: Literal["tie"] = Field(description="Share experts between layers.")
    group_size: int = Field(default=2, ge=2, description="Layers that share a bank.")
    prelude: int = Field(default=2, ge=0, description="MoE layers at the beginning that are left alone.")
    coda: int = Field(default=2, ge=0, description="MoE layers at the end that are left alone.")
    match: Literal["output", "weights", False] = Field(
        default="output",
        description="Which expert of a layer goes with which of the group's first: by the error of their outputs on "
        "calibration tokens, by their weights, or by their numbers (false).",
    )
    align: Literal["weights", "activations", False] = Field(
        default="weights", description="How the neurons of matched experts are matched; false takes them as they come."
    )
    fit: Literal["average", "closed_form", "gradient"] = Field(
        default="closed_form",
        description="average: by frequency. closed_form: its down projections then fitted to the outputs of all "
        "layers' experts by least squares. gradient: then all projections, by gradient descent on the same error.",
    )
    fit_steps: int = Field(default=200, ge=1, description="Steps of `fit: gradient`.")
    fit_tokens: int = Field(default=512, ge=1, description="Tokens of each expert of each layer that are fitted to.")
    residual_rank: int = Field(
        default=0, ge=0, description="Rank of what each layer keeps of each expert's matrices beside the bank."
    )
    choose: Literal["all", "auto"] = Field(
        default="all",
        description="all: every group is tied. auto: which ones, and with which rank of `rank_options`, is chosen by "
        "the error that each would make, for `stored_bytes`.",
    )
    stored_bytes: Size | None = Field(default=None, description="`choose: auto`: bytes of the whole checkpoint.")
    rank_options: list[Annotated[int, Field(ge=0)]] = Field(
        default=[0, 4, 8, 16, 32], min_length=1, description="`choose: auto`: ranks to choose from."
    )

    @model_validator(mode="after")
    def _a_choice_has_a_budget(self) -> TieConfig:
        if self.choose == "auto" and self.stored_bytes is None:
            raise ValueError("choose: auto needs `stored_bytes`, the size of the checkpoint to reach")
        return self


# Rules between settings, judged in the step as it is written (see `recipe.OperationSettings`).

LAST: str | None = None
RELATION: str | None = None  # the Hub has no word for tied
TYING = "2606.16825"


def chance(step: Mapping[str, Any]) -> str | None:
    return None


def needs_tokens(step: Mapping[str, Any]) -> bool:
    return True


def idle(step: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "fit_steps" in step and step.get("fit") != "gradient":
        yield "fit_steps", "only `fit: gradient` takes steps"
    if step.get("choose") == "auto":
        if "residual_rank" in step:
            yield "residual_rank", "`choose: auto` takes ranks of `rank_options`"
    else:
        for key in ("stored_bytes", "rank_options"):
            if step.get(key) is not None:
                yield key, "only `choose: auto` chooses"


def leaves_banks(step: Mapping[str, Any]) -> bool:
    return True


def beyond_stock(step: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    return iter(())


def tags(step: Mapping[str, Any], tier: str) -> list[str]:
    return ["tied"]


def papers(step: Mapping[str, Any]) -> list[str]:
    return [TYING]
