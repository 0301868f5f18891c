"""The settings of `op: distill`, and the rules between them. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moe_compress.calibrate.config import CalibrationConfig

Part = Literal["routers", "norms", "experts", "residuals", "all"]


class DistillConfig(BaseModel):
    """Heal a changed checkpoint by learning from the checkpoint the recipe began with (self-distillation).

    `full` is Hinton's distillation on the logits (arXiv 1503.02531) through the whole model; `layerwise` fits each
    layer to the original layer's output, one streamed layer of each model in memory. With `target_skip`, routers also
    learn to use zero experts; the two stages are those of ZEDA (arXiv 2605.18643).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    op: Literal["distill"] = Field(description="Heal by learning from the original model.")
    mode: Literal["full", "layerwise"] = Field(
        default="full",
        description="full: the whole model learns from logits. layerwise: each layer by itself, streamed, from the "
        "original layer's output.",
    )
    stage: Literal["off_policy", "on_policy"] = Field(
        default="off_policy",
        description="off_policy: learn from given texts, or from responses that the original model sampled. on_policy: "
        "from what the student itself samples in every update, by how much likelier the original finds it.",
    )
    trainable: list[Part] = Field(
        default=["routers", "norms", "experts"],
        min_length=1,
        description="What is trained: routers, norms, experts, residuals (the low-rank differences of tied or merged "
        "experts), or all. Everything else keeps its bytes.",
    )
    data: CalibrationConfig | None = Field(
        default=None, description="The texts to learn from; those of `calibration` when not given."
    )
    epochs: int = Field(default=1, ge=1, description="Times that every sequence is learnt from.")
    batch_size: int = Field(default=8, ge=1, description="Sequences in one update, over all processes.")
    micro_batch_size: int = Field(default=1, ge=1, description="Sequences in one forward pass of one process.")
    learning_rate: float = Field(
        default=1e-4,
        gt=0,
        allow_inf_nan=False,
        description="Largest learning rate of AdamW.",
    )
    decay: Literal["cosine", "constant"] = Field(
        default="cosine", description="Whether the learning rate falls to 0 by a cosine after `warmup`, or stays."
    )
    warmup: float = Field(default=0.1, ge=0, lt=1, description="Share of the updates in which the rate rises.")
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="Weight decay of AdamW.")
    max_gradient_norm: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="Gradients of a larger norm are scaled down to it."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the order of the sequences.")
    teacher_model: str | None = Field(
        default=None,
        min_length=1,
        description="Hub id or folder of another model to learn from, with the same tokenizer; the recipe's `model` "
        "when not given.",
    )
    target_skip: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Share of the expert slots that zero experts are to take; adds their group balance loss.",
    )
    balance_alpha: float = Field(
        default=0.1, gt=0, allow_inf_nan=False, description="Weight of the group balance loss of each layer."
    )
    expert_balance_alpha: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Weight of a balance loss of single experts, counted over the whole batch of an update and all "
        "processes; takes one more pass. 0: none, as experts of a trained model are best left as they are.",
    )
    prompt_length: int | None = Field(
        default=None,
        ge=1,
        description="The first tokens of each sequence are a prompt, and the rest is sampled: once and by the original "
        "model in the stage off_policy, by the student in on_policy. Texts as they are when not given.",
    )
    sampling_temperature: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="Divides the logits where responses are sampled."
    )

    teacher: Literal["online", "nf4", "cached"] = Field(
        default="online",
        description="online: the teacher is in memory too. nf4: so is a copy of it whose experts and linear layers are "
        "packed by bitsandbytes, at about an eighth of the memory. cached: its largest logits are written to disk "
        "first, by a sweep that holds one layer in memory.",
    )
    top_logits: int = Field(
        default=64, ge=1, description="Logits per token that the cached teacher keeps; the rest is one sum."
    )
    temperature: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="Divides the logits of both models before the divergence."
    )
    nll_share: float = Field(
        default=0.0, ge=0, le=1, description="Share of the next token's negative log-likelihood in the loss on logits."
    )
    hidden_weight: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Weight of the hidden states' relative squared error, mean over layers.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Of products in the passes; weights are trained in float32. auto: bfloat16 on a GPU that has it.",
    )
    processes: int = Field(default=1, ge=1, description="Processes that share a batch, one per GPU or CPU group.")
    accelerate_config: str | None = Field(
        default=None,
        min_length=1,
        description="An accelerate config file (`accelerate config`) that says how many processes there are, whether "
        "they divide parameters, gradients and optimizer states among them (FSDP2), and the precision of products.",
    )
    save_every: int = Field(default=25, ge=1, description="Updates between two saves of the training state.")

    inputs: Literal["teacher", "student"] = Field(
        default="student",
        description="What enters a layer in `layerwise`: the original's hidden states, or those that the healed layers "
        "before it give, so that later layers make up for what earlier ones miss.",
    )

    @field_validator("trainable")
    @classmethod
    def _no_part_twice(cls, trainable: list[Part]) -> list[Part]:
        if len(set(trainable)) < len(trainable) or ("all" in trainable and len(trainable) > 1):
            raise ValueError("should name each part once, or `all` alone")
        return trainable

    @model_validator(mode="after")
    def _fits(self) -> DistillConfig:
        per_pass = self.micro_batch_size * self.processes
        if self.batch_size % per_pass:
            raise ValueError(
                f"batch_size ({self.batch_size}) should be a multiple of micro_batch_size x processes ({per_pass})"
            )
        if self.mode == "full" and self.hidden_weight and self.teacher == "cached":
            raise ValueError("hidden_weight needs `teacher: online` or `nf4`: the cache holds logits, no hidden states")
        if self.stage == "on_policy" and (self.mode == "layerwise" or self.prompt_length is None):
            raise ValueError("`stage: on_policy` needs `mode: full` and a `prompt_length`")
        if self.on_policy and self.teacher == "cached":
            raise ValueError("`stage: on_policy` needs `teacher: online` or `nf4`: what is sampled is not known before")
        return self

    @property
    def on_policy(self) -> bool:
        """Whether the student samples what it learns from."""
        return self.stage == "on_policy"

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher says anything that is part of the loss."""
        return self.on_policy or self.uses_teacher_logits or self.hidden_weight > 0

    @property
    def uses_teacher_logits(self) -> bool:
        """Whether the divergence from the teacher's logits is part of the loss."""
        return self.on_policy or self.nll_share < 1

    @property
    def caches_logits(self) -> bool:
        """Whether the teacher's logits are written to disk before the training."""
        return self.mode == "full" and self.teacher == "cached" and self.uses_teacher_logits


