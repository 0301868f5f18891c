"""nf4, fp4 and int8 by bitsandbytes (`bitsandbytes.functional`), for one matrix at a time.

nf4 (arXiv 2305.14314) and fp4 store a 4-bit index into a table of 16 values and one float32 maximum per block of
consecutive weights, whichever rows they belong to; statistics are not quantized again. int8 (arXiv 2208.07339) stores
round(127 w / max|w|) with one maximum per row. The 4-bit values are looked up here, not by bitsandbytes: on a CPU its
0.50.2 gets rows wrong that are no whole number of blocks, and compiles for seconds where rows are odd.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache, lru_cache
from math import prod
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from moe_compress.errors import UsageError
from moe_compress.runtime.grid import check_finite

Kind = Literal["nf4", "fp4", "int8"]
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DEFAULT_BLOCK_SIZE = 64


def quantize(weight: Tensor, kind: Kind, block_size: int | None = None, what: str = "the weight") -> dict[str, Tensor]:
    """Quantize weight float [O, I].

    nf4, fp4: `weight_packed` uint8 [ceil(O * I / 2), 1], and `weight_absmax` float32 [blocks] of `block_size` weights
    each (default 64). int8: `weight_packed` int8 [O, I] and `weight_absmax` float32 [O]; the weight is taken through
    float16, as bitsandbytes does.
    Raises `UsageError` for a block size that bitsandbytes has not or int8 has no use for, `CheckpointError` on NaN or
    infinity, naming `what`.
    """
    check_finite(weight, what)
    if kind == "int8":
        if block_size is not None:
            raise UsageError(f"int8 has one scale per row, so block_size {block_size} has no effect; leave it out.")
        # A row of zeros has no maximum to divide by.
        codes, row_max, _ = _bitsandbytes().int8_vectorwise_quant(weight.to(torch.float16))
        return {"weight_packed": codes.masked_fill(row_max[:, None] == 0, 0), "weight_absmax": row_max}
    block_size = DEFAULT_BLOCK_SIZE if block_size is None else block_size
    if block_size not in BLOCK_SIZES:
        raise UsageError(f"block_size is {block_size}; {kind} takes one of {', '.join(map(str, BLOCK_SIZES))}.")
    packed, state = _bitsandbytes().quantize_4bit(weight.contiguous(), blocksize=block_size, quant_type=kind)
    return {"weight_packed": packed, "weight_absmax": state.absmax}


def tensors(kind: Kind, height: int, width: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of what `quantize` returns for a matrix [height, width] with the default block size."""
    if kind == "int8":
        return {"weight_packed": ((height, width), torch.int8), "weight_absmax": ((height,), torch.float32)}
    count = height * width
    return {
        "weight_packed": ((-(-count // 2), 1), torch.uint8),
        "weight_absmax": ((-(-count // DEFAULT_BLOCK_SIZE),), torch.float32),
    }


def dequantize(stored: Mapping[str, Tensor], kind: Kind, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The weight of `shape` [O, I] in `dtype` (float32, float16 or bfloat16) from what `quantize` returned."""
    functional = _bitsandbytes()
    if kind == "int8":
        values: Tensor = functional.int8_vectorwise_dequant(stored["weight_packed"], stored["weight_absmax"])
        return values.to(dtype)
    absmax, count = stored["weight_absmax"], prod(shape)
    # The block size that makes so many blocks; several do only when there is a single block.
    block_size = next(size for size in BLOCK_SIZES if -(-count // size) == len(absmax))
    bytes_ = stored["weight_packed"].view(-1).to(torch.int32)
    pairs = _pairs(kind, absmax.device).index_select(0, bytes_).view(torch.float32)[:count]
    if count % block_size:
        pairs *= absmax.repeat_interleave(block_size)[:count]
    else:
        pairs.view(-1, block_size).mul_(absmax[:, None])
    return pairs.view(shape).to(dtype)


@lru_cache
def _pairs(kind: Kind, device: torch.device) -> Tensor:
    """The two float32 values of every byte, the upper 4 bits first, seen as one int64 [256]."""
    values = _bitsandbytes().get_4bit_type(kind, device="cpu")
    number = torch.arange(256)
    return torch.stack([values[number >> 4], values[number & 15]], dim=1).view(torch.int64).view(-1).to(device)


@cache
def _bitsandbytes() -> ModuleType:
    """`bitsandbytes.functional`, imported when first used: it is slow to import."""
    # On some CPUs its import warns of a missing kernel for 4-bit products, which are not used here.
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    import bitsandbytes.functional

    logger.setLevel(level)
    return bitsandbytes.functional
