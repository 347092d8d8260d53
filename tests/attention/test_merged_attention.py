"""Merged and segmentwise attention against a dense float64 evaluation of the definition."""

from __future__ import annotations

import pytest
import torch
from architectures import build
from attention_cases import (
    LAYOUTS,
    assert_same_attention,
    dense_attention,
    emulate_cuda,
    random_inputs,
    table,
)
from pack_cases import RAGGED, assert_same_gradients, gradients, random_groups
from torch import Tensor

import fastrank
from fastrank.attention.backends import BACKENDS
from fastrank.attention.flash_parts import _part_index
from fastrank.attention.merged import merged_attention
from fastrank.attention.operator import opaque_attention
from fastrank.attention.segments import SegmentTable
from fastrank.attention.segmentwise import segmentwise_attention
from fastrank.attention.visibility import FULL, Visibility, ask

SHORT = [name for name in LAYOUTS if name not in ("blocks", "aligned")]


@pytest.fixture
def cuda_kernels(monkeypatch):
    emulate_cuda(monkeypatch)


def sink_logits(heads: int) -> Tensor:
    return torch.linspace(-1, 2, heads, dtype=torch.float64).requires_grad_()


def wide(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("layout", SHORT)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("sizes", [(16, 16), (24, 16), (8, 12)])
def test_merge_equals_the_definition(layout, heads, kv_heads, with_sinks, sizes):
    segments = table(layout)
    inputs = random_inputs(segments, heads, kv_heads, *sizes, dtype=torch.float32)
    sinks = [sink_logits(heads)] if with_sinks else []
    exact = wide(inputs)
    assert_same_attention(
        merged_attention(*inputs, segments, sinks=sinks[0] if sinks else None),
        dense_attention(*exact, segments, sinks=sinks[0] if sinks else None),
        [*inputs, *sinks],
        [*exact, *sinks],
        2e-6,
    )


@pytest.mark.parametrize("layout", [*SHORT, "aligned"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("sizes", [(16, 16), (20, 12)])
def test_cuda_merge_equals_the_definition(cuda_kernels, layout, heads, kv_heads, with_sinks, sizes):
    """Held in float64: the kernels are emulated, everything between them is the real thing."""
    segments = table(layout)
    inputs = random_inputs(segments, heads, kv_heads, *sizes)
    sinks = [sink_logits(heads)] if with_sinks else []
    options = {"scale": 0.3, "sinks": sinks[0] if sinks else None}
    assert_same_attention(
        merged_attention(*inputs, segments, **options),
        dense_attention(*inputs, segments, **options),
        [*inputs, *sinks],
        [*inputs, *sinks],
        1e-12,
    )


def test_a_prompt_alone_is_a_view_and_several_are_gathered_once():
    assert _part_index(table("equal")).prompts == slice(0, 8)
    index = _part_index(table("ragged"))
    assert index.prompts.tolist() == [*range(5), 16, *range(28, 45)]
    assert index.queries.tolist() == [0, 5, 16, 17, 28, 45, 46]
    assert index.keys.tolist() == [0, 0, 5, 5, 6, 6, 23]
    assert (index.longest, index.longest_queries, index.longest_keys) == (17, 17, 17)
    assert _part_index(table("nothing shared")).longest_keys == 0


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_model_by_name(cuda_kernels, monkeypatch, model_type):
    """The scores and gradients of segmentwise attention."""
    anywhere = BACKENDS["merge"]._replace(device=None, limits=lambda *_: None, tried=None)
    monkeypatch.setitem(BACKENDS, "merge", anywhere)
    (pack,) = fastrank.pack(random_groups(RAGGED), max_tokens=4096)
    results = {}
    for name in ("segmentwise", "merge"):
        model = build(model_type).double()
        fastrank.prepare_model(model, attention=name)
        scores = model(pack=pack).scores
        weights = torch.linspace(-1.5, 2.0, len(scores))
        results[name] = scores.detach(), gradients(model, scores, weights)
    torch.testing.assert_close(*(results[name][0] for name in results), atol=1e-6, rtol=0)
    assert_same_gradients(results["merge"][1], results["segmentwise"][1], 1e-6)


def test_neighbouring_responses_of_one_length_are_a_run():
    runs = [group.runs for group in table("runs").groups]
    assert runs == [(((4, 6), 2), ((10, 5), 1), ((15, 9), 3)), (((26, 5), 1),), (((34, 10), 2),)]
    assert table("nothing shared").groups[0].runs == ()


@pytest.mark.parametrize(("layout", "kv_heads"), [("ragged", 2), ("runs", 4)])
def test_merge_passes_gradcheck(layout, kv_heads):
    segments = table(layout)
    inputs = (*random_inputs(segments, 4, kv_heads, 6), sink_logits(4))

    def merge(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
        return merged_attention(q, k, v, segments, sinks=s)

    assert torch.autograd.gradcheck(merge, inputs, fast_mode=True)
    segments = SegmentTable.from_lengths([(2, [1, 1, 2]), (1, [1])])
    inputs = (*random_inputs(segments, 2, kv_heads // 2, 2), sink_logits(2))
    assert torch.autograd.gradcheck(merge, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cuda", [False, True])
def test_merge_in_low_precision_is_close_to_one_flash_call(monkeypatch, dtype, cuda):
    if cuda:
        emulate_cuda(monkeypatch)
    segments = table("long")
    inputs = random_inputs(segments, 4, 2, 32, dtype=dtype, seed=8)
    exact = wide(inputs)
    outputs = [
        dense_attention(*exact, segments),
        merged_attention(*inputs, segments),
        segmentwise_attention(*inputs, segments),
    ]
    merge, single = ((out.detach().double() - outputs[0]).abs() for out in outputs[1:])
    assert merge.max() <= 1.5 * single.max() and merge.mean() <= 1.3 * single.mean()
    upstream = torch.randn_like(outputs[0]).to(dtype)
    expected, merge, single = (
        torch.autograd.grad(out, leaves, upstream.to(out.dtype))
        for out, leaves in zip(outputs, (exact, inputs, inputs), strict=True)
    )
    for ours, theirs, reference in zip(merge, single, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours - reference).norm() <= 1.3 * (theirs - reference).norm()


def test_merge_leaves_the_saved_tensors_alone():
    segments = table("ragged")
    inputs = random_inputs(segments, 4, 2, 8, dtype=torch.float32)
    out = merged_attention(*inputs, segments, sinks=sink_logits(4).float())
    first = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(out.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_second_derivative_is_refused():
    segments = table("ragged")
    inputs = random_inputs(segments, 4, 2, 8)
    answers = ask(lambda batch, head, query, key: key <= query, None, torch.device("cpu"))
    loss = merged_attention(*inputs, segments).pow(2).sum()
    with pytest.raises(RuntimeError, match="cannot be differentiated again.*create_graph=True"):
        torch.autograd.grad(loss, inputs, create_graph=True)
    torch.autograd.grad(loss, inputs)
    opaque = opaque_attention(
        *inputs, segments, mask_answers=answers, local_size=None, scale=None, softcap=None,
        sinks=None, backend="auto",
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(opaque.pow(2).sum(), inputs, create_graph=True)


@pytest.mark.parametrize("layout", ["ragged", "equal", "runs", "long"])
@pytest.mark.parametrize(
    "visibility",
    [
        FULL,
        *(Visibility("sliding", size) for size in (1, 4, 40)),
        *(Visibility("chunked", size) for size in (3, 64)),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("softcap", "with_sinks", "fused"),
    [(None, False, True), (None, False, False), (0.7, False, True), (0.7, True, True)],
)
def test_segmentwise_equals_the_definition(layout, visibility, softcap, with_sinks, fused):
    segments = table(layout)
    inputs = random_inputs(segments, 6, 2, 16, 24)
    sinks = [sink_logits(6)] if with_sinks else []
    options = {
        "visibility": visibility, "softcap": softcap, "sinks": sinks[0] if sinks else None,
    }  # fmt: skip
    leaves = [*inputs, *sinks]
    assert_same_attention(
        segmentwise_attention(*inputs, segments, fused=fused, **options),
        dense_attention(*inputs, segments, **options),
        leaves,
        leaves,
        1e-12,
    )
