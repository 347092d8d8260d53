"""The choice among backends, and the arithmetic around the CUDA kernels, on a CPU."""

from __future__ import annotations

import math
import re
import sys
from types import ModuleType
from typing import get_args

import numpy as np
import pytest
import torch
from attention_cases import (
    VISIBILITIES,
    assert_same_attention,
    dense_attention,
    dense_mask,
    emulate_cuda,
    emulated_flash_backward,
    random_inputs,
    table,
    use_torch_varlen,
    varlen_attn,
)
from torch.nn.attention.flex_attention import flex_attention

from fastrank.attention import backends, merged, varlen
from fastrank.attention.backends import (
    BACKENDS,
    AttentionName,
    LayerProperties,
    attend,
    check_backend,
    choose_attention,
    device_fault,
)
from fastrank.attention.flex import BLOCK, block_mask, blocks, flex_attention_on_pack, padded_size
from fastrank.attention.segments import SegmentTable
from fastrank.attention.varlen import (
    FlashAttn,
    TorchVarlen,
    gather_keys,
    key_index,
    takes_grouped_heads,
    varlen_attention,
)
from fastrank.attention.visibility import FULL, Visibility, ask, recognise

CPU = torch.device("cpu")
VARLEN_LAYOUTS = ["ragged", "blocks", "aligned"]


@pytest.fixture
def torch_kernel(monkeypatch):
    emulate_cuda(monkeypatch)
    use_torch_varlen(monkeypatch)


# ---- varlen -----------------------------------------------------------------------------------


def test_gathered_keys_are_the_sequences():
    segments = table("ragged")
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
    total = gather_keys(values, index).sum()
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(total, values, create_graph=True)


@pytest.mark.parametrize("layout", VARLEN_LAYOUTS)
@pytest.mark.parametrize("visibility", VISIBILITIES[:3], ids=str)
@pytest.mark.parametrize("heads", [(4, 4, 8, 8), (4, 2, 8, 4), (2, 1, 4, 8)])
def test_varlen_equals_the_definition(torch_kernel, layout, visibility, heads):
    segments = table(layout)
    inputs = random_inputs(segments, *heads)
    options = {"visibility": visibility, "scale": 0.3}
    assert_same_attention(
        varlen_attention(*inputs, segments, **options),
        dense_attention(*inputs, segments, **options),
        inputs,
        inputs,
        1e-12,
    )


@pytest.mark.parametrize("grouped", [True, False])
def test_kernels_without_the_option_take_grouped_heads_or_repeated_keys(
    torch_kernel, monkeypatch, grouped
):
    heads = []

    def kernel(query, key, value, *ragged, scale, window_size):
        if not grouped and key.shape[1] != query.shape[1]:
            raise RuntimeError("unequal heads")
        heads.append(key.shape[1])
        return varlen_attn(
            query, key, value, *ragged, scale=scale, window_size=window_size,
            enable_gqa=key.shape[1] != query.shape[1],
        )  # fmt: skip

    without = TorchVarlen(kernel, has_gqa_option=False)
    assert takes_grouped_heads(without, CPU) == grouped
    monkeypatch.setattr(varlen, "torch_varlen", lambda: without)
    segments = table("ragged")
    inputs = random_inputs(segments, 4, 2, 8)
    got = varlen_attention(*inputs, segments)
    assert heads[-1] == (2 if grouped else 4)
    assert_same_attention(got, dense_attention(*inputs, segments), inputs, inputs, 1e-12)


def test_a_kernel_that_mixes_heads_up_gets_repeated_keys():
    def kernel(query, key, value, *_, **options):
        return value.repeat(1, 2, 1)

    assert not takes_grouped_heads(TorchVarlen(kernel, has_gqa_option=False), CPU)


