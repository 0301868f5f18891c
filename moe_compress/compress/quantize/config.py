"""The settings of `op: quantize`.

What needs no model is checked here; what needs the sizes of the experts is checked in `plan.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from moe_compress.settings import Size

BITSANDBYTES = ("nf4", "fp4", "int8")
BUDGETS = ("average_bits", "stored_bytes", "active_bytes")
OPTIONS = [1, 2, 3, 4]
TARGET = "give either `bits`, the same for all experts, or a budget such as `average_bits: 2.5`"

Bits = Annotated[int, Field(ge=1, le=8)]


def _check_group_size(value: Any) -> Any:
    """One sentence for every wrong group size."""
    if value not in ("auto", "channel") and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"should be a number of weights such as 128, or `channel` for one per row, got `{value}`")
    return value


def _check_options(value: Any) -> Any:
    if value == []:
        raise ValueError("should name at least one width, such as [2, 3, 4]")
    return value


GroupSize = Annotated[int | Literal["auto", "channel"], BeforeValidator(_check_group_size)]
# What `auto` takes: the first that divides every matrix it holds for, else one group per row.
GROUP_SIZES = (128, 64, 32, 16)


class Pmq(BaseModel):
    """Predicted loss frequency^alpha * weight^beta * error^gamma of PMQ (arXiv 2410.06270)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    alpha: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="Exponent of the routing frequency.")
    beta: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="Exponent of the mean routing weight.")
    gamma: float = Field(default=2.0, ge=0, allow_inf_nan=False, description="Exponent of the quantization error.")


# `pmq_as_released`: the authors' code has beta 1.5 and raises the error to alpha, so that gamma is never used.
COSTS = {"pmq": Pmq(), "pmq_as_released": Pmq(alpha=1.0, beta=1.5, gamma=1.0)}


