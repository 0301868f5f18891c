"""Packing against compressed-tensors: the same words, the same codes back, the same weights from its decompressor."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from moe_compress.compress.quantize.gptq import gptq
from moe_compress.compress.quantize.rtn import rtn
from moe_compress.runtime import grid as grid_module
from moe_compress.runtime.grid import Grid, Quantized, code_values
from moe_compress.runtime.pack import dequantize_packed, pack, unpack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ODD_SHAPES = [(1, 1), (3, 7), (5, 31), (2, 32), (33, 33), (7, 100), (4, 257)]


def random_codes(grid: Grid, *shape: int) -> Quantized:
    """Every code of the grid on a matrix [..., O, I], with the scale dtype bfloat16."""
    generator = torch.Generator().manual_seed(0)
    grid_shape = (*shape[:-1], grid.num_groups(shape[-1]))

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(grid.lowest, grid.highest + 1, shape, generator=generator).to(torch.int8)

    scale = torch.rand(grid_shape, generator=generator).to(torch.bfloat16)
    return Quantized(grid, draw(shape), scale, None if grid.symmetric else draw(grid_shape))


def grids(group_size: int | None) -> list[Grid]:
    """Every width, symmetric, and asymmetric where it can be."""
    asymmetric = [Grid(bits, group_size, False) for bits in range(2, 9)]
    return [Grid(bits, group_size, True) for bits in range(1, 9)] + asymmetric


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_exact_for_every_width_and_shape(shape: tuple[int, int]) -> None:
    for grid in grids(None):
        quantized = random_codes(grid, *shape)
        tensors = pack(quantized)
        packed = tensors["weight_packed"]
        assert torch.equal(packed, pack_to_int32(quantized.codes, grid.bits))
        assert packed.shape[1] == -(-shape[1] * grid.bits // 32) and tensors["weight_shape"].tolist() == list(shape)
        back = unpack(tensors, grid)
        assert torch.equal(back.codes, quantized.codes) and back.codes.dtype == torch.int8
        assert torch.equal(back.codes, unpack_from_int32(packed, grid.bits, torch.Size(shape)))
        if quantized.zero_point is not None:
            zero = tensors["weight_zero_point"]
            assert torch.equal(zero, pack_to_int32(quantized.zero_point, grid.bits, packed_dim=0))
            assert back.zero_point is not None and torch.equal(back.zero_point, quantized.zero_point)
        for dtype in DTYPES:
            assert torch.equal(dequantize_packed(tensors, grid, dtype), quantized.dequantize(dtype))


def test_zero_points_of_several_groups_in_a_single_word() -> None:
    """Their transposed words are one wide, which torch calls contiguous in any order."""
    for grid in grids(4):
        quantized = random_codes(grid, 4, 32)
        assert torch.equal(dequantize_packed(pack(quantized), grid, torch.float32), quantized.dequantize())


@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
def test_groups_chunks_and_several_matrices(scale_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid_module, "CPU_CHUNK", 300)  # two rows and a bit
    for grid in grids(12):
        stack = random_codes(grid, 3, 5, 96)
        stack = Quantized(grid, stack.codes, stack.scale.to(scale_dtype), stack.zero_point)
        tensors = pack(stack)
        assert torch.equal(unpack(tensors, grid).codes, stack.codes)
        for dtype in DTYPES:
            weight = dequantize_packed(tensors, grid, dtype)
            assert weight.dtype == dtype and torch.equal(weight, stack.dequantize(dtype))
        # A slice of the stack is what that matrix alone would be.
        one = {name: tensor if name == "weight_shape" else tensor[1] for name, tensor in tensors.items()}
        zero = None if stack.zero_point is None else stack.zero_point[1]
        alone = pack(Quantized(grid, stack.codes[1], stack.scale[1], zero))
        assert one.keys() == alone.keys() and all(torch.equal(one[name], alone[name]) for name in one)
        assert torch.equal(dequantize_packed(one, grid, torch.float32), stack.dequantize()[1])


@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [16, None])
@pytest.mark.parametrize("bits", range(2, 9))
def test_compressed_tensors_reads_the_same_weights(bits: int, group_size: int | None, scale_dtype: torch.dtype) -> None:
    weight = torch.randn(21, 48, generator=torch.Generator().manual_seed(bits))
    for symmetric in (True, False):
        grid = Grid(bits, group_size, symmetric)
        strategy = {"strategy": "group", "group_size": group_size} if group_size else {"strategy": "channel"}
        args = QuantizationArgs(num_bits=bits, symmetric=symmetric, **strategy)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        for quantized in (
            rtn(weight, grid, scale_dtype=scale_dtype, search_steps=3),
            gptq(weight[None], torch.eye(48)[None] + 0.5, grid, scale_dtype=scale_dtype).quantized,
        ):
            matrix = Quantized(
                grid,
                quantized.codes.view(21, 48),
                quantized.scale.view(21, -1),
                None if quantized.zero_point is None else quantized.zero_point.view(21, -1),
            )
            tensors = pack(matrix)
            assert set(tensors) == set(PackedQuantizationCompressor.compression_param_names(scheme))
            theirs = PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
            assert torch.equal(dequantize_packed(tensors, grid, theirs.dtype), theirs)
            assert torch.equal(matrix.dequantize(theirs.dtype), theirs)


def test_gptq_makes_up_for_exactly_the_stored_values() -> None:
    """The value GPTQ computes of a code is the value that is loaded."""
    for scale_dtype in DTYPES:
        for grid in grids(16):
            quantized = rtn(torch.randn(8, 16), grid, scale_dtype=scale_dtype)
            zero = None if quantized.zero_point is None else quantized.zero_point.float()
            values = code_values(quantized.codes.float(), quantized.scale.float(), zero, grid, scale_dtype)
            assert torch.equal(values, dequantize_packed(pack(quantized), grid, torch.float32))
