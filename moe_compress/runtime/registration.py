"""Makes transformers know the model types `compressed_<family>`, without importing it before somebody else does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

COMPRESSED = "compressed_"
_KNOWS_FAMILIES = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Extend `AutoConfig` and `AutoModelForCausalLM`, now or as soon as transformers is imported."""
    if _KNOWS_FAMILIES in sys.modules:
        _extend(sys.modules[_KNOWS_FAMILIES])
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Families(dict[str, Any]):
    """Configuration classes added to transformers' own; those of compressed families are made on demand."""

    def __init__(self, added: dict[str, Any], known: Any) -> None:
        super().__init__(added)
        self._known = known

    def __contains__(self, model_type: object) -> bool:
        return super().__contains__(model_type) or (
            isinstance(model_type, str)
            and model_type.startswith(COMPRESSED)
            and model_type.removeprefix(COMPRESSED) in self._known
        )

    def __missing__(self, model_type: str) -> Any:
        if model_type not in self:
            raise KeyError(model_type)
        from moe_compress.runtime.families import make_classes

        self[model_type] = make_classes(model_type.removeprefix(COMPRESSED))
        return self[model_type]


class _Watch(MetaPathFinder):
    """Waits for one module of transformers, and extends it when it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _KNOWS_FAMILIES:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_extend(module: ModuleType) -> None:
            execute(module)
            _extend(module)

        spec.loader.exec_module = execute_and_extend  # type: ignore[method-assign]
        return spec


def _extend(module: ModuleType) -> None:
    mapping = module.CONFIG_MAPPING
    if not isinstance(mapping._extra_content, _Families):
        mapping._extra_content = _Families(mapping._extra_content, mapping)
