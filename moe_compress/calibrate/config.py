"""What to calibrate on: the `calibration` section of a recipe. No torch here."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

_SOURCE = (
    "A dataset id of the Hub, a local txt, jsonl, json, csv or parquet file, a folder of such files, "
    "or the word `reference` (the packaged texts)."
)
_SPLIT = "The split to read; a single file has only `train`."
_TEXT_FIELD = "The column that holds the text, or the chat as a list of {role, content}."
_CONFIG_NAME = "The dataset's configuration (subset), where it has several; `reference` has `text` and `skills`."


class DatasetPart(BaseModel):
    """One source of a mix; sequences are shared out by `weight`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str = Field(min_length=1, description=_SOURCE)
    weight: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="Share of the sequences, relative to the other parts."
    )
    split: str = Field(default="train", min_length=1, description=_SPLIT)
    text_field: str = Field(default="text", min_length=1, description=_TEXT_FIELD)
    config_name: str | None = Field(default=None, description=_CONFIG_NAME)


class CalibrationConfig(BaseModel):
    """The calibration set: `num_samples` sequences of exactly `sequence_length` tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: Annotated[str, Field(min_length=1)] | Annotated[list[DatasetPart], Field(min_length=1)] = Field(
        description=_SOURCE + " Or a list of such parts with weights."
    )
    split: str = Field(default="train", min_length=1, description=_SPLIT)
    text_field: str = Field(default="text", min_length=1, description=_TEXT_FIELD)
    config_name: str | None = Field(default=None, description=_CONFIG_NAME)
    num_samples: int = Field(default=128, ge=1, description="Number of sequences.")
    sequence_length: int = Field(default=2048, ge=2, description="Tokens in each sequence.")
    seed: int = Field(default=0, ge=0, description="Seed of the shuffles.")
    min_tokens_per_expert: int = Field(
        default=1, ge=0, description="An expert that is routed fewer tokens than this is reported as starved."
    )
    batch_size: int = Field(default=1, ge=1, description="Sequences in one forward pass.")

    @property
    def parts(self) -> list[DatasetPart]:
        """The mix as a list; the single form is a list of one."""
        if isinstance(self.dataset, list):
            return self.dataset
        return [
            DatasetPart(
                dataset=self.dataset, split=self.split, text_field=self.text_field, config_name=self.config_name
            )
        ]
