"""Layouts, inputs and plain definitions that the attention tests share."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastrank.attention import backends, merged, varlen
from fastrank.attention.flash_parts import cuda_backward, cuda_forward
from fastrank.attention.segments import SegmentTable
from fastrank.attention.varlen import FlashAttn, TorchVarlen
from fastrank.attention.visibility import FULL, Visibility

LAYOUTS = {
    "ragged": [(5, [3, 1, 7]), (1, [2, 9]), (17, [1])],
    "equal": [(8, [4, 4, 4, 4])],
    "runs": [(4, [3, 3, 5, 3, 3, 3]), (2, [5]), (3, [5, 5])],
    "long": [(70, [33, 5]), (3, [65])],
    "blocks": [(256, [128, 130, 5]), (130, [300]), (3, [2, 2])],
    "aligned": [(128, [128, 128])],
    "bare prompts": [(3, []), (4, [2, 3]), (6, [])],
    "nothing shared": [(3, []), (5, [])],
}
VISIBILITIES = [
    FULL,
    *(Visibility("sliding", size) for size in (4, 150)),
    Visibility("chunked", 96),
]


def table(layout: str) -> SegmentTable:
    return SegmentTable.from_lengths(LAYOUTS[layout])


def random_inputs(
    segments: SegmentTable,
    heads: int,
    kv_heads: int,
    size: int,
    value_size: int | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> list[Tensor]:
    """Query, key and value, [1, H, N, D] in memory order [N, H, D], as projections leave them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads, size), (kv_heads, size), (kv_heads, value_size or size)]
    return [
        torch.randn(1, segments.num_tokens, *shape, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .transpose(1, 2)
        .requires_grad_()
        for shape in shapes
    ]


def dense_mask(segments: SegmentTable, visibility: Visibility = FULL) -> Tensor:
    """bool [N, N], written token by token."""
    ids, positions = segments.segment_ids, segments.position_ids
    parents = segments.parents.long()[ids]
    seen = (ids[:, None] == ids[None, :]) | (parents[:, None] == ids[None, :])
    return seen & visibility.mask(positions[:, None], positions[None, :])


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: SegmentTable,
    *,
    visibility: Visibility = FULL,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The definition: softmax under the dense mask."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = query @ key.transpose(2, 3) * (scale or query.shape[-1] ** -0.5)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~dense_mask(segments, visibility), -math.inf)
    if sinks is not None:
        column = sinks[None, :, None, None].expand(1, -1, logits.shape[2], 1)
        logits = torch.cat((logits, column), -1)
    return (logits.softmax(-1)[..., : key.shape[2]] @ value).transpose(1, 2)


def assert_same_attention(
    got: Tensor, expected: Tensor, leaves: list[Tensor], exact: list[Tensor], tolerance: float
) -> None:
    """Outputs, and gradients for an upstream gradient that differs by token, head and size."""
    assert got.shape == expected.shape and got.dtype == leaves[0].dtype
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=0)
    upstream = torch.randn_like(expected) * torch.rand_like(expected[..., :1]) * 3
    for ours, theirs in zip(
        torch.autograd.grad(got, leaves, upstream.to(got.dtype)),
        torch.autograd.grad(expected, exact, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), theirs, atol=10 * tolerance, rtol=10 * tolerance)


# ---- PyTorch's CUDA flash kernels, as they behave on ragged segments -------------------------


def _segments(
    query: Tensor, key: Tensor, cu_queries: Tensor, cu_keys: Tensor, causal: bool, left: int
):
    """Rows, columns and mask of each segment; queries are aligned with the end of the keys."""
    for s in range(len(cu_queries) - 1):
        rows, columns = slice(*cu_queries[s : s + 2]), slice(*cu_keys[s : s + 2])
        num_rows, num_columns = query[rows].shape[0], key[columns].shape[0]
        row = torch.arange(num_rows)[:, None] + num_columns - num_rows
        column = torch.arange(num_columns)[None]
        seen = torch.ones(num_rows, num_columns, dtype=torch.bool)
        if causal:
            seen &= column <= row
        if left >= 0:
            seen &= column >= row - left
        yield rows, columns, seen


def _check(query: Tensor, key: Tensor, value: Tensor, *ragged) -> None:
    cu_queries, cu_keys, max_queries, max_keys = ragged
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] and query.shape[-1] % 8 == 0
    assert all(tensor.stride(-1) == 1 for tensor in (query, key, value))
    assert cu_queries.dtype == cu_keys.dtype == torch.int32
    assert int(cu_queries[-1]) == len(query) and int(cu_keys[-1]) == len(key)
    assert int(cu_queries.diff().max()) <= max_queries and int(cu_keys.diff().max()) <= max_keys


def _widened(*tensors: Tensor) -> list[Tensor]:
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def emulated_flash(
    query, key, value, cu_queries, cu_keys, max_queries, max_keys, dropout, causal, debug, *,
    scale, window_size_left=-1,
):  # fmt: skip
    """``aten::_flash_attention_forward`` on [N, H, D]: zeros and +inf for queries without keys. In
    low precision it computes in float32, and gives its log-sum-exp so."""
    _check(query, key, value, cu_queries, cu_keys, max_queries, max_keys)
    assert dropout == 0.0 and not debug
    dtype = query.dtype
    query, key, value = _widened(query, key, value)
    groups = query.shape[1] // key.shape[1]
    out = torch.zeros_like(query)
    lse = query.new_full((query.shape[1], len(query)), math.inf)
    for rows, columns, seen in _segments(query, key, cu_queries, cu_keys, causal, window_size_left):
        if columns.start == columns.stop:
            continue
        k, v = (t[columns].repeat_interleave(groups, 1) for t in (key, value))
        logits = torch.einsum("qhd,khd->hqk", query[rows], k) * scale
        logits = logits.masked_fill(~seen, -math.inf)
        lse[:, rows] = logits.logsumexp(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v)
    return out.to(dtype), lse, None, None, None


