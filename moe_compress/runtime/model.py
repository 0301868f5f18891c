"""What every compressed model has over its family's class: layers that differ from each other."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from moe_compress.models.layers import decoder_layers, expert_counts, set_num_experts
from moe_compress.runtime.remote_code import HINT, write_remote_code


class CompressedModel(PreTrainedModel):
    """Mixed into a family's causal language model; `config.moe_compress` says how its layers depart from the family."""

    def __init__(self, config: PretrainedConfig, *inputs: Any, **settings: Any) -> None:
        super().__init__(config, *inputs, **settings)
        _set_expert_counts(self)
        self.post_init()

    def save_pretrained(self, save_directory: str | os.PathLike[str], *inputs: Any, **settings: Any) -> None:
        """As in transformers, with what a reader without this package needs to be told."""
        super().save_pretrained(save_directory, *inputs, **settings)
        file = Path(save_directory) / "config.json"
        content = json.loads(file.read_text())
        content["architectures"] = [f"{type(self).__name__} ({HINT})"]
        file.write_text(json.dumps(content, indent=2) + "\n")
        write_remote_code(file.parent)


def _set_expert_counts(model: PreTrainedModel) -> None:
    """Exchange the layers whose expert count is not the family's, for layers of a model with that count everywhere."""
    counts = expert_counts(model.config)
    if not counts:
        return
    family: Any = next(base for base in type(model).__mro__ if not issubclass(base, CompressedModel))
    _, layers = decoder_layers(model)
    for count in sorted(set(counts.values())):
        config = copy.deepcopy(model.config)
        set_num_experts(config, model.config.moe_compress["num_experts"], count)
        _, donated = decoder_layers(family(config))
        shared = {id(config): model.config, id(config.get_text_config()): model.config.get_text_config()}
        for index in (index for index, wanted in counts.items() if wanted == count):
            layers[index] = donated[index]
            for module in layers[index].modules():  # settings changed later must reach these layers too
                own: Any = getattr(module, "config", None)
                if id(own) in shared:
                    setattr(module, "config", shared[id(own)])  # noqa: B010
