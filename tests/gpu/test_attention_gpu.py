"""The CUDA backends against the segmentwise reference, and prepared models on a GPU."""

from __future__ import annotations

import pytest
import torch
from architectures import build
from attention_cases import LAYOUTS as SHORT
from attention_cases import VISIBILITIES, random_inputs
from pack_cases import RAGGED, gradients, random_groups, separate_scores
from torch import Tensor

import fastrank
from fastrank.attention.backends import LayerProperties, attend, choose_attention, device_fault
from fastrank.attention.merged import merged_attention
from fastrank.attention.segments import SegmentTable
from fastrank.attention.segmentwise import segmentwise_attention
from fastrank.attention.varlen import flash_attn, gather_keys, key_index, varlen_attention
from fastrank.attention.visibility import FULL, Visibility

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")

LAYOUTS = {
    "ragged": SHORT["ragged"],
    "long": [(300, [128, 131, 5, 257]), (130, [300]), (3, [2, 2]), (513, [64] * 9)],
    "one group": [(300, [128, 131, 5, 257])],
    "bare prompts": SHORT["bare prompts"],
}


def make(segments: SegmentTable, heads: int, kv_heads: int, size: int, dtype: torch.dtype):
    return random_inputs(segments, heads, kv_heads, size, dtype=dtype, device=CUDA)


def compare(inputs: list[Tensor], segments: SegmentTable, backend: str, **options: object) -> None:
    """Value and gradients: at most twice as far from float64 as segmentwise."""
    dtype = inputs[0].dtype
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    exact_options = {
        k: v.detach().double() if isinstance(v, Tensor) else v for k, v in options.items()
    }
    exact = segmentwise_attention(*exact_inputs, segments, fused=False, **exact_options)
    upstream = torch.randn_like(exact) * torch.rand_like(exact[..., :1]) * 2
    expected = [exact, *torch.autograd.grad(exact, exact_inputs, upstream)]

    def run(function) -> list[Tensor]:
        out = function()
        return [out, *torch.autograd.grad(out, inputs, upstream.to(dtype))]

    plain = run(lambda: segmentwise_attention(*inputs, segments, **options))
    found = run(lambda: attend(*inputs, segments, backend=backend, **options))
    for ours, theirs, reference in zip(found, plain, expected, strict=True):
        assert ours.dtype == dtype and ours.shape == reference.shape
        own = (ours.double() - reference).norm()
        assert own <= 2 * (theirs.double() - reference).norm() + 1e-6 * reference.norm()


HEADS = [(8, 8, 64), (8, 2, 128), (8, 2, 44), (4, 1, 20)]  # the last two: padded to 48 and 24


def test_the_kernels_are_found_to_work_here():
    """Else every test below would be of the fallbacks."""
    for attention in (merged_attention, varlen_attention):
        assert device_fault(attention, CUDA) is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merge(layout, heads, dtype):
    segments = SegmentTable.from_lengths(LAYOUTS[layout])
    compare(make(segments, *heads, dtype), segments, "merge", visibility=FULL)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("visibility", VISIBILITIES[:3], ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_varlen(layout, visibility, heads, dtype):
    segments = SegmentTable.from_lengths(LAYOUTS[layout])
    compare(make(segments, *heads, dtype), segments, "varlen", visibility=visibility)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("visibility", VISIBILITIES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_flex(layout, visibility, dtype):
    segments = SegmentTable.from_lengths(LAYOUTS[layout])
    compare(make(segments, 8, 2, 64, dtype), segments, "flex", visibility=visibility)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flex_with_softcap_and_with_sinks(layout):
    segments = SegmentTable.from_lengths(LAYOUTS[layout])
    inputs = make(segments, 8, 2, 64, torch.bfloat16)
    compare(inputs, segments, "flex", visibility=FULL, softcap=2.0)
    sinks = torch.linspace(-1, 2, 8, device=CUDA)
    compare(inputs, segments, "flex", visibility=Visibility("sliding", 4), sinks=sinks)


def test_flex_compiles_once_for_packs_of_changing_length():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        lengths = torch.randint(1, 300, (4,), generator=generator).tolist()
        segments = SegmentTable.from_lengths([(lengths[0], lengths[1:])])
        inputs = make(segments, 4, 2, 64, torch.bfloat16)
        attend(*inputs, segments, visibility=FULL, backend="flex").sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.skipif(flash_attn().function is None, reason="flash-attn is not installed")
def test_flash_attn_with_softcap():
    segments = SegmentTable.from_lengths(LAYOUTS["long"])
    inputs = make(segments, 8, 2, 64, torch.bfloat16)
    compare(inputs, segments, "varlen", visibility=FULL, softcap=5.0)


def test_auto_in_bfloat16():
    layer = LayerProperties.of(FULL, 100)
    assert choose_attention(CUDA, torch.bfloat16, layer).name == "merge"
    layer = LayerProperties.of(Visibility("sliding", 50), 100)
    assert choose_attention(CUDA, torch.bfloat16, layer).name == "varlen"


@pytest.mark.parametrize("backend", ["merge", "varlen"])
def test_nothing_waits_for_the_device(backend):
    segments = SegmentTable.from_lengths(LAYOUTS["long"])
    inputs = make(segments, 8, 2, 64, torch.bfloat16)
    upstream = torch.randn(1, segments.num_tokens, 8, 64, device=CUDA, dtype=torch.bfloat16)
    choose_attention(CUDA, torch.bfloat16)  # has tried the device
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = attend(*inputs, segments, visibility=FULL, backend=backend)
        torch.autograd.grad(out, inputs, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gathered_gradients_are_deterministic():
    segments = SegmentTable.from_lengths(LAYOUTS["long"])
    rows = make(segments, 8, 2, 64, torch.bfloat16)[1][0].transpose(0, 1)
    index = key_index(segments, rows.device)
    upstream = torch.randn_like(gather_keys(rows, index))
    first, *others = (
        torch.autograd.grad(gather_keys(rows, index), rows, upstream)[0] for _ in range(5)
    )
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "gpt_oss", "llama4_text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_by_auto(model_type, dtype):
    model = build(model_type, head_dim=16).to(CUDA, dtype)
    exact = build(model_type, head_dim=16)
    groups = random_groups(RAGGED)
    expected = separate_scores(exact, groups)
    weights = torch.linspace(-1.5, 2.0, len(expected))
    reference = gradients(exact, expected, weights)
    own = separate_scores(model, groups)
    own_gradients = gradients(model, own, weights.to(CUDA))
    fastrank.prepare_model(model)
    (pack,) = fastrank.pack(groups, max_tokens=4096)
    scores = model(pack=pack.to(CUDA)).scores
    found = gradients(model, scores, weights.to(CUDA))

    def error(values: Tensor, target: Tensor) -> float:
        return float((values.detach().cpu().double() - target.double()).norm())

    slack = 1e-5 if dtype == torch.float32 else 2e-2
    wanted = expected.detach()
    assert error(scores, wanted) <= 2 * error(own, wanted) + slack * float(wanted.norm())
    total = sum(error(found[n], g) ** 2 for n, g in reference.items()) ** 0.5
    plain = sum(error(own_gradients[n], g) ** 2 for n, g in reference.items()) ** 0.5
    size = sum(float(g.norm()) ** 2 for g in reference.values()) ** 0.5
    assert total <= 2 * plain + slack * size