def emulated_flash_backward(
    grad, query, key, value, out, lse, cu_queries, cu_keys, max_queries, max_keys, dropout,
    causal, random_state, unused, *, scale, window_size_left=-1,
):  # fmt: skip
    """``aten::_flash_attention_backward``: the kernel's own formulas, on the output and log-sum-exp
    that it is given."""
    _check(query, key, value, cu_queries, cu_keys, max_queries, max_keys)
    assert (
        grad.stride(-1) == 1 and lse.is_contiguous() and lse.shape == (query.shape[1], len(query))
    )
    assert grad.dtype == out.dtype == query.dtype and lse.dtype != torch.bfloat16
    dtype = query.dtype
    grad, query, key, value, out = _widened(grad, query, key, value, out)
    groups = query.shape[1] // key.shape[1]
    grads = [torch.zeros_like(t) for t in (query, key, value)]
    delta = (grad * out).sum(-1).t()[..., None]  # [H, N, 1]
    for rows, columns, seen in _segments(query, key, cu_queries, cu_keys, causal, window_size_left):
        q, g = query[rows], grad[rows]
        k, v = (t[columns].repeat_interleave(groups, 1) for t in (key, value))
        logits = torch.einsum("qhd,khd->hqk", q, k) * scale
        p = torch.exp(logits - lse[:, rows, None]).masked_fill(~seen, 0)
        ds = p * (torch.einsum("qhd,khd->hqk", g, v) - delta[:, rows]) * scale
        grads[0][rows] += torch.einsum("hqk,khd->qhd", ds, k)
        for total, part in (
            (grads[1], torch.einsum("hqk,qhd->khd", ds, q)),
            (grads[2], torch.einsum("hqk,qhd->khd", p, g)),
        ):
            total[columns] += part.unflatten(1, (-1, groups)).sum(2)
    return tuple(total.to(dtype) for total in grads)


class _Varlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, ragged, scale, left):
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, *ragged, 0.0, True, False, scale=scale, window_size_left=left
        )
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.rest = ragged, scale, left
        return out

    @staticmethod
    def backward(ctx, grad):
        ragged, scale, left = ctx.rest
        state = torch.empty(2, dtype=torch.uint64, device=grad.device)
        grads = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), *ctx.saved_tensors, *ragged, 0.0, True, state, state,
            scale=scale, window_size_left=left,
        )  # fmt: skip
        return *grads, None, None, None


def varlen_attn(query, key, value, *ragged, scale, window_size, enable_gqa=False):
    """PyTorch's function of this name, which is its two flash operators."""
    assert enable_gqa == (query.shape[1] != key.shape[1]) and window_size[1] == 0
    return _Varlen.apply(query, key, value, ragged, scale, window_size[0])


def use_torch_varlen(monkeypatch) -> None:
    """PyTorch's variable-length kernel is there and flash-attn is not; no device needs a try."""
    found = TorchVarlen(varlen_attn, has_gqa_option=True)
    for module in (varlen, backends):
        monkeypatch.setattr(module, "flash_attn", lambda: FlashAttn(None, "flash-attn is absent"))
        monkeypatch.setattr(module, "torch_varlen", lambda: found)
    monkeypatch.setattr(backends, "device_fault", lambda *_: None)


def emulate_cuda(monkeypatch) -> None:
    """CPU tensors take the merge's CUDA branch, and the flash operators are the above."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", emulated_flash)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", emulated_flash_backward)
    monkeypatch.setattr(merged, "cpu_forward", cuda_forward)
    monkeypatch.setattr(merged, "cpu_backward", cuda_backward)
    monkeypatch.setattr(merged, "_HEAD_MULTIPLE", {"cpu": 8})


# ---- counting ---------------------------------------------------------------------------------

_VIEWS = {
    "view", "_unsafe_view", "transpose", "t", "unsqueeze", "squeeze", "select", "slice", "expand",
    "as_strided", "detach", "alias", "permute", "split", "unbind", "empty", "empty_like",
    "new_empty", "lift_fresh",
}  # fmt: skip


class DeviceTraffic(TorchDispatchMode):
    """Counts what a run on ``meta`` would ask of a device.

    A meta tensor has no values, so that whatever needs them (``.item()``, ``nonzero``, a copy to
    the host) fails by itself: a run that ends is one without such synchronisations.

    Attributes:
        launches: operators that compute something on the device.
        blocking: copies to the device that wait for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []
        self.blocking: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        made = out[0] if isinstance(out, tuple | list) and out else out
        if isinstance(made, Tensor) and made.device.type == "meta":
            source = args[1] if name == "copy_" else args[0] if args else None
            from_host = isinstance(source, Tensor) and source.device.type == "cpu" and source.dim()
            if name in ("_to_copy", "copy_") and from_host:
                waits = not (kwargs.get("non_blocking") or (name == "copy_" and True in args[2:]))
                if waits:
                    self.blocking.append(name)
            elif name not in _VIEWS:
                self.launches.append(name)
        return out
