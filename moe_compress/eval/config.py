"""What to evaluate, and how. Settings only, no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class EvalConfig(BaseModel):
    """Evaluation by lm-eval, with the same settings for the baseline and the compressed model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: list[str] = Field(
        default=[],
        description="lm-eval task, group or tag names, patterns (mmlu_*), YAML files or folders of tasks; `reference` "
        "stands for the packaged tasks of the reference model. Empty: no evaluation.",
    )
    include_path: str | None = Field(default=None, description="A folder with task definitions of your own.")
    limit: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Documents per task, the first ones; null means all."
    )
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="Sequences per forward pass; auto bounds the memory of the logits, the same every time.",
    )
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="Examples in the prompt; null means what each task says."
    )
    apply_chat_template: bool = Field(default=False, description="Put prompts into the tokenizer's chat template.")
    max_gen_toks: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Longest answer in tokens; null means what each task says, or lm-eval's 256."
    )
    seed: int = Field(default=0, ge=0, description="Seed of few-shot sampling and of sampled generation.")
    baseline: bool = Field(default=True, description="Evaluate the original model too.")
    random_baselines: int = Field(
        default=0,
        ge=0,
        description="How often to draw the recipe's choices (experts to drop, bits of a budget) at random, and to "
        "evaluate that beside it.",
    )
    speed: bool = Field(default=True, description="Measure prefill and decode speed and peak memory.")
