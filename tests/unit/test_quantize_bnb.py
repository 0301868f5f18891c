"""nf4, fp4 and int8: what comes back is the nearest value of the format, and mistakes are sentences."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional

from moe_compress.errors import CheckpointError, UsageError
from moe_compress.runtime.bnb import Kind, dequantize, quantize

NF4_NEGATIVE = torch.tensor([-1, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0])
NF4_POSITIVE = torch.tensor([0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1])
NF4 = torch.cat([NF4_NEGATIVE, NF4_POSITIVE])
FP4_MAGNITUDES = torch.tensor([0, 0.0625, 2, 3, 4, 6, 8, 12]) / 12
FP4 = torch.cat([FP4_MAGNITUDES, -FP4_MAGNITUDES])


@pytest.mark.parametrize("block_size", [32, None, 4096])
@pytest.mark.parametrize("shape", [(64, 96), (5, 33), (2, 3)], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_the_nearest_of_the_table(kind: Kind, shape: tuple[int, int], block_size: int | None) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    tensors = quantize(weight, kind, block_size)
    assert tensors["weight_packed"].dtype == torch.uint8 and tensors["weight_packed"].numel() == -(-weight.numel() // 2)
    flat = weight.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % (block_size or 64))).view(-1, block_size or 64)
    absmax = blocks.abs().amax(1, keepdim=True)
    torch.testing.assert_close(tensors["weight_absmax"], absmax.flatten())
    values = (NF4 if kind == "nf4" else FP4) * absmax.unsqueeze(-1)
    nearest = (values - blocks.unsqueeze(-1)).abs().amin(-1).flatten()[: len(flat)]
    back = dequantize(tensors, kind, shape, torch.float32)
    assert back.shape == weight.shape
    torch.testing.assert_close((back.flatten() - flat).abs(), nearest, atol=2e-3 * float(absmax.max()), rtol=0)
    assert dequantize(tensors, kind, shape, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_values_are_bitsandbytes_own(kind: Kind) -> None:
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, blocksize=128, quant_type=kind)
    tensors = quantize(weight, kind, 128)
    assert torch.equal(tensors["weight_packed"], packed) and torch.equal(tensors["weight_absmax"], state.absmax)
    theirs = functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(dequantize(tensors, kind, (48, 128), torch.float32), theirs)


def test_eight_bits_are_rounded_row_by_row() -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).half().float()
    weight[2] = 0
    tensors = quantize(weight, "int8")
    row_max = weight.abs().amax(1)
    assert tensors["weight_packed"].dtype == torch.int8 and torch.equal(tensors["weight_absmax"], row_max)
    back = dequantize(tensors, "int8", (6, 40), torch.float32)
    assert ((back - weight).abs() <= row_max[:, None] / 127 * 0.52).all() and not back[2].any()
    assert dequantize(tensors, "int8", (6, 40), torch.bfloat16).dtype == torch.bfloat16


def test_bfloat16_and_strided_weights() -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for kind in ("nf4", "fp4", "int8"):
        strided = quantize(weight.T, kind)  # type: ignore[arg-type]
        plain = quantize(weight.T.contiguous(), kind)  # type: ignore[arg-type]
        assert all(torch.equal(strided[name], plain[name]) for name in plain)


def test_errors_are_sentences() -> None:
    with pytest.raises(UsageError, match="block_size is 48; nf4 takes one of 32, 64"):
        quantize(torch.ones(2, 2), "nf4", 48)
    with pytest.raises(UsageError, match="int8 has one scale per row"):
        quantize(torch.ones(2, 2), "int8", 64)
    with pytest.raises(CheckpointError, match="expert 3 holds 1 values that are NaN or infinite"):
        quantize(torch.tensor([[1.0, float("nan")]]), "fp4", what="expert 3")
