"""Shared-prompt attention by a variable-length flash kernel on gathered keys (CUDA).

Each segment's queries attend to [its prompt; itself], causally and aligned at the end, as the
kernel's causal mask aligns fewer queries than keys; by the same alignment windows are windows of
positions. The kernel wants each segment's keys in one piece: every segment's own tokens are
gathered once and a prompt's once more per response. That costs n copies of the prompt's keys and
values in a layer's memory; in return a layer is one kernel call, forward and backward.

Two kernels serve: PyTorch's own ``varlen_attn``, or flash-attn's where that package is installed
(the ``flash-attn`` extra), which also takes soft caps.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrank.attention.merged import same_head_size
from fastrank.attention.segments import SegmentTable
from fastrank.attention.visibility import FULL, Visibility
from fastrank_kernels import first_order_only

MAX_HEAD_SIZE = 256


class FlashAttn(NamedTuple):
    """flash-attn's ``flash_attn_varlen_func``; None without, and the reason."""

    function: Callable[..., Any] | None
    reason: str


@functools.cache
def flash_attn() -> FlashAttn:
    """The kernel of the flash-attn package, which is imported here, once. A package of this name is
    not enough: flash-attn-4 installs one without this kernel."""
    try:
        from flash_attn import flash_attn_varlen_func
    except (ImportError, OSError) as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "flash_attn"
        why = "is not installed" if absent else f"cannot be imported ({error})"
        return FlashAttn(None, f"flash-attn {why}")
    return FlashAttn(flash_attn_varlen_func, "flash-attn is installed")


class TorchVarlen(NamedTuple):
    """PyTorch's ``varlen_attn``; whether it has the option ``enable_gqa``."""

    function: Callable[..., Any]
    has_gqa_option: bool


@functools.cache
def torch_varlen() -> TorchVarlen | None:
    """PyTorch's kernel, if this version has one that takes a scale and a window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= known.keys():
        return None
    return TorchVarlen(varlen_attn, "enable_gqa" in known)


@functools.cache
def takes_grouped_heads(kernel: TorchVarlen, device: torch.device) -> bool:
    """Whether a kernel without the option takes fewer key heads than query heads all the same, as
    its CUDA code does: tried once per device, on values that come out as they are."""
    query = torch.ones(2, 4, 8, dtype=torch.float16, device=device)
    value = torch.tensor([1.0, 2.0], dtype=torch.float16, device=device)[None, :, None]
    value = value.expand(2, 2, 8).contiguous()
    offsets = torch.tensor([0, 2], dtype=torch.int32, device=device)
    try:
        out = kernel.function(
            query, value, value, offsets, offsets, 2, 2, scale=1.0, window_size=(-1, 0)
        )
    except (RuntimeError, ValueError):
        return False
    return bool(torch.equal(out, value.repeat_interleave(2, 1)))


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: SegmentTable,
    *,
    visibility: Visibility = FULL,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of every response over [its prompt; itself], full or within a sliding window.

    Arguments and result as in `fastrank.attention.segmentwise`, in float16 or bfloat16, with heads
    of at most 256.

    Raises:
        ValueError: a chunk shorter than a sequence, a softcap without flash-attn, no kernel.
    """
    left = -1
    if not visibility.covers(segments.longest_sequence):
        if visibility.kind != "sliding":
            raise ValueError(f"varlen attention cannot restrict a layer to {visibility}")
        left = visibility.size - 1
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    padded = same_head_size(query, key, value)
    # [N, H, D], without a select, whose backward would fill and copy.
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in padded)
    index = key_index(segments, query.device)
    k, v = gather_keys(k, index), gather_keys(v, index)
    ragged = (index.cu_queries, index.cu_keys, index.max_queries, index.max_keys)
    window = (left, 0)
    if function := flash_attn().function:
        out = function(
            q, k, v, *ragged,
            softmax_scale=scale,
            causal=True,
            window_size=window,
            softcap=softcap or 0.0,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
    elif softcap is not None:
        raise ValueError("varlen attention with a softcap needs the flash-attn package")
    elif kernel := torch_varlen():
        options: dict[str, Any] = {"scale": scale, "window_size": window}
        if (groups := q.shape[1] // k.shape[1]) > 1:
            if kernel.has_gqa_option:
                options["enable_gqa"] = True
            elif not takes_grouped_heads(kernel, q.device):
                k, v = (tensor.repeat_interleave(groups, 1) for tensor in (k, v))
        out = kernel.function(q.contiguous(), k, v, *ragged, **options)
    else:
        raise ValueError(
            "varlen attention needs flash-attn or a PyTorch whose varlen_attn takes a scale and a "
            f"window, got {torch.__version__}"
        )
    return out.unsqueeze(0)[..., : value.shape[-1]]


class KeyIndex(NamedTuple):
    """Index arrays of one segment table on one device, for K gathered keys of N tokens.

    Attributes:
        cu_queries: int32 [S + 1], the segments' offsets.
        cu_keys: int32 [S + 1], offsets of the segments' keys among the gathered ones.
        max_queries, max_keys: the longest segment, the longest sequence.
        keys: int64 [K], the token of each gathered key.
        copies: int64 [K], the gathered keys of token 0, those of token 1, ..., each token's in
            rising order.
        cu_copies: int64 [N], where each token's begin among them.
    """

    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int
    keys: Tensor
    copies: Tensor
    cu_copies: Tensor


def key_index(segments: SegmentTable, device: torch.device) -> KeyIndex:
    """The table's index arrays on a device; made once for each and kept with the table."""
    return segments.on_device("keys", device, _make_key_index)


def _make_key_index(segments: SegmentTable) -> KeyIndex:
    pieces: list[Tensor] = []
    lengths = [0]
    for group in segments.groups:
        prompt = torch.arange(group.prompt.start, group.prompt.stop)
        pieces.append(prompt)
        lengths.append(len(prompt))
        for response in group.responses:
            pieces += [prompt, torch.arange(response.start, response.stop)]
            lengths.append(len(prompt) + response.length)
    keys = torch.cat(pieces)
    counts = torch.bincount(keys, minlength=segments.num_tokens)
    return KeyIndex(
        cu_queries=segments.offsets,
        cu_keys=torch.tensor(lengths).cumsum(0).to(torch.int32),
        max_queries=segments.longest_segment,
        max_keys=segments.longest_sequence,
        keys=keys,
        copies=torch.argsort(keys, stable=True),
        cu_copies=counts.cumsum(0) - counts,
    )


def gather_keys(tensor: Tensor, index: KeyIndex) -> Tensor:
    """[N, H, D] -> [K, H, D]: every segment's visible tokens in one piece."""
    gathered: Tensor = _GatherKeys.apply(tensor, index)
    return gathered


class _GatherKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, index: KeyIndex) -> Tensor:
        ctx.index = index
        return tensor[index.keys]

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Each token's copies are a bag of rows: one kernel adds them up in float32, in the order
        of the index, so that the result does not depend on the order in which threads arrive."""
        index: KeyIndex = ctx.index
        rows = grad.reshape(len(grad), -1)
        total = torch.nn.functional.embedding_bag(index.copies, rows, index.cu_copies, mode="sum")
        return total.view(-1, *grad.shape[1:]), None
