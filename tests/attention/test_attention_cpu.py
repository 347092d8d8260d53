"""The merged CPU attention against a dense float64 evaluation of the definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastrank.attention.cpu import merged_attention
from fastrank.attention.segments import SegmentTable
from fastrank.attention.segmentwise import segmentwise_attention
from fastrank.attention.visibility import FULL, Visibility

LAYOUTS = {
    "ragged": [(5, [3, 1, 7]), (1, [2, 9]), (17, [1])],
    "equal": [(8, [4, 4, 4, 4])],
    "runs": [(4, [3, 3, 5, 3, 3, 3]), (2, [5]), (3, [5, 5])],
    "long": [(70, [33, 5]), (3, [65])],
}


def dense_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: SegmentTable,
    visibility: Visibility,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Softmax under a dense [N, N] mask that is written token by token."""
    ids, positions = segments.segment_ids, segments.position_ids
    parents = segments.parents.long()[ids]
    own = ids[:, None] == ids[None, :]
    prompt = parents[:, None] == ids[None, :]
    seen = (own | prompt) & visibility.mask(positions[:, None], positions[None, :])
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~seen, -math.inf)
    if sinks is not None:
        column = sinks[None, :, None, None].expand(1, -1, logits.shape[2], 1)
        logits = torch.cat((logits, column), -1)
    return (logits.softmax(-1)[..., : key.shape[2]] @ value).transpose(1, 2)


def make(layout: str, heads: int, kv_heads: int, sizes: tuple[int, int], dtype: torch.dtype):
    generator = torch.Generator().manual_seed(len(layout) + heads)
    segments = SegmentTable.from_lengths(LAYOUTS[layout])
    shapes = [(heads, sizes[0]), (kv_heads, sizes[0]), (kv_heads, sizes[1])]
    # Memory order [N, H, D], as a model's projections leave it.
    tensors = [
        torch.randn(1, segments.num_tokens, *shape, generator=generator, dtype=torch.float64)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for shape in shapes
    ]
    sinks = torch.randn(heads, generator=generator, dtype=torch.float64).requires_grad_()
    return segments, tensors, sinks


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("sizes", [(16, 16), (24, 16), (8, 12)])
def test_merge_equals_the_definition(layout, heads, kv_heads, with_sinks, sizes):
    segments, tensors, sinks = make(layout, heads, kv_heads, sizes, torch.float32)
    inputs = [t.detach().double().requires_grad_() for t in tensors]
    used_sinks = sinks if with_sinks else None
    expected = dense_reference(*inputs, segments, FULL, None, used_sinks)
    got = merged_attention(*tensors, segments, sinks=used_sinks)
    assert got.shape == expected.shape and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=0)
    upstream = torch.randn_like(expected) * torch.rand_like(expected[..., :1]) * 3
    wanted = [*inputs, sinks] if with_sinks else inputs
    leaves = [*tensors, sinks] if with_sinks else tensors
    for a, b in zip(
        torch.autograd.grad(got, leaves, upstream.float()),
        torch.autograd.grad(expected, wanted, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def test_neighbouring_responses_of_one_length_are_a_run():
    segments = SegmentTable.from_lengths(LAYOUTS["runs"])
    runs = [group.runs for group in segments.groups]
    assert runs == [(((4, 6), 2), ((10, 5), 1), ((15, 9), 3)), (((26, 5), 1),), (((34, 10), 2),)]
    assert SegmentTable.from_lengths([(3, [])]).groups[0].runs == ()


@pytest.mark.parametrize(("layout", "kv_heads"), [("ragged", 2), ("runs", 4)])
def test_merge_in_float64_passes_gradcheck(layout, kv_heads):
    segments, tensors, sinks = make(layout, 4, kv_heads, (6, 6), torch.float64)
    assert torch.autograd.gradcheck(
        lambda q, k, v, s: merged_attention(q, k, v, segments, sinks=s), (*tensors, sinks)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merge_in_low_precision_is_close_to_one_flash_call(dtype):
    segments, tensors, _ = make("long", 4, 2, (32, 32), dtype)
    exact = dense_reference(*[t.double() for t in tensors], segments, FULL, None, None)
    merged = (merged_attention(*tensors, segments).double() - exact).abs()
    single = (segmentwise_attention(*tensors, segments).double() - exact).abs()
    assert merged.max() <= 1.5 * single.max() and merged.mean() <= 1.3 * single.mean()


def test_merge_leaves_the_saved_tensors_alone():
    segments, tensors, sinks = make("ragged", 4, 2, (8, 8), torch.float32)
    out = merged_attention(*tensors, segments, sinks=sinks.float())
    first = torch.autograd.grad(out.sum(), tensors, retain_graph=True)
    second = torch.autograd.grad(out.sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


VISIBILITIES = [
    FULL,
    Visibility("sliding", 1),
    Visibility("sliding", 4),
    Visibility("sliding", 40),
    Visibility("chunked", 3),
    Visibility("chunked", 64),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("visibility", VISIBILITIES, ids=str)
@pytest.mark.parametrize(
    ("softcap", "with_sinks", "fused"),
    [(None, False, True), (None, False, False), (0.7, False, True), (0.7, True, True)],
)
def test_paths_equal_the_definition(layout, visibility, softcap, with_sinks, fused):
    segments, tensors, sinks = make(layout, 6, 2, (16, 24), torch.float64)
    used = sinks if with_sinks else None
    expected = dense_reference(*tensors, segments, visibility, softcap, used)
    options = {"visibility": visibility, "softcap": softcap, "sinks": used, "fused": fused}
    got = segmentwise_attention(*tensors, segments, **options)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    upstream = torch.randn_like(expected)
    leaves = [*tensors, sinks] if with_sinks else tensors
    for a, b in zip(
        torch.autograd.grad(got, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-10)
