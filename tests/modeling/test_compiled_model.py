"""A prepared model under ``torch.compile``: one graph, loss included, for packs of any layout."""

from __future__ import annotations

import shutil
from itertools import pairwise

import pytest
import torch
from architectures import build
from pack_cases import assert_same_gradients, one_pack, random_groups, take_gradients
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fastrank
from fastrank.attention.backends import attend
from fastrank.attention.operator import _attention, opaque_attention
from fastrank.attention.segments import SegmentTable
from fastrank.attention.visibility import Visibility, ask

# Other numbers of groups, candidates and tokens in every pack.
LAYOUTS = [
    [(7, [3, 1, 9]), (1, [4, 2])],
    [(5, [3, 6]), (2, [8, 2, 4])],
    [(9, [3, 6, 7]), (3, [8, 2, 4]), (5, [2, 2])],
    [(2, [5, 6]), (3, [7, 8]), (4, [2, 5]), (5, [3, 3])],
]
ONE_GROUP = [(6, [5, 6, 7, 8])]

# Fields of a model type: one layer where all are alike, because tracing takes most of the time.
MODELS = {
    "llama": {"num_hidden_layers": 1},
    "qwen3": {"num_hidden_layers": 1},
    "mistral": {"num_hidden_layers": 1},
    "gemma2": {},
    "gpt_oss": {},
    "gpt2": {"n_layer": 1},
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make(model_type: str = "llama", **changed) -> nn.Module:
    model = build(model_type, **MODELS[model_type], **changed)
    if model_type == "gpt_oss":
        model.set_experts_implementation("grouped_mm")  # plain products depend on the data
    return fastrank.prepare_model(model).train()


def make_packs(**options) -> list[fastrank.Pack]:
    return [one_pack(random_groups(x, seed=seed), **options) for seed, x in enumerate(LAYOUTS)]


def step(model: nn.Module, called: nn.Module, pack, loss, **options) -> tuple[Tensor, dict]:
    output = called(pack=pack, loss=loss, **options)
    output.loss.backward()
    return output.loss.detach(), take_gradients(model)


def assert_same_steps(
    model: nn.Module, compiled: nn.Module, loss, packs: list[fastrank.Pack] | None = None, **options
) -> None:
    for pack in packs or make_packs():
        expected, reference = step(model, model, pack, loss, **options)
        found, got = step(model, compiled, pack, loss, **options)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert_same_gradients(got, reference, 1e-5)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", MODELS)
def test_one_graph_without_a_break_serves_every_pack(name):
    model, loss = make(name), fastrank.DPO() if name == "qwen3" else fastrank.RRHF()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    assert_same_steps(model, compiled, loss)
    assert graphs() == 1 and not counters["graph_break"]
    if name == "llama":
        # A compiler never takes a size of one for any other; which architecture does not matter.
        packs = [one_pack(random_groups(ONE_GROUP))]
        assert_same_steps(model, compiled, fastrank.RRHF(), packs)
        assert graphs() <= 2


def test_recompiles_end_without_being_told_what_changes():
    """By default the compiler first takes every size for fixed, then every size that changed for
    dynamic: at most once more for sizes that happened to stay."""
    model = make()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same_steps(model, compiled, fastrank.PRO(), reduction="sum")
    seen = graphs()
    assert seen <= 3 and not counters["graph_break"]
    shuffled = make_packs()[::-1]
    assert_same_steps(model, compiled, fastrank.PRO(), shuffled, reduction="sum")
    assert graphs() == seen


def test_padded_rows_compile_too():
    model = fastrank.prepare_model(make(), shared_prompts=False)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    assert_same_steps(model, compiled, fastrank.RRHF(), make_packs(shared_prompts=False))
    assert graphs() <= 2 and not counters["graph_break"]


def test_backward_through_the_operator_formulas():
    """``aot_eager`` differentiates the graph by the operators' registered formulas."""
    model = make("mistral")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    assert_same_steps(model, compiled, fastrank.RRHF())
    assert graphs() == 1 and not counters["graph_break"]


def test_with_gradient_checkpointing():
    model = make()
    # Checkpointed layers alone: the loss makes its gradients in the forward.
    model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    assert_same_steps(model, compiled, fastrank.RRHF())
    assert not counters["graph_break"]


def test_training_in_two_phases():
    model = make()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for seed, layout in enumerate(LAYOUTS):
        groups = random_groups(layout, seed=seed)
        found = []
        for called in (model, compiled):
            output = fastrank.two_phase_backward(called, groups, loss=fastrank.PRO(), max_tokens=24)
            found.append((output.loss, take_gradients(model)))
        torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=1e-5)
        assert_same_gradients(found[1][1], found[0][1], 1e-5)
    # One graph to score and one to differentiate, each with its own for packs of one group.
    assert graphs() <= 4 and not counters["graph_break"]


def test_a_sequence_beyond_the_context_is_refused_in_a_compiled_model_too():
    model = make(max_position_embeddings=20)
    compiled = torch.compile(model, backend="eager", dynamic=True)
    fits, too_long = (one_pack(random_groups([(9, [last, 4])])) for last in (8, 13))
    compiled(pack=fits, loss=fastrank.RRHF())
    with pytest.raises(Exception, match="must fit into the model's context of 20 tokens, got 22"):
        compiled(pack=too_long, loss=fastrank.RRHF())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_compiles_the_step():
    model = make()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    assert_same_steps(model, compiled, fastrank.RRHF())
    assert graphs() == 1


SEGMENTS = SegmentTable.from_lengths([(7, [3, 1, 9]), (1, [4, 2])])
VISIBILITIES = {"full": Visibility(), "sliding": Visibility("sliding", 4)}


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, 27, 8), (1, 2, 27, 8), (1, 2, 27, 8), (4,)]
    made = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    return tuple(tensor.requires_grad_() for tensor in made)


def answers(visibility: Visibility) -> Tensor:
    def mask(batch, head, query, key):
        return visibility.mask(query, key)

    return ask(mask, visibility.size or None, torch.device("cpu"))


@pytest.mark.parametrize("kind", VISIBILITIES)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_the_operator_equals_the_eager_attention(kind, with_sinks):
    visibility = VISIBILITIES[kind]
    *qkv, sinks = operands(torch.float64)
    given = {"scale": 0.3, "softcap": None, "sinks": sinks if with_sinks else None}
    expected = attend(*qkv, SEGMENTS, visibility=visibility, backend="auto", **given)
    found = opaque_attention(
        *qkv, SEGMENTS, mask_answers=answers(visibility), local_size=visibility.size or None,
        backend="auto", **given,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    upstream = torch.randn(found.shape, dtype=torch.float64)
    leaves = [*qkv, sinks] if with_sinks else qkv
    expected = torch.autograd.grad(expected, leaves, upstream)
    found = torch.autograd.grad(found, leaves, upstream)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("with_sinks", [False, True])
def test_the_operator_is_well_formed(with_sinks):
    *qkv, sinks = operands(torch.float32)
    torch.library.opcheck(
        _attention,
        (*qkv, sinks if with_sinks else None, SEGMENTS.offsets, SEGMENTS.parents,
         answers(Visibility()), None, None, None, "auto"),
    )  # fmt: skip


def test_layouts_differ_in_every_size():
    packs = make_packs()
    for before, after in pairwise(packs):
        assert before.num_tokens != after.num_tokens
    assert len({pack.num_groups for pack in packs}) > 2
    assert len({pack.num_candidates for pack in packs}) > 1
