"""The model types `compressed_<family>`: an architecture of transformers whose layers need not be alike.

A checkpoint of the tier `plugin` names such a type in its `config.json`, and says in the section `moe_compress` there
how it departs from the family. Plain transformers knows no such type and refuses the checkpoint, so nothing is ever
loaded as something it is not. A family's classes are made when the first checkpoint of it is opened.

Not covered: checkpoints that `AutoModelForCausalLM` would not open as what they are, such as those that also see.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_compress.errors import UnsupportedModelError
from moe_compress.models.layers import BANK, SECTION
from moe_compress.models.routing import EXPERTS_PER_TOKEN
from moe_compress.runtime.banks import Bank
from moe_compress.runtime.model import CompressedModel
from moe_compress.runtime.packed import packed_conversions
from moe_compress.runtime.registration import COMPRESSED
from moe_compress.runtime.remote_code import AUTO_MAP, HINT

FORMAT = 1


def plugin_section(num_experts: int) -> dict[str, Any]:
    """The section `moe_compress` of a model that does not depart from its family, whose layers have `num_experts`."""
    return {"format": FORMAT, "num_experts": num_experts, "layers": {}}


def with_layers(
    config: Mapping[str, Any], num_experts: int, entries: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """The content of `config.json` for the tier `plugin` with these additions to its layers' entries.

    `num_experts` is that of a layer, needed where the model does not depart from its family yet. What was measured of
    the routing of these layers no longer holds and is left out, unless an addition brings it.
    """
    section = config.get(SECTION) or plugin_section(num_experts)
    layers = {**section["layers"]}
    for layer, entry in entries.items():
        known = {key: value for key, value in layers.get(str(layer), {}).items() if key != EXPERTS_PER_TOKEN}
        layers[str(layer)] = {**known, **entry}
    return plugin_config(config, section | {"layers": layers})


def plugin_config(config: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `config.json` for the tier `plugin`: that of the family, or an earlier one, with this section."""
    return {
        **config,
        "model_type": COMPRESSED + config["model_type"].removeprefix(COMPRESSED),
        "architectures": [f"Compressed{causal_model(config).__name__} ({HINT})"],
        "auto_map": AUTO_MAP,
        SECTION: dict(section),
    }


def with_banks(config: Mapping[str, Any], num_experts: int, banks: Mapping[int, Bank]) -> dict[str, Any]:
    """The content of `config.json` for layers that, by index, run from these banks; others have `num_experts`."""
    section = config.get(SECTION) or plugin_section(num_experts)
    layers = {**section["layers"]}
    for layer, bank in banks.items():
        layers[str(layer)] = {**layers.get(str(layer), {}), BANK: bank.to_json()}
    return plugin_config(config, section | {"layers": layers})


def banked(config: PretrainedConfig, num_experts: int, banks: Mapping[int, Bank]) -> PretrainedConfig:
    """`with_banks` of a configuration in memory."""
    content = with_banks(config.to_dict(), num_experts, banks)
    made: PretrainedConfig = CONFIG_MAPPING[content["model_type"]].from_dict(content)
    return made


def parsed_config(content: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration that such a `config.json` would be read as."""
    config: PretrainedConfig = CONFIG_MAPPING[content["model_type"]].from_dict(dict(content))
    return config


def causal_model(config: Mapping[str, Any]) -> Any:
    """The class that `AutoModelForCausalLM` opens a checkpoint of this configuration with.

    Raises `UnsupportedModelError` when it has none, or not the class that the checkpoint names.
    """
    family = config["model_type"].removeprefix(COMPRESSED)
    named = (config.get("architectures") or [None])[0]
    if family in CONFIG_MAPPING and CONFIG_MAPPING[family] in AutoModelForCausalLM._model_mapping:
        found = _base_model(family)
        if config["model_type"] != family or named in (None, found.__name__):
            return found
    raise UnsupportedModelError(
        f"The tier `plugin` holds what transformers' AutoModelForCausalLM opens, and {named or f'`{family}`'} is none "
        "of that; only the tier `stock` is left."
    )


def _base_model(family: str) -> Any:
    return AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[family]]


def make_classes(family: str) -> type[PretrainedConfig]:
    """The configuration class of a compressed family; its model class is registered with it."""
    base_config = CONFIG_MAPPING[family]
    model_type = COMPRESSED + family
    config_class: type[PretrainedConfig] = type(
        f"Compressed{base_config.__name__}", (base_config,), {"model_type": model_type, "__module__": __name__}
    )
    base_model = _base_model(family)
    model_class = type(
        f"Compressed{base_model.__name__}",
        (CompressedModel, base_model),
        {"config_class": config_class, "__module__": __name__},
    )
    AutoModelForCausalLM.register(config_class, model_class)
    for name, compressed_name in ((family, model_type), (base_model.__name__, model_class.__name__)):
        mapping = get_checkpoint_conversion_mapping(name)
        if mapping is not None or name == family:
            conversions = [*packed_conversions(), *(mapping or ())]
            register_checkpoint_conversion_mapping(compressed_name, conversions, overwrite=True)
    return config_class
