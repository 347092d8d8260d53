"""token_logprobs, sequence_scores and flatten against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from plain_linear import ErrorComparison, largest_error, make_problem

import fastrank
from fastrank_kernels.planner import plan_logprobs

STRATEGIES = {
    "keep": {},
    "recompute": {"logits_memory": 97 * 8 * 3},
    "unit": {"frozen_head": True},
    "unit in chunks": {"frozen_head": True, "logits_memory": 97 * 8 * 3},
}


def logprobs(problem, **options) -> torch.Tensor:
    return fastrank.token_logprobs(
        problem.hidden, problem.weight, problem.labels, **problem.head(), **options
    )


@pytest.mark.parametrize("variant", [{}, {"repeat_rows": False}, {"softcap": None, "bias": False}])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_value_and_gradients_for_any_upstream(strategy, variant) -> None:
    options = dict(STRATEGIES[strategy])
    problem = make_problem(1, frozen_head=options.pop("frozen_head", False), **variant)
    want = problem.logprobs()
    upstream = torch.randn_like(want)
    upstream[3:6] = 0.0  # dead rows
    expected = torch.autograd.grad(want, problem.leaves(), upstream)
    got = logprobs(problem, **options)
    assert got.dtype == torch.float64 and (got <= 0).all()
    first = torch.autograd.grad(got, problem.leaves(), upstream, retain_graph=True)
    second = torch.autograd.grad(got, problem.leaves(), upstream)
    assert largest_error([got, *first], [want, *expected]) < 1e-12
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    narrow = problem.to(torch.float32)
    got = logprobs(narrow, **options)
    grads = torch.autograd.grad(got, narrow.leaves(), upstream.float())
    assert got.dtype == torch.float32
    assert largest_error([got, *grads], [want, *expected]) < 1e-5


@pytest.mark.parametrize(
    ("head", "hidden", "rows", "budget", "strategy", "products"),
    [
        (True, True, 8, 10**9, "keep", 3),
        (True, False, 8, 10**9, "keep", 2),
        (True, True, 8, 5 * 400, "recompute", 4),
        (False, True, 8, 5 * 400, "unit", 2),
        (False, False, 8, 5 * 400, "forward", 1),
    ],
)
def test_plan(head, hidden, rows, budget, strategy, products) -> None:
    plan = plan_logprobs(
        rows=rows, vocab=100, logits_itemsize=4, hidden_grad=hidden, head_grad=head,
        budget=budget, device_type="cpu",
    )  # fmt: skip
    assert (plan.strategy, plan.products) == (strategy, products)
    assert plan.chunk_rows * 400 <= max(budget, 400)


@pytest.mark.parametrize("confident", [False, True])
@pytest.mark.parametrize("memory", [None, 97 * 2 * 2])
def test_bf16_error_is_no_larger_than_plain_pytorch(confident, memory) -> None:
    errors = ErrorComparison()
    for seed in range(6):
        problem = make_problem(seed, longest=12, softcap=None, bias=False)
        if confident:
            problem.make_confident()
        narrow = problem.to(torch.bfloat16)
        wide = narrow.to(torch.float64)
        upstream = torch.randn(problem.labels.shape, dtype=torch.float64)
        ours = logprobs(narrow, logits_memory=memory)
        errors.add(
            torch.autograd.grad(ours, narrow.leaves(), upstream.float()),
            torch.autograd.grad(narrow.logprobs(), narrow.leaves(), upstream.float()),
            torch.autograd.grad(wide.logprobs(), wide.leaves(), upstream),
        )
    errors.check()


def test_nothing_is_saved_when_nothing_needs_a_gradient() -> None:
    problem = make_problem(2)
    with torch.no_grad():
        value = logprobs(problem)
    assert not value.requires_grad
    torch.testing.assert_close(value, problem.logprobs().detach())


@pytest.mark.parametrize("normalize", ["mean", "sum", 0, 1, 0.6, 1.5])
def test_sequence_scores(normalize) -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.randn(11, dtype=torch.float64, generator=g).requires_grad_()
    offsets = torch.tensor([0, 1, 5, 6, 11], dtype=torch.int32)
    parts = values.split([1, 4, 1, 5])
    exponent = {"mean": 1, "sum": 0}.get(normalize, normalize)
    want = torch.stack([p.sum() / len(p) ** exponent for p in parts])
    got = fastrank.sequence_scores(values, offsets, normalize=normalize)
    torch.testing.assert_close(got, want)
    upstream = torch.tensor([1.0, -2.0, 3.0, 0.25], dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(got, values, upstream),
        torch.autograd.grad(want, values, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    assert fastrank.sequence_scores(values.detach().float(), offsets).dtype == torch.float32


def test_sums_of_long_responses_keep_their_digits() -> None:
    values = torch.full((200_000,), -0.1)
    offsets = torch.tensor([0, 200_000], dtype=torch.int32)
    got = fastrank.sequence_scores(values, offsets, normalize="sum").item()
    assert abs(got + 200_000 * float(torch.tensor(0.1))) < 2e-3


def test_a_ranking_loss_of_ones_own_equals_the_fused_one() -> None:
    problem = make_problem(4)
    logp = logprobs(problem)
    scores = fastrank.sequence_scores(logp, problem.cu_responses)
    loss = fastrank.RankNet()
    own = fastrank.ranking_loss(scores, problem.rewards, loss=loss, cu_groups=problem.cu_groups)
    fused = problem.fused(loss).loss
    torch.testing.assert_close(own, fused)
    for a, b in zip(
        torch.autograd.grad(own, problem.leaves()),
        torch.autograd.grad(fused, problem.leaves()),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_flatten_takes_the_row_before_each_label() -> None:
    hidden = torch.randn(3, 6, 4)
    labels = torch.full((3, 6), -100)
    labels[0, 2:5] = torch.tensor([7, 8, 9])
    labels[1, 1] = 5
    labels[2, 3:6] = torch.tensor([1, -100, 2])  # a hole: a masked token inside a response
    rows, flat, offsets = fastrank.flatten(hidden, labels)
    assert rows.tolist() == [1, 2, 3, 6, 14, 16]
    assert flat.tolist() == [7, 8, 9, 5, 1, 2]
    assert offsets.tolist() == [0, 3, 4, 6] and offsets.dtype == torch.int32
    assert torch.equal(hidden.view(-1, 4)[rows[4]], hidden[2, 2])
    rows, flat, _ = fastrank.flatten(hidden, labels.masked_fill(labels == 5, 0), ignore_index=-100)
    assert flat.tolist() == [7, 8, 9, 0, 1, 2]


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (torch.tensor([[1, 2], [-100, 3]]), "not begin at position 0 .* got row 0"),
        (torch.tensor([[-100, 2], [-100, -100]]), "a token in every row, got none in row 1"),
        (torch.zeros(2, 3, dtype=torch.int64), r"labels must have shape \[2, 2\], got \[2, 3\]"),
    ],
)
def test_flatten_refuses(labels, text) -> None:
    with pytest.raises(ValueError, match=text):
        fastrank.flatten(torch.zeros(2, 2, 4), labels)


def test_sequence_scores_refuses_offsets_that_do_not_cover() -> None:
    with pytest.raises(ValueError, match=r"end at 3 \(number of values\), got 2"):
        fastrank.sequence_scores(torch.zeros(3), torch.tensor([0, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match="normalize must be 'mean', 'sum' or a number >= 0, got"):
        fastrank.sequence_scores(
            torch.zeros(3), torch.tensor([0, 3], dtype=torch.int32), normalize="max"
        )