def test_varlen_says_what_it_cannot_do(torch_kernel, monkeypatch):
    segments = table("ragged")
    inputs = random_inputs(segments, 2, 2, 4)
    with pytest.raises(ValueError, match=r"cannot restrict a layer to chunked\(4\)"):
        varlen_attention(*inputs, segments, visibility=Visibility("chunked", 4))
    with pytest.raises(ValueError, match="softcap needs the flash-attn package"):
        varlen_attention(*inputs, segments, softcap=1.0)
    monkeypatch.setattr(varlen, "torch_varlen", lambda: None)
    with pytest.raises(ValueError, match="needs flash-attn or a PyTorch whose varlen_attn"):
        varlen_attention(*inputs, segments)


@pytest.mark.parametrize(
    ("members", "found", "reason"),
    [
        (None, False, "flash-attn is not installed"),
        ({}, False, "flash-attn cannot be imported .cannot import name"),  # flash-attn-4 alone
        ({"flash_attn_varlen_func": print}, True, "flash-attn is installed"),
    ],
)
def test_flash_attn_is_there_if_its_kernel_can_be_imported(monkeypatch, members, found, reason):
    module = None if members is None else ModuleType("flash_attn")
    if module is not None:
        vars(module).update(members)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    got = varlen.flash_attn.__wrapped__()
    assert (got.function is not None) == found and re.match(reason, got.reason)


# ---- flex -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flex_kernel():
    """FlexAttention's graphs, run by plain operators: recompiled where they would be on a GPU."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(flex_attention, dynamic=True, fullgraph=True, backend="eager")


@pytest.mark.parametrize("layout", VARLEN_LAYOUTS)
@pytest.mark.parametrize("visibility", VISIBILITIES, ids=str)
def test_flex_blocks_and_mask_are_those_of_the_dense_mask(layout, visibility):
    segments = table(layout)
    size = padded_size(segments.num_tokens)
    assert size % BLOCK == 0 and 0 < size - segments.num_tokens < 2 * BLOCK
    dense = torch.zeros(size, size, dtype=torch.bool)
    dense[: segments.num_tokens, : segments.num_tokens] = dense_mask(segments, visibility)
    padding = torch.arange(size) >= segments.num_tokens
    index = torch.arange(size)
    place = index - segments.num_tokens
    own = visibility.mask(place[:, None], place[None])
    dense |= padding[:, None] & padding[None] & own
    mask = block_mask(segments, visibility, CPU)
    assert block_mask(segments, visibility, CPU) is mask
    visible = mask.mask_mod(index[:1], index[:1], index[:, None], index[None])
    covered = visibility.covers(segments.longest_sequence)
    assert torch.equal(visible, dense) or covered
    if covered:
        assert torch.equal(visible & ~padding[None], dense & ~padding[None])
    tiles = dense.view(size // BLOCK, BLOCK, size // BLOCK, BLOCK).transpose(1, 2).flatten(2)
    partial, full = blocks(segments, visibility)
    some, every = tiles.any(-1).numpy(), tiles.all(-1).numpy()
    assert np.array_equal(partial | full, some)
    assert not (full & ~every).any() and not (partial & full).any()
    # Only blocks that hold the end of a segment may be full without being listed so.
    borders = {int(o) // BLOCK for o in segments.offsets[1:]}
    for row, column in np.argwhere(every & ~full):
        assert row in borders or column in borders
    assert torch.equal(mask.to_dense()[0, 0].bool(), torch.from_numpy(some)) or covered


@pytest.mark.parametrize("layout", VARLEN_LAYOUTS)
@pytest.mark.parametrize("visibility", VISIBILITIES, ids=str)
@pytest.mark.parametrize("softcap", [None, 0.8])
def test_flex_equals_the_definition(flex_kernel, layout, visibility, softcap):
    segments = table(layout)
    inputs = [t.detach() for t in random_inputs(segments, 2, 1, 16, 8)]
    options = {"visibility": visibility, "softcap": softcap, "scale": 0.2}
    got = flex_attention_on_pack(*inputs, segments, kernel=flex_kernel, **options)
    expected = dense_attention(*inputs, segments, **options)
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


def test_flex_compiles_once_whatever_the_packs_and_windows(flex_kernel, monkeypatch):
    """One graph each without a soft cap, with each soft cap and under another grad mode; past the
    limit it is an error, not a run that materialises all scores."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    torch._dynamo.reset()

    def run(lengths, visibility, **options):
        segments = SegmentTable.from_lengths(lengths)
        inputs = [t.detach() for t in random_inputs(segments, 6, 1, 16)]
        flex_attention_on_pack(
            *inputs, segments, visibility=visibility, kernel=flex_kernel, **options
        )
        return counters["stats"]["unique_graphs"]

    packs = [[(3, [2])], [(100, [28])], [(200, [56])], [(90, [70, 3, 300])], [(5, [3] * 50)]]
    for lengths in packs:
        for visibility in VISIBILITIES:
            assert run(lengths, visibility) == 1
    assert [run(packs[0], FULL, softcap=cap) for cap in (2.0, 3.0)] == [2, 3]
    assert {run(lengths, FULL, softcap=cap) for lengths in packs for cap in (2.0, 3.0)} == {3}
    with torch.no_grad():
        assert run(packs[0], FULL) == 4
    monkeypatch.setattr("fastrank.attention.flex.RECOMPILE_LIMIT", 4)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        run(packs[0], FULL, sinks=torch.ones(6))


