"""The costs of bits and drops are measured in every family of the tier `plugin`, or refused before the sweep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_compress.calibrate.sweep import collect
from moe_compress.checkpoint.source import open_checkpoint
from moe_compress.checkpoint.stream import LayerStream
from moe_compress.compress.quantize.config import QuantizeConfig
from moe_compress.compress.quantize.sensitivity import ReducedRouters, Sensitivity
from moe_compress.errors import UnsupportedModelError, UsageError
from moe_compress.progress import SilentProgress
from tests.matrix.families import FAMILIES, NUM_LAYERS, save, tiny_config, tiny_model
from tests.matrix.test_quantized import NOT_CAUSAL

TOKENS = torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(1))
CONFIG = QuantizeConfig.model_validate({
    "op": "quantize", "method": "rtn", "average_bits": 3, "options": [2, 4], "group_size": 4, "scale_search": 1,
    "granularity": "projection", "allow_drop": True,
})  # fmt: skip
GROUPED = {"axk1", "deepseek_v2", "deepseek_v3", "deepseek_v32"}  # as they are built here: with two groups
OWN_ROUTER = {"gemma4"}  # the decoder layer owns router and experts


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - NOT_CAUSAL))
def test_every_option_of_every_expert_has_a_cost(name: str, tmp_path: Path) -> None:
    save(tiny_model(tiny_config(name)), tmp_path / "source")
    stream = LayerStream(open_checkpoint(str(tmp_path / "source")))
    routers = None
    if name in GROUPED:
        with pytest.raises(UsageError, match="limits its choice to 2 groups"):
            ReducedRouters(stream.checkpoint.config)
    elif name in OWN_ROUTER:
        with pytest.raises(UnsupportedModelError, match="cannot be run by itself"):
            ReducedRouters(stream.checkpoint.config)
    else:
        routers = ReducedRouters(stream.checkpoint.config)
    with SilentProgress().stage("score", NUM_LAYERS) as stage:
        scores = collect(
            stream, TOKENS, batch_size=1, folder=tmp_path / "scores", fingerprint={}, min_tokens_per_expert=1,
            stage=stage, measurement=lambda moe: Sensitivity(CONFIG, moe, torch.bfloat16, routers=routers),
        )  # fmt: skip
    assert [layer.layer for layer in scores.layers] == list(stream.moe_layers)
    for layer in scores.layers:
        seen = layer.statistics["tokens"] > 0
        assert seen.any()
        for part in ("expert", "down_proj"):
            coarse, fine = (layer.statistics[f"error.{part}.{bits}"] for bits in (2, 4))
            assert (fine[seen] > 0).all() and not coarse[~seen].any() and coarse.sum() > 2 * fine.sum()
        if routers is not None:
            assert (layer.statistics["error.expert.drop"][seen] > 0).all()
