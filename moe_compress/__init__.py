"""Compress Mixture-of-Experts checkpoints: the command line's verbs as functions.

`from moe_compress import inspect, validate, score, plan, run, evaluate, verify, audit, write_page, push`. Nothing heavy
is imported before a verb is used. Importing the package also lets transformers' auto classes open checkpoints of the
tier `plugin`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moe_compress.runtime.registration import register

if TYPE_CHECKING:
    from moe_compress.api import audit, evaluate, inspect, plan, push, run, score, validate, verify, write_page

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "audit",
    "evaluate",
    "inspect",
    "plan",
    "push",
    "run",
    "score",
    "validate",
    "verify",
    "write_page",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("moe_compress.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


register()