def test_flex_sinks_are_one_more_term_of_the_denominator():
    segments = table("ragged")
    inputs = [t.detach() for t in random_inputs(segments, 4, 2, 16, 8)]
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)

    def kernel(query, key, value, *, scale, enable_gqa, block_mask, return_lse, score_mod):
        assert return_lse and enable_gqa and score_mod is None
        index = torch.arange(query.shape[2])
        seen = block_mask.mask_mod(index[:1], index[:1], index[:, None], index[None])
        keys, values = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        logits = (query @ keys.transpose(2, 3) * scale).masked_fill(~seen, -math.inf)
        return logits.softmax(-1) @ values, logits.logsumexp(-1)

    got = flex_attention_on_pack(*inputs, segments, sinks=sinks, kernel=kernel)
    expected = dense_attention(*inputs, segments, sinks=sinks)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


# ---- choice -----------------------------------------------------------------------------------

WINDOWED = LayerProperties(Visibility("sliding", 4), covered=False)


@pytest.mark.parametrize(
    ("device", "dtype", "layer", "name", "reason"),
    [
        ("cpu", torch.float32, LayerProperties(), "cpu", "merged"),
        ("cpu", torch.bfloat16, LayerProperties(sinks=True), "cpu", "merged"),
        ("cpu", torch.float32, WINDOWED, "segmentwise", r"sliding\(4\) is shorter than a sequence"),
        ("cpu", torch.float32, LayerProperties(softcap=True), "segmentwise", "soft-capped"),
        ("cuda", torch.bfloat16, LayerProperties(), "merge", "no prompt copied per response$"),
        ("cuda", torch.bfloat16, WINDOWED, "varlen", "gathered keys; not merge .sliding"),
        ("cuda", torch.bfloat16, LayerProperties(sinks=True), "flex", "attention sinks"),
        ("cuda", torch.bfloat16, LayerProperties(softcap=True), "flex", "flash-attn is absent"),
        ("cuda", torch.bfloat16, LayerProperties(head_size=512), "flex", "larger than 256"),
        ("cuda", torch.float32, LayerProperties(), "flex", "neither float16 nor bfloat16"),
        ("cuda", torch.float64, LayerProperties(), "segmentwise", "flex .float64."),
        ("mps", torch.float32, LayerProperties(), "segmentwise", "every sequence"),
    ],
)
def test_auto_chooses_with_a_reason(torch_kernel, device, dtype, layer, name, reason):
    choice = choose_attention(torch.device(device), dtype, layer)
    assert choice.name == name
    assert re.search(reason, choice.reason), choice.reason


def test_flash_attn_serves_soft_caps(torch_kernel, monkeypatch):
    monkeypatch.setattr(backends, "flash_attn", lambda: FlashAttn(print, ""))
    layer = LayerProperties(softcap=True)
    assert choose_attention(torch.device("cuda"), torch.bfloat16, layer).name == "varlen"