LAST: str | None = None
RELATION: str | None = "finetune"
HINTON, ZEDA = "1503.02531", "2605.18643"

_NO_DIVERGENCE = "`nll_share: 1` leaves no divergence from the teacher"
_LOGITS = "in `mode: layerwise` there are no logits"
_FULL_ONLY = {
    "teacher": "`mode: layerwise` streams the original model",
    "top_logits": _LOGITS,
    "temperature": _LOGITS,
    "nll_share": _LOGITS,
    "hidden_weight": "`mode: layerwise` regresses hidden states alone",
    "stage": "`mode: layerwise` learns from given texts",
    "prompt_length": "`mode: layerwise` learns from given texts",
    "sampling_temperature": "`mode: layerwise` learns from given texts",
    "precision": "`mode: layerwise` computes in float32",
    "processes": "`mode: layerwise` is one process",
    "accelerate_config": "`mode: layerwise` is one process",
    "save_every": "`mode: layerwise` saves every layer",
}
_ACCELERATE = {"processes": "`num_processes`", "precision": "`mixed_precision`"}
_SCORED = "`stage: on_policy` scores sampled tokens"
_OFF_POLICY_ONLY = {
    "top_logits": _SCORED,
    "temperature": f"{_SCORED}; the temperature there is `sampling_temperature`",
    "nll_share": _SCORED,
    "hidden_weight": _SCORED,
}


def chance(step: Mapping[str, Any]) -> str | None:
    return None


def needs_tokens(step: Mapping[str, Any]) -> bool:
    return step.get("data") is None


def impossible(step: Mapping[str, Any], calibration: Any) -> Iterator[tuple[str, str]]:
    """What keeps a step from being run, whatever the model: the setting and the reason."""
    data = step.get("data") or calibration or {}
    length = data.get("sequence_length") if isinstance(data, dict) else None
    length = CalibrationConfig.model_fields["sequence_length"].default if length is None else length
    prompt = step.get("prompt_length")
    if isinstance(prompt, int) and isinstance(length, int) and prompt >= length:
        yield (
            "prompt_length",
            f"{prompt} tokens leave no room for a response in sequences of {length}; shorten the prompts or raise "
            "`sequence_length`",
        )


def idle(step: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if step.get("target_skip") is None:
        unused = [key for key in ("balance_alpha", "expert_balance_alpha") if key in step]
        yield from ((key, "only `target_skip` adds balance losses") for key in unused)
    if step.get("mode") == "layerwise":
        yield from ((key, why) for key, why in _FULL_ONLY.items() if key in step)
        return
    if step.get("accelerate_config") is not None:
        yield from ((key, f"{why} of `accelerate_config` decides") for key, why in _ACCELERATE.items() if key in step)
    if "sampling_temperature" in step and step.get("prompt_length") is None:
        yield "sampling_temperature", "without `prompt_length` nothing is sampled"
    if "inputs" in step:
        yield "inputs", "only `mode: layerwise` chooses what enters a layer"
    if step.get("stage") == "on_policy":
        yield from ((key, why) for key, why in _OFF_POLICY_ONLY.items() if key in step)
        return
    if step.get("nll_share") == 1:
        yield from ((key, _NO_DIVERGENCE) for key in ("temperature", "top_logits") if key in step)
        if "teacher" in step and not step.get("hidden_weight"):
            yield "teacher", _NO_DIVERGENCE
    elif "top_logits" in step and step.get("teacher", "online") != "cached":
        yield "top_logits", "only `teacher: cached` keeps a few logits"


def leaves_banks(step: Mapping[str, Any]) -> bool:
    return False  # those that were there stay


def beyond_stock(step: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield from ()


def tags(step: Mapping[str, Any], tier: str) -> list[str]:
    return ["distilled", *(["expert-skipping"] if step["target_skip"] is not None else [])]


def papers(step: Mapping[str, Any]) -> list[str]:
    logits = step["mode"] == "full" and step["stage"] == "off_policy" and step["nll_share"] < 1
    return [HINTON] * logits + [ZEDA] * (step["stage"] == "on_policy" or step["target_skip"] is not None)
