"""Matrix products by the vendor's library, in the way that is fast and accurate where they run.

On a GPU a product of narrow matrices is written in float32 as well. On a CPU it is rounded to its
factors' dtype; and where the CPU has no instructions for that dtype, torch multiplies one element
after the other, up to a hundred times slower than float32. There, and where a CPU's result is to be
wider, blocks of the factors are multiplied in float32.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .reference import accumulation_dtype

# Rows or columns of the largest factor (as a rule the vocabulary) that are widened at a time.
_BLOCK = 4096


@cache
def narrow_products(dtype: torch.dtype) -> tuple[bool, str]:
    """Whether this CPU multiplies matrices of a dtype itself, and the reason in one line."""
    name = str(dtype).removeprefix("torch.")
    if dtype not in (torch.bfloat16, torch.float16):
        return True, f"{name} is multiplied as it is"
    if not torch.backends.mkldnn.is_available():
        return False, f"in float32 blocks: this torch has no oneDNN to multiply {name}"
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if supported[dtype]():
        return True, f"the CPU multiplies {name}"
    return False, f"in float32 blocks: the CPU has no instructions for {name}"


def writes_wide(device: torch.device) -> bool:
    """Whether the vendor's library writes products of narrow matrices in float32."""
    return device.type == "cuda"


def wide_is_free(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a float32 product of matrices of a dtype takes no longer than one in that dtype."""
    return writes_wide(device) or not narrow_products(dtype)[0]


def product(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """``left @ right`` into ``out``, or added to it, in ``out``'s dtype: the factors' or a wider.

    ``out`` may be any view whose rows are contiguous.
    """
    wide = out.dtype != left.dtype
    if wide and writes_wide(left.device):
        if add:
            torch.ops.aten.addmm.dtype_out(out, left, right, out.dtype, out=out)
        else:
            torch.ops.aten.mm.dtype_out(left, right, out.dtype, out=out)
        return out
    if not wide and (left.device.type != "cpu" or narrow_products(left.dtype)[0]):
        return out.addmm_(left, right) if add else torch.mm(left, right, out=out)
    # Autocast would narrow what is widened here; the operations above write where they are told.
    with torch.autocast(left.device.type, enabled=False):
        return _product_in_blocks(left, right, out, add=add)


def _product_in_blocks(left: Tensor, right: Tensor, out: Tensor, *, add: bool) -> Tensor:
    """As `product`, in float32, widening the largest of the three sides block by block."""
    rows, inner = left.shape
    columns = right.shape[1]
    wide = accumulation_dtype(out.dtype)
    if inner > max(rows, columns):
        total = out.to(wide) if add else torch.zeros_like(out, dtype=wide)
        for at in _blocks(inner):
            total.addmm_(left[:, at].to(wide), right[at].to(wide))
        return out if total is out else out.copy_(total)
    if rows >= columns:
        right = right.to(wide)
        parts = ((out[at], left[at].to(wide), right) for at in _blocks(rows))
    else:
        left = left.to(wide)
        parts = ((out[:, at], left, right[:, at].to(wide)) for at in _blocks(columns))
    for part, a, b in parts:
        if out.dtype != wide:
            part.copy_(torch.addmm(part.to(wide), a, b) if add else a @ b)
        elif add:
            part.addmm_(a, b)
        else:
            torch.mm(a, b, out=part)
    return out


def _blocks(size: int) -> list[slice]:
    return [slice(start, start + _BLOCK) for start in range(0, size, _BLOCK)]
