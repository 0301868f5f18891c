"""Codes as stored: compressed-tensors' pack-quantized tensors, and the way back that the runtime takes at every use.

A row of b-bit codes (plus 2^(b-1), so unsigned) is one stream of bits, lowest first, in int32 words; a code may cross
words, and only a row's last word is padded. Zero points are packed the same way along the output channels.
Reading takes the words for little-endian bytes. A period of 1, 3, 5 or 7 bytes holds 1 to 8 whole codes; a table per
byte of the period tells what that byte sets in all of them, and their union is the codes.
Tensor names: O output channels, I input channels, G groups of a row, R rows, W words of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import gcd

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor

from moe_compress.runtime.grid import Grid, Quantized, row_chunks

# A dtype for all codes of a period, by their bytes: copying single numbers is the fastest lookup there is.
CARRIERS = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def pack(quantized: Quantized) -> dict[str, Tensor]:
    """`weight_packed` int32 [..., O, W], `weight_scale` [..., O, G], `weight_shape` int64 [2] = O, I; asymmetric also
    `weight_zero_point` int32 [..., words of O, G]. Of several matrices each slice is one checkpoint tensor."""
    bits, codes = quantized.grid.bits, quantized.codes
    tensors = {
        "weight_packed": _pack_rows(codes, bits),
        "weight_scale": quantized.scale,
        "weight_shape": torch.tensor(codes.shape[-2:]),
    }
    if quantized.zero_point is not None:
        packed = _pack_rows(quantized.zero_point.transpose(-1, -2), bits)
        tensors["weight_zero_point"] = packed.transpose(-1, -2).contiguous()
    return tensors


def unpack(tensors: Mapping[str, Tensor], grid: Grid) -> Quantized:
    """What `pack` packed; reads `weight_shape` only for one group per row."""
    packed, scale = tensors["weight_packed"], tensors["weight_scale"]
    codes = _read_rows(packed.flatten(0, -2), grid.bits, _width(tensors, grid), torch.int8, False)
    zero_point = _zero_point(tensors, grid, torch.int8)
    return Quantized(grid, codes.reshape(*packed.shape[:-1], -1), scale, zero_point)


def dequantize_packed(tensors: Mapping[str, Tensor], grid: Grid, dtype: torch.dtype) -> Tensor:
    """The weight [..., O, I] in `dtype`, bit for bit `unpack(tensors, grid).dequantize(dtype)`, as fast as can be.

    For one group per row `weight_shape` should be on the CPU: reading it from an accelerator waits for that.
    """
    packed, scale = tensors["weight_packed"], tensors["weight_scale"]
    width, num_groups = _width(tensors, grid), scale.shape[-1]
    words_RW, scale_RG1 = packed.flatten(0, -2), scale.reshape(-1, num_groups, 1)
    zero = _zero_point(tensors, grid, scale.dtype)
    zero_RG1 = None if zero is None else zero.reshape(-1, num_groups, 1)
    weight_RGg = torch.empty(words_RW.shape[0], num_groups, width // num_groups, dtype=dtype, device=packed.device)
    for part in row_chunks(weight_RGg):
        values = _read_rows(words_RW[part], grid.bits, width, scale.dtype, True).view(-1, *weight_RGg.shape[1:])
        if zero_RG1 is not None:
            values -= zero_RG1[part]
        if dtype == scale.dtype:
            torch.mul(values, scale_RG1[part], out=weight_RGg[part])
        else:
            weight_RGg[part] = values.mul_(scale_RG1[part])
    return weight_RGg.reshape(*packed.shape[:-1], width)


def _width(tensors: Mapping[str, Tensor], grid: Grid) -> int:
    """Input channels I."""
    if grid.group_size is None:
        return int(tensors["weight_shape"][-1])
    return tensors["weight_scale"].shape[-1] * grid.group_size


def _zero_point(tensors: Mapping[str, Tensor], grid: Grid, dtype: torch.dtype) -> Tensor | None:
    """Zero points [..., O, G] in `dtype`, None on a symmetric grid."""
    if grid.symmetric:
        return None
    # A clone, because a transposed single word calls itself contiguous and still cannot be seen as bytes.
    packed = tensors["weight_zero_point"].transpose(-1, -2).clone(memory_format=torch.contiguous_format)
    num_outputs = tensors["weight_packed"].shape[-2]
    rows = _read_rows(packed.flatten(0, -2), grid.bits, num_outputs, dtype, False)
    return rows.view(*packed.shape[:-1], num_outputs).transpose(-1, -2)


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Words int32 [..., W] of codes int8 [..., n]."""
    rows = codes.flatten(0, -2)
    packed = torch.cat([pack_to_int32(rows[part], bits) for part in row_chunks(rows)])
    return packed.view(*codes.shape[:-1], -1)


def _read_rows(words_RW: Tensor, bits: int, width: int, dtype: torch.dtype, values: bool) -> Tensor:
    """The first `width` codes of every row [R, width] in `dtype`; `values` makes one bit -1 and 1, not -1 and 0."""
    num_bytes, num_codes = bits // gcd(bits, 8), 8 // gcd(bits, 8)
    # A row must hold whole periods; odd numbers of bytes take as many words.
    if missing := -words_RW.shape[1] % num_bytes:
        words_RW = torch.nn.functional.pad(words_RW, (0, missing))
    stream = words_RW.contiguous().view(torch.uint8)
    if bits == 8:
        codes = stream.view(torch.int8) ^ -128
    else:
        looked_up = dtype if num_bytes == 1 and num_codes * dtype.itemsize in CARRIERS else torch.int8
        tables = _tables(bits, looked_up, values and bits == 1, words_RW.device)
        periods = stream.view(-1, num_bytes)
        entries = tables[0].index_select(0, periods[:, 0].to(torch.int32))
        for table, numbers in zip(tables[1:], periods[:, 1:].unbind(1), strict=True):
            entries |= table.index_select(0, numbers.to(torch.int32))
        codes = entries.view(looked_up).view(words_RW.shape[0], -1)
    return codes[:, :width].to(dtype).contiguous()


@lru_cache
def _tables(bits: int, dtype: torch.dtype, signs: bool, device: torch.device) -> tuple[Tensor, ...]:
    """For each byte of a period, what every value of that byte sets in the codes of the period, seen as one number.

    No two bytes set the same bit: the sign, extended over the upper bits of an int8, is set by the byte of the top bit.
    """
    num_bytes, num_codes = bits // gcd(bits, 8), 8 // gcd(bits, 8)
    tables = []
    for number in range(num_bytes):
        # Bits of the stream that this byte holds, of every code: [256, codes, bits].
        position = torch.arange(num_codes)[:, None] * bits + torch.arange(bits) - 8 * number
        here = (position >= 0) & (position < 8)
        is_set = torch.arange(256)[:, None, None] >> position.clamp(0, 7) & 1
        weight = 1 << torch.arange(bits)
        codes = (is_set * weight * here)[..., :-1].sum(-1)
        # An unsigned code less 2^(b-1) is negative exactly when its top bit is 0.
        codes -= (here & (is_set == 0))[..., -1] * weight[-1]
        if signs:
            codes = 2 * codes + 1
        tables.append(codes.to(dtype).view(CARRIERS[num_codes * dtype.itemsize]).view(-1).to(device))
    return tuple(tables)
