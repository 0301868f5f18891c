"""The targets of a stock checkpoint name what is packed, and nothing else that a reader might find in a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest

from moe_compress.compress.quantize.storage import exact_targets, numbers
from moe_compress.verification.reload import require_all


@pytest.mark.parametrize("wanted", [{0}, set(range(3, 61)), {1, 3, 10, 11, 99, 100, 105}, set(range(200))])
def test_numbers_match_themselves_alone(wanted: set[int]) -> None:
    pattern = numbers(wanted)
    assert {number for number in range(2000) if re.fullmatch(pattern, str(number))} == wanted
    assert not re.fullmatch(pattern, f"0{max(wanted)}") and not re.fullmatch(pattern, "")


def test_targets_leave_prediction_heads_and_towers_alone() -> None:
    def experts(prefix: str, layers: Iterable[int]) -> set[str]:
        parts = ("gate_proj", "up_proj", "down_proj")
        return {f"{prefix}layers.{n}.mlp.experts.{e}.{part}" for n in layers for e in range(12) for part in parts}

    packed = experts("model.", range(3, 61))
    others = experts("model.", [0, 2, 61, 300]) | experts("mtp.", range(3, 61)) | experts("tower.model.", range(3, 61))
    others |= {"model.layers.3.mlp.shared_experts.gate_proj", "model.layers.3.mlp.experts.0.gate_proj.more"}
    targets = exact_targets(packed)
    assert len(targets) == 3 and all(len(target) < 120 for target in targets)
    patterns = [target.removeprefix("re:") for target in targets]
    assert {name for name in packed | others if any(re.match(pattern, name) for pattern in patterns)} == packed


def test_the_reload_fails_on_weights_that_were_made_up_or_left_out() -> None:
    require_all([], ["mtp.layers.0.mlp.experts.0.gate_proj.weight"])
    with pytest.raises(ValueError, match=r"holds no weights for tower\.q_proj\.weight_packed"):
        require_all(["tower.q_proj.weight_packed"], ["tower.q_proj.weight"])
    with pytest.raises(ValueError, match=r"tower\.q_proj\.weight_scale belongs to no module"):
        require_all([], ["mtp.norm.weight", "tower.q_proj.weight_scale"])
