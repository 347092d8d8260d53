"""The CUDA backends' index arithmetic on a CPU, and the choice among backends."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from fastrank.attention import varlen
from fastrank.attention.adapter import attend
from fastrank.attention.backends import BACKENDS, LayerProperties, check_backend, choose_attention
from fastrank.attention.flex import BLOCK, block_mask, blocks, flex_attention_on_pack, mask_mod
from fastrank.attention.gather import gather_keys, key_index
from fastrank.attention.segments import SegmentTable
from fastrank.attention.segmentwise import segmentwise_attention
from fastrank.attention.visibility import FULL, Visibility, classify

CPU = torch.device("cpu")
LAYOUTS = {
    "ragged": [(5, [3, 1, 7]), (1, [2, 9]), (17, [1])],
    "blocks": [(256, [128, 130, 5]), (130, [300]), (3, [2, 2])],
    "aligned": [(128, [128, 128])],
}
VISIBILITIES = [
    FULL,
    Visibility("sliding", 4),
    Visibility("sliding", 150),
    Visibility("chunked", 96),
]


def tensors(segments: SegmentTable, heads: int, kv_heads: int, size: int, value_size: int):
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, size), (kv_heads, size), (kv_heads, value_size)]
    return [
        torch.randn(1, segments.num_tokens, *shape, generator=generator, dtype=torch.float64)
        .transpose(1, 2)
        .requires_grad_()
        for shape in shapes
    ]


def test_gathered_keys_are_the_sequences():
    segments = SegmentTable.from_lengths(LAYOUTS["ragged"])
    index = key_index(segments, CPU)
    assert key_index(segments, CPU) is index
    offsets = index.cu_keys.tolist()
    expected = []
    for group in segments.groups:
        prompt = list(range(group.prompt.start, group.prompt.stop))
        expected.append(prompt)
        expected += [prompt + list(range(r.start, r.stop)) for r in group.responses]
    found = [index.keys[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    assert found == expected
    assert index.cu_queries.tolist() == segments.offsets.tolist()
    assert (index.max_queries, index.max_keys) == (17, 18)
    values = torch.randn(segments.num_tokens, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: gather_keys(v, index), values)


def emulated_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    max_queries: int,
    max_keys: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """What the flash kernels compute: each segment by itself, aligned at its end."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    parts = []
    for s in range(len(cu_queries) - 1):
        q = query[cu_queries[s] : cu_queries[s + 1]].transpose(0, 1)
        k, v = (t[cu_keys[s] : cu_keys[s + 1]].transpose(0, 1) for t in (key, value))
        assert q.shape[1] <= max_queries and k.shape[1] <= max_keys
        row = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        column = torch.arange(k.shape[1])[None]
        seen = column <= row + window_size[1]
        if window_size[0] >= 0:
            seen &= column >= row - window_size[0]
        logits = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -math.inf)
        parts.append((logits.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("visibility", VISIBILITIES[:3], ids=str)
@pytest.mark.parametrize("heads", [(4, 4, 8, 8), (4, 2, 8, 4), (2, 1, 4, 8)])
def test_varlen_arguments_equal_segmentwise(monkeypatch, layout, visibility, heads):
    monkeypatch.setattr(varlen, "torch_varlen", lambda: emulated_varlen)
    monkeypatch.setattr(varlen, "flash_attn_installed", lambda: False)
    segments = SegmentTable.from_lengths(LAYOUTS[layout])
    inputs = tensors(segments, *heads)
    got = varlen.varlen_attention(*inputs, segments, visibility=visibility, scale=0.3)
    expected = segmentwise_attention(*inputs, segments, visibility=visibility, scale=0.3)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    upstream = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(got, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


def test_varlen_says_what_it_cannot_do(monkeypatch):
    segments = SegmentTable.from_lengths(LAYOUTS["ragged"])
    inputs = tensors(segments, 2, 2, 4, 4)
    with pytest.raises(ValueError, match=r"cannot restrict a layer to chunked\(4\)"):
        varlen.varlen_attention(*inputs, segments, visibility=Visibility("chunked", 4))
    monkeypatch.setattr(varlen, "flash_attn_installed", lambda: False)
    with pytest.raises(ValueError, match="softcap needs the flash-attn package"):
        varlen.varlen_attention(*inputs, segments, softcap=1.0)
    monkeypatch.setattr(varlen, "torch_varlen", lambda: None)
    with pytest.raises(ValueError, match="needs flash-attn or a PyTorch whose varlen_attn"):
        varlen.varlen_attention(*inputs, segments)


def dense_mask(segments: SegmentTable, visibility: Visibility) -> Tensor:
    ids, positions = segments.segment_ids, segments.position_ids
    parents = segments.parents.long()[ids]
    seen = (ids[:, None] == ids[None]) | (parents[:, None] == ids[None])
    return seen & visibility.mask(positions[:, None], positions[None])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("visibility", VISIBILITIES, ids=str)
def test_flex_blocks_and_mask_are_those_of_the_dense_mask(layout, visibility):
    segments = SegmentTable.from_lengths(LAYOUTS[layout])
    size = -(-segments.num_tokens // BLOCK) * BLOCK
    dense = torch.zeros(size, size, dtype=torch.bool)
    dense[: segments.num_tokens, : segments.num_tokens] = dense_mask(segments, visibility)
    padding = torch.arange(size) >= segments.num_tokens
    index = torch.arange(size)
    place = index - segments.num_tokens
    own = visibility.mask(place[:, None], place[None])
    dense |= padding[:, None] & padding[None] & own
    visible = mask_mod(segments, visibility, CPU)(index[:1], index[:1], index[:, None], index[None])
    assert torch.equal(visible, dense)
    tiles = dense.view(size // BLOCK, BLOCK, size // BLOCK, BLOCK).transpose(1, 2).flatten(2)
    partial, full = blocks(segments, visibility)
    some, every = tiles.any(-1).numpy(), tiles.all(-1).numpy()
    assert np.array_equal(partial | full, some)
    assert not (full & ~every).any() and not (partial & full).any()
    # Only blocks that hold the end of a segment may be full without being listed so.
    borders = {int(o) // BLOCK for o in segments.offsets[1:-1]}
    for row, column in np.argwhere(every & ~full):
        assert row in borders or column in borders
    mask = block_mask(segments, visibility, CPU)
    assert block_mask(segments, visibility, CPU) is mask
    assert torch.equal(mask.to_dense()[0, 0].bool(), torch.from_numpy(some))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("visibility", VISIBILITIES, ids=str)
@pytest.mark.parametrize("softcap", [None, 0.8])
def test_flex_arguments_equal_segmentwise(layout, visibility, softcap):
    segments = SegmentTable.from_lengths(LAYOUTS[layout])
    inputs = [t.detach() for t in tensors(segments, 2, 1, 16, 8)]
    options = {"visibility": visibility, "softcap": softcap, "scale": 0.2}
    got = flex_attention_on_pack(*inputs, segments, kernel=flex_attention, **options)
    expected = segmentwise_attention(*inputs, segments, **options)
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


def test_flex_sinks_are_one_more_term_of_the_denominator():
    segments = SegmentTable.from_lengths(LAYOUTS["ragged"])
    inputs = [t.detach() for t in tensors(segments, 4, 2, 16, 8)]
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)

    def kernel(query, key, value, *, scale, enable_gqa, block_mask, return_lse, score_mod):
        assert return_lse and enable_gqa and score_mod is None
        index = torch.arange(query.shape[2])
        seen = block_mask.mask_mod(index[:1], index[:1], index[:, None], index[None])
        keys, values = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        logits = (query @ keys.transpose(2, 3) * scale).masked_fill(~seen, -math.inf)
        return logits.softmax(-1) @ values, logits.logsumexp(-1)

    got = flex_attention_on_pack(*inputs, segments, sinks=sinks, kernel=kernel)
    expected = segmentwise_attention(*inputs, segments, sinks=sinks)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


WINDOWED = LayerProperties(Visibility("sliding", 4), covered=False)


@pytest.mark.parametrize(
    ("device", "dtype", "layer", "name", "reason"),
    [
        ("cpu", torch.float32, LayerProperties(), "cpu", "merged"),
        ("cpu", torch.bfloat16, LayerProperties(sinks=True), "cpu", "merged"),
        ("cpu", torch.float32, WINDOWED, "segmentwise", r"sliding\(4\) is shorter than a sequence"),
        ("cpu", torch.float32, LayerProperties(softcap=True), "segmentwise", "soft-capped"),
        ("cuda", torch.bfloat16, LayerProperties(), "varlen", "gathered keys"),
        ("cuda", torch.bfloat16, WINDOWED, "varlen", "gathered keys"),
        ("cuda", torch.bfloat16, LayerProperties(sinks=True), "flex", "attention sinks"),
        ("cuda", torch.bfloat16, LayerProperties(head_size=512), "flex", "larger than 256"),
        ("cuda", torch.float32, LayerProperties(), "flex", "neither float16 nor bfloat16"),
        ("cuda", torch.float64, LayerProperties(), "segmentwise", "flex .float64."),
        ("mps", torch.float32, LayerProperties(), "segmentwise", "every sequence"),
    ],
)
def test_auto_chooses_with_a_reason(monkeypatch, device, dtype, layer, name, reason):
    import fastrank.attention.backends as module

    monkeypatch.setattr(module, "flash_attn_installed", lambda: False)
    monkeypatch.setattr(module, "torch_varlen", lambda: emulated_varlen)
    choice = choose_attention(torch.device(device), dtype, layer)
    assert choice.name == name
    assert __import__("re").search(reason, choice.reason), choice.reason


def test_flash_attn_serves_soft_caps(monkeypatch):
    import fastrank.attention.backends as module

    monkeypatch.setattr(module, "flash_attn_installed", lambda: True)
    layer = LayerProperties(softcap=True)
    assert choose_attention(torch.device("cuda"), torch.bfloat16, layer).name == "varlen"


@pytest.mark.parametrize("name", ["varlen", "flex"])
def test_a_backend_asked_for_by_name_never_falls_back(name):
    segments = SegmentTable.from_lengths(LAYOUTS["ragged"])
    inputs = [t.detach().float() for t in tensors(segments, 2, 2, 4, 4)]
    with pytest.raises(ValueError, match=f"attention='{name}' cannot serve a full layer"):
        attend(*inputs, segments, visibility=FULL, backend=name)
    with pytest.raises(ValueError, match=r"'cpu' cannot serve a sliding\(4\) layer"):
        check_backend("cpu", CPU, torch.float32, WINDOWED)
    assert set(BACKENDS) == {"cpu", "varlen", "flex", "segmentwise"}


@pytest.mark.parametrize("visibility", VISIBILITIES, ids=str)
def test_attend_by_auto_equals_segmentwise(visibility):
    segments = SegmentTable.from_lengths(LAYOUTS["ragged"])
    inputs = tensors(segments, 4, 2, 8, 8)
    got = attend(*inputs, segments, visibility=visibility)
    expected = segmentwise_attention(*inputs, segments, visibility=visibility, fused=False)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_masks_of_transformers_are_recognised():
    from transformers import masking_utils as masks

    left = torch.zeros(1, dtype=torch.long)
    for size in (1, 2, 5, 16):
        sliding = masks.sliding_window_causal_mask_function(size)
        assert classify(sliding, size, CPU) == Visibility("sliding", size)
        chunked = masks.chunked_causal_mask_function(size, left)
        expected = (
            "sliding" if size == 1 else "chunked"
        )  # a chunk of one sees itself, as does a window
        assert classify(chunked, size, CPU) == Visibility(expected, size)
    assert classify(masks.causal_mask_function, None, CPU) == FULL
    for mask, size in (
        (masks.bidirectional_mask_function, None),
        (masks.sliding_window_bidirectional_mask_function(5), 5),
        (masks.sliding_window_causal_mask_function(7), 5),
    ):
        with pytest.raises(ValueError, match="another pattern"):
            classify(mask, size, CPU)
