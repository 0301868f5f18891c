"""What a `plugin` checkpoint carries so that `trust_remote_code=True` finds this package, or says it is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

HINT = "pip install moe-compress"
FILE = "modeling_moe_compress.py"
AUTO_MAP = {"AutoConfig": "modeling_moe_compress.Config"}
SOURCE = f'''"""This checkpoint was compressed by moe-compress, which also runs it."""

try:
    from moe_compress.runtime.remote_code import Config
except ImportError as error:
    raise ImportError("This checkpoint needs the package moe-compress: {HINT}") from error
'''


class Config:
    """What `auto_map` leads to: opens the configuration as the registered class of its `compressed_<family>`."""

    @classmethod
    def from_pretrained(cls, path: str, **settings: Any) -> PretrainedConfig:
        """The configuration in a folder or repository, as `AutoConfig` returns it."""
        settings.pop("trust_remote_code", None)
        config: PretrainedConfig = AutoConfig.from_pretrained(path, **settings)
        return config

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Asked for by transformers; the code in the checkpoint need not be saved again."""


def write_remote_code(folder: Path) -> None:
    """Put the file that `auto_map` names into a checkpoint folder."""
    (folder / FILE).write_text(SOURCE, encoding="utf-8")