class PartConfig(BaseModel):
    """How the linear layers of a part outside the routed experts are quantized."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: Bits | None = Field(
        default=None, description="Bits per weight; null: as the experts, where all have the same."
    )
    group_size: GroupSize | None = Field(default=None, description="Weights that share a scale; null: as the experts.")


class QuantizeConfig(BaseModel):
    """Quantize the routed experts, and other linear layers if asked.

    Either one width for all experts (`bits`, or a `method` of bitsandbytes), or a budget, for which the widths are
    chosen by an integer program over the measured costs. Without either, costs can be measured and budgets swept.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    op: Literal["quantize"] = Field(description="Store weights in few bits.")
    method: Literal["gptq", "rtn", "nf4", "fp4", "int8"] = Field(
        default="gptq",
        description="gptq: error compensation on the calibration tokens (arXiv 2210.17323). rtn: rounding to nearest. "
        "nf4, fp4, int8: the formats of bitsandbytes.",
    )
    bits: Bits | None = Field(default=None, description="Bits per weight of every routed expert.")
    average_bits: float | None = Field(
        default=None, gt=0, le=16, description="Budget: mean bits per routed expert weight, without scales."
    )
    stored_bytes: Size | None = Field(default=None, description="Budget: size of the whole checkpoint, as `12GB`.")
    active_bytes: Size | None = Field(
        default=None, description="Budget: bytes of routed experts read per token, on average."
    )
    options: Annotated[list[Bits], BeforeValidator(_check_options)] = Field(
        default=OPTIONS, description="The bits a budget chooses from."
    )
    keep_option: bool = Field(default=False, description="A budget may also leave an expert as it is.")
    allow_drop: bool = Field(default=False, description="A budget may also drop an expert.")
    granularity: Literal["expert", "projection", "layer"] = Field(
        default="expert", description="What gets bits of its own."
    )
    allocation: Literal["optimal", "frequency", "layer", "random"] = Field(
        default="optimal",
        description="optimal: the integer program. frequency, layer, random: rules to compare with.",
    )
    cost: Literal["output_error", "pmq", "pmq_as_released", "fisher"] | Pmq = Field(
        default="output_error",
        description="The predicted loss: squared error of the block's output; PMQ's product (or {alpha, beta, gamma}); "
        "the error weighted by the loss gradient.",
    )
    measured_by: Literal["method", "rtn"] = Field(
        default="method",
        description="What quantizes an expert when its cost is measured: the step's own method, or rounding to nearest "
        "as in PMQ, which is faster.",
    )
    minimum_counts: dict[Literal["1", "2", "3", "4", "5", "6", "7", "8"], Annotated[int, Field(ge=1)]] = Field(
        default={}, description='At least so many experts of every layer at a width, as {"3": 1, "2": 1} in PMQ.'
    )
    protect_super_experts: bool = Field(
        default=True,
        description="Experts with extreme activations are never dropped, and get 8 bits where widths may differ.",
    )
    group_size: GroupSize = Field(
        default="auto",
        description="Input weights that share a scale; `channel` for one scale per row; `auto` for the largest of 128, "
        "64, 32 and 16 that divides the matrices.",
    )
    symmetric: bool = Field(default=True, description="Without zero points; plain transformers loads no others.")
    act_order: bool = Field(default=False, description="gptq: columns in the order of their activations' size.")
    damping: float = Field(default=0.01, gt=0, lt=1, description="gptq: share of the Hessian's mean diagonal added.")
    scale_search: int = Field(
        default=20, ge=1, le=200, description="Scales tried for every group; 1 takes the extremes as they are."
    )
    attention: PartConfig | None = Field(default=None, description="Linear layers of the attention.")
    shared_experts: PartConfig | None = Field(default=None, description="Linear layers of shared experts.")
    dense_mlp: PartConfig | None = Field(default=None, description="Linear layers of MLPs without experts.")
    embeddings: PartConfig | None = Field(
        default=None,
        description="Input embeddings and output head, rounded to nearest; one table where they are tied.",
    )
    max_tokens_per_expert: int = Field(
        default=1024, ge=1, description="Calibration tokens an expert's cost is measured on, at most."
    )
    gradient_samples: int = Field(
        default=16, ge=1, description="cost fisher: calibration sequences that the loss is differentiated on."
    )
    seed: int = Field(default=0, ge=0, description="Seed of `allocation: random`.")

    @model_validator(mode="after")
    def _one_target(self) -> QuantizeConfig:
        budgets = [name for name in BUDGETS if getattr(self, name) is not None]
        if self.method in BITSANDBYTES and (self.bits is not None or budgets):
            raise ValueError(f"method {self.method} has its own width; leave out {', '.join(budgets) or 'bits'}")
        if self.bits is not None and budgets:
            raise ValueError(f"{TARGET}, not both")
        unset = [name for name, part in self.parts.items() if part.bits is None]
        if unset and self.has_budget:
            raise ValueError(f"{unset[0]} needs `bits` of its own where the experts' are chosen by a budget")
        if self.allow_drop and self.granularity == "layer":
            raise ValueError("allow_drop needs `granularity: expert` or `projection`; a whole layer cannot be dropped")
        return self

    @model_validator(mode="after")
    def _counts_are_of_experts(self) -> QuantizeConfig:
        if self.minimum_counts and self.granularity != "expert":
            raise ValueError("minimum_counts counts experts; it needs `granularity: expert`")
        if self.allocation == "frequency" and self.granularity == "layer":
            raise ValueError("allocation frequency ranks experts; it needs `granularity: expert` or `projection`")
        return self

    @model_validator(mode="after")
    def _embeddings_have_bits(self) -> QuantizeConfig:
        if self.embeddings is not None and self.embeddings.bits is None and self.bits is None:
            raise ValueError("embeddings needs `bits` of its own")
        return self

    @property
    def weights_per_scale(self) -> int | None:
        """The group size as a grid takes it: None is one group per row."""
        assert self.group_size != "auto", "settled when the experts' sizes are known"
        return None if self.group_size == "channel" else self.group_size

    @property
    def has_budget(self) -> bool:
        """Whether bits are chosen, not given; by a budget that is yet to be named, where costs are only measured."""
        return self.method not in BITSANDBYTES and self.bits is None

    @property
    def budgets(self) -> dict[str, float]:
        """The budgets that are set, by name."""
        values = {name: getattr(self, name) for name in BUDGETS}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def parts(self) -> dict[str, PartConfig]:
        """The parts besides the routed experts that are quantized."""
        found = {name: getattr(self, name) for name in ("attention", "shared_experts", "dense_mlp")}
        return {name: part for name, part in found.items() if part is not None}


# Rules between settings, judged in the step as it is written (see `recipe.OperationSettings`).

LAST: str | None = "packed experts are not changed again"
RELATION: str | None = "quantized"
METHODS = {"gptq": "2210.17323", "nf4": "2305.14314", "int8": "2208.07339"}
MIXTURE_COMPRESSOR = "2410.06270"
SUPER_EXPERTS = "2507.23279"
# Settings that say how a budget is spent.
CHOICE_SETTINGS = (
    "options", "keep_option", "allow_drop", "granularity", "allocation", "cost", "minimum_counts",
    "protect_super_experts", "max_tokens_per_expert", "gradient_samples", "measured_by", "seed",
)  # fmt: skip


def leaves_banks(step: Mapping[str, Any]) -> bool:
    return False


