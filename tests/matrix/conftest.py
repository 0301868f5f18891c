"""Fixtures of the matrix tests; a test module's class `Case` is made once for every family that is asked for."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.utils import logging


@pytest.fixture(scope="package", autouse=True)
def quiet() -> None:
    logging.disable_progress_bar()
    logging.set_verbosity_error()


@pytest.fixture(scope="module")
def cases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The families' cases, made when they are first asked for."""

    class Cases(dict[str, Any]):
        def __missing__(self, name: str) -> Any:
            self[name] = request.module.Case(name, tmp_path_factory.mktemp(name))
            return self[name]

    return Cases()