def test_a_device_whose_kernels_fail_or_err_gets_the_next_backend(torch_kernel, monkeypatch):
    def give_way(attention, device):
        return "it fails here: no such kernel" if attention is merged.merged_attention else None

    monkeypatch.setattr(backends, "device_fault", give_way)
    choice = choose_attention(torch.device("cuda"), torch.bfloat16)
    assert choice == ("varlen", choice.reason) and "not merge (it fails here" in choice.reason


def test_a_device_is_tried_forward_and_backward(torch_kernel, monkeypatch):
    attempt = device_fault.__wrapped__
    with torch.inference_mode():
        assert attempt(merged.merged_attention, CPU) is None
    assert attempt(varlen_attention, CPU) is None

    def wrong(*arguments, **options):
        of_query, *rest = emulated_flash_backward(*arguments, **options)
        return of_query * 1.5, *rest

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", wrong)
    assert attempt(merged.merged_attention, CPU).startswith("its results are wrong here")

    def missing(*arguments, **options):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nat line 7")

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", missing)
    reason = attempt(merged.merged_attention, CPU)
    assert reason == "it fails here: FlashAttention only supports Ampere GPUs or newer."


@pytest.mark.parametrize("name", ["merge", "varlen", "flex"])
def test_a_backend_asked_for_by_name_never_falls_back(name):
    segments = table("ragged")
    inputs = [t.detach().float() for t in random_inputs(segments, 2, 2, 4)]
    with pytest.raises(ValueError, match=f"attention='{name}' cannot serve a full layer"):
        attend(*inputs, segments, visibility=FULL, backend=name)
    with pytest.raises(ValueError, match=r"'cpu' cannot serve a sliding\(4\) layer"):
        check_backend("cpu", CPU, torch.float32, WINDOWED)


def test_the_names_of_the_type_are_those_of_the_table():
    auto, names = get_args(AttentionName)
    assert (*get_args(auto), *get_args(names)) == ("auto", *BACKENDS)


@pytest.mark.parametrize("visibility", VISIBILITIES, ids=str)
def test_attend_by_auto_equals_the_definition(visibility):
    segments = table("ragged")
    inputs = random_inputs(segments, 4, 2, 8)
    got = attend(*inputs, segments, visibility=visibility)
    expected = dense_attention(*inputs, segments, visibility=visibility)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


# ---- masks ------------------------------------------------------------------------------------


def test_masks_of_transformers_are_recognised():
    from transformers import masking_utils as masks

    def classify(mask, size):
        return recognise(ask(mask, size, CPU), size)

    left = torch.zeros(1, dtype=torch.long)
    for size in (1, 2, 5, 16):
        sliding = masks.sliding_window_causal_mask_function(size)
        assert classify(sliding, size) == Visibility("sliding", size)
        chunked = masks.chunked_causal_mask_function(size, left)
        # A chunk of one sees itself, as does a window.
        expected = "sliding" if size == 1 else "chunked"
        assert classify(chunked, size) == Visibility(expected, size)
    assert classify(masks.causal_mask_function, None) == FULL
    for mask, size in (
        (masks.bidirectional_mask_function, None),
        (masks.sliding_window_bidirectional_mask_function(5), 5),
        (masks.sliding_window_causal_mask_function(7), 5),
    ):
        with pytest.raises(ValueError, match="another pattern"):
            classify(mask, size)


def test_a_mask_is_asked_on_the_host_and_only_then_on_its_device():
    places = []

    def mask(batch, head, query, key):
        places.append(query.device.type)
        return key <= query

    assert recognise(ask(mask, None, torch.device("meta")), None) == FULL
    assert places == ["cpu"]

    def elsewhere(batch, head, query, key):
        places.append(query.device.type)
        raise RuntimeError("Expected all tensors to be on the same device")

    with pytest.raises(ValueError, match="cannot be evaluated there .Expected all tensors"):
        ask(elsewhere, None, torch.device("meta"))
    assert places == ["cpu", "cpu", "meta"]