def chance(step: Mapping[str, Any]) -> str | None:
    return "bit allocation" if any(step.get(name) is not None for name in BUDGETS) else None


def needs_tokens(step: Mapping[str, Any]) -> bool:
    return step.get("method", "gptq") == "gptq" or chooses(step)


def chooses(step: Mapping[str, Any]) -> bool:
    """Whether bits are chosen, not given."""
    return step.get("method", "gptq") not in BITSANDBYTES and step.get("bits") is None


def impossible(step: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What keeps a step from being run, whatever the model: the setting, if it is one, and the reason."""
    if not chooses(step):
        return
    if all(step.get(name) is None for name in BUDGETS):
        yield "", TARGET
    options, average, counts = step.get("options", OPTIONS), step.get("average_bits"), step.get("minimum_counts") or {}
    bits = [option for option in options if isinstance(option, int)] if isinstance(options, list) else []
    if bits and isinstance(average, int | float) and average < min(bits) and not step.get("allow_drop"):
        yield "average_bits", f"`options` offers no fewer than {min(bits)} bits; offer fewer, or set `allow_drop`"
    for name in counts if isinstance(counts, dict) and bits else ():
        if name not in map(str, bits):
            yield "minimum_counts", f"`options` does not offer {name} bits"


def _part(step: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The settings of a part; none where something else was written, which validation tells."""
    found = step.get(name)
    return found if isinstance(found, dict) else {}


def idle(step: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    method = step.get("method", "gptq")
    if method in BITSANDBYTES:
        tables = _part(step, "embeddings")  # which are rounded all the same
        rounds = {"scale_search"} | ({"group_size"} if tables and not tables.get("group_size") else set())
        for key in ("group_size", "symmetric", "scale_search"):
            if key in step and not (tables and key in rounds):
                yield key, f"method `{method}` has its own"
        for name in ("attention", "shared_experts", "dense_mlp"):
            for key in _part(step, name):
                yield f"{name}.{key}", f"method `{method}` has its own"
    if method != "gptq":
        for key in ("act_order", "damping"):
            if key in step:
                yield key, "only the method `gptq` uses it"
    if not chooses(step):
        for key in CHOICE_SETTINGS:
            if key in step:
                yield key, "every expert gets the same bits; give a budget such as `average_bits` instead of `bits`"
        return
    if "gradient_samples" in step and step.get("cost") != "fisher":
        yield "gradient_samples", "only the cost `fisher` differentiates the loss"
    if "seed" in step and step.get("allocation") != "random":
        yield "seed", "only the allocation `random` draws numbers"


def beyond_stock(step: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    method = step.get("method", "gptq")
    if method in BITSANDBYTES:
        yield "method", f"plain transformers does not load `{method}` for experts in one tensor"
    budget = next((name for name in BUDGETS if step.get(name) is not None), None)
    if budget is not None and not step.get("allow_drop"):
        yield (
            budget,
            "the tier `stock` holds one scheme for all routed experts: of mixed bits, plain transformers would apply "
            "one to all and load the model silently wrong",
        )
    for key in ("keep_option", "minimum_counts"):
        if step.get(key):
            yield key, "the tier `stock` holds one scheme for all routed experts"
    if step.get("embeddings") is not None:
        yield "embeddings", "plain transformers does not load packed embeddings"
    if step.get("symmetric") is False:
        yield "symmetric", "plain transformers ignores the zero points of experts"
    options = step.get("options") or OPTIONS
    if step.get("bits") == 1 or (budget is not None and isinstance(options, list | tuple) and 1 in options):
        yield "bits" if step.get("bits") == 1 else "options", "compressed-tensors has no 1-bit format of signs"
    names = [name for name in ("attention", "shared_experts", "dense_mlp") if isinstance(step.get(name), dict)]
    for name in names:
        if step[name].get("bits") == 1:
            yield name, "compressed-tensors has no 1-bit format of signs"
    size = step.get("group_size") or QuantizeConfig.model_fields["group_size"].default
    schemes = [(step[name].get("bits") or step.get("bits"), step[name].get("group_size") or size) for name in names]
    if any(scheme != schemes[0] for scheme in schemes):
        yield "attention", "the tier `stock` holds one scheme for all linear layers outside the experts"


def tags(step: Mapping[str, Any], tier: str) -> list[str]:
    return ["quantized", *(["compressed-tensors"] if tier == "stock" else [])]


def papers(step: Mapping[str, Any]) -> list[str]:
    found = [METHODS[step["method"]]] if step["method"] in METHODS else []
    if not chooses(step):
        return found
    found += [MIXTURE_COMPRESSOR] if step["allocation"] == "optimal" else []
    return found + ([SUPER_EXPERTS] if step["protect_super_experts"] else [])
