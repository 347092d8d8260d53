"""ranking_loss against the formulas written out in plain Python, and its gradients."""

from __future__ import annotations

import itertools
import math
import random

import plain_losses
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastrank
from fastrank.benchmarks.loss_formulas import ranking_term

CASES = [
    ("rrhf", {}),
    ("rrhf", {"margin": 0.3}),
    ("rrhf", {"pairs": "best_worst"}),
    ("pro", {}),
    ("ranknet", {}),
    ("slic", {"margin": 0.7}),
    ("simpo", {}),
    ("simpo", {"pairs": "best_worst", "beta": 1.5, "gamma": 0.2}),
    ("ipo", {"beta": 0.4}),
    ("dpo", {"beta": 0.7}),
    ("dpo", {"pairs": "best_worst"}),
    ("lambdarank", {}),
    ("listmle", {}),
    ("listmle", {"top_k": 2}),
    ("listnet", {"temperature": 0.6}),
    ("rrhf", {"margin": 0.3, "margin_by": "rank", "rank_weight": 0.7}),
    ("slic", {"margin": 0.2, "margin_by": "reward"}),
    ("simpo", {"gamma": 0.4, "margin_by": "rank", "label_smoothing": 0.1}),
    ("dpo", {"beta": 0.3, "margin": 0.5, "margin_by": "reward"}),
    ("dpo", {"beta": 0.5, "label_smoothing": 0.2, "robust": True}),
    ("ranknet", {"beta": 0.4, "label_smoothing": 0.3}),
    ("rebel", {"eta": 0.8}),
    ("lambdarank", {"beta": 0.3}),
    ("listmle", {"beta": 0.1}),
    ("listnet", {"temperature": 2.0, "beta": 0.2, "rank_weight": 3.0}),
    ("pro", {"top_k": 1}),
    ("pro", {"stage_scale": "one"}),
    ("nca", {"temperature": 0.5, "beta": 0.3}),
    ("lire", {}),
    ("lire", {"temperature": 0.5, "value": "softmax"}),
    ("approxndcg", {"temperature": 0.7}),
]
IDS = [name + "".join(f"-{k}={v}" for k, v in options.items()) for name, options in CASES]


def ragged(seed: int, sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, rewards with many ties, and offsets of groups of the given sizes."""
    generator = random.Random(seed)
    total = sum(sizes)
    scores = torch.tensor([generator.gauss(-1.5, 1.0) for _ in range(total)], dtype=torch.float64)
    rewards = torch.tensor([generator.randrange(5) / 2 for _ in range(total)], dtype=torch.float64)
    offsets = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
    return scores, rewards, offsets


def expected(name: str, options: dict, scores, rewards, offsets) -> list[float]:
    s, r, bounds = scores.tolist(), rewards.tolist(), offsets.tolist()
    return [
        plain_losses.rank_term(name, s[a:b], r[a:b], **options)
        for a, b in itertools.pairwise(bounds)
    ]


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_value_equals_the_formula_on_ragged_groups_with_ties(name, options) -> None:
    loss = fastrank.loss_from_name(name, **options)
    for seed in range(3):
        sizes = [1, 0, 2, 3, 32, 1, 7, *random.Random(seed).choices(range(1, 33), k=6)]
        scores, rewards, offsets = ragged(seed, sizes)
        got = fastrank.ranking_loss(scores, rewards, loss=loss, cu_groups=offsets, reduction="none")
        want = torch.tensor(expected(name, options, scores, rewards, offsets), dtype=torch.float64)
        assert (got - want).abs().max() <= 1e-12 * max(1.0, want.abs().max().item())
        for reduction, reduced in (("sum", want.sum()), ("mean", want.mean())):
            value = fastrank.ranking_loss(
                scores, rewards, loss=loss, cu_groups=offsets, reduction=reduction
            )
            torch.testing.assert_close(value, reduced, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_value_equals_the_formula_in_a_group_of_300(name, options) -> None:
    loss = fastrank.loss_from_name(name, **options)
    scores, rewards, offsets = ragged(11, [300, 2])
    got = fastrank.ranking_loss(scores, rewards, loss=loss, cu_groups=offsets, reduction="none")
    want = torch.tensor(expected(name, options, scores, rewards, offsets), dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rrhf", {"margin": 0.3, "margin_by": "rank"}),
        ("dpo", {"beta": 0.5, "label_smoothing": 0.2, "robust": True}),
        ("rebel", {"eta": 0.8}),
        ("pro", {}),
        ("listmle", {"beta": 0.1}),
        ("listnet", {"temperature": 2.0}),
        ("nca", {"temperature": 0.5, "beta": 0.3}),
        ("lire", {}),
        ("approxndcg", {"temperature": 0.7}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_gradient_in_a_group_of_300_by_the_formula(name, options) -> None:
    """Along one direction, so that two evaluations of the formula are enough."""
    scores, rewards, offsets = ragged(11, [300])
    direction = torch.tensor([random.Random(i).gauss(0, 1) for i in range(300)]).double()
    value = fastrank.ranking_loss(
        scores.requires_grad_(), rewards, loss=fastrank.loss_from_name(name, **options)
    )
    (got,) = torch.autograd.grad(value, scores)
    want = plain_losses.slope(
        name, scores.tolist(), direction.tolist(), rewards.tolist(), **options
    )
    size = (got.abs() * direction.abs()).sum().item()
    assert (got @ direction).item() == pytest.approx(want, rel=1e-12, abs=1e-12 * size)


DIFFERENTIABLE = [case for case in CASES if case[0] != "lambdarank"]  # its weights are detached


@pytest.mark.parametrize(("name", "options"), DIFFERENTIABLE)
def test_gradient_equals_the_formula(name, options) -> None:
    """Derivatives of the plain formulas to 1e-12, with ties, masked candidates and factors."""
    loss = fastrank.loss_from_name(name, **options)
    scores, rewards, offsets = ragged(23, [1, 7, 0, 2, 4])
    upstream = torch.tensor([0.3, -1.7, 5.0, 0.9, 2.2], dtype=torch.float64)
    want = torch.zeros_like(scores)
    dense = torch.full((5, 8), float("nan"), dtype=torch.float64)
    dense_rewards, where = torch.zeros(5, 8), torch.zeros(5, 8, dtype=torch.bool)
    for g, (a, b) in enumerate(itertools.pairwise(offsets.tolist())):
        own = plain_losses.gradient(name, scores[a:b].tolist(), rewards[a:b].tolist(), **options)
        want[a:b] = upstream[g] * torch.tensor(own, dtype=torch.float64)
        where[g, 1 : 1 + b - a] = True
        dense[g, 1 : 1 + b - a], dense_rewards[g, 1 : 1 + b - a] = scores[a:b], rewards[a:b]
    kwargs = {"loss": loss, "reduction": "none"}
    scores.requires_grad_()
    dense.requires_grad_()
    flat = fastrank.ranking_loss(scores, rewards, cu_groups=offsets, **kwargs)
    masked = fastrank.ranking_loss(dense, dense_rewards.double(), where=where, **kwargs)
    (got,) = torch.autograd.grad((flat * upstream).sum(), scores)
    (got_masked,) = torch.autograd.grad((masked * upstream).sum(), dense)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_masked[where], want, rtol=1e-12, atol=1e-12)
    assert not got_masked[~where].any()


@pytest.mark.parametrize(("name", "options"), DIFFERENTIABLE)
def test_gradient_is_the_derivative_of_the_value(name, options) -> None:
    loss = fastrank.loss_from_name(name, **options)
    scores, rewards, offsets = ragged(3, [1, 5, 0, 2, 9])
    upstream = torch.tensor([0.3, -1.7, 5.0, 0.9, 2.2], dtype=torch.float64)

    def weighted(s: torch.Tensor) -> torch.Tensor:
        per_group = fastrank.ranking_loss(
            s, rewards, loss=loss, cu_groups=offsets, reduction="none"
        )
        return (per_group * upstream).sum()

    assert torch.autograd.gradcheck(weighted, scores.requires_grad_())


def test_lambdarank_gradient_holds_its_weights_fixed() -> None:
    scores, rewards, offsets = ragged(5, [6, 1, 4])
    scores.requires_grad_()
    upstream = torch.tensor([1.3, 2.0, -0.4], dtype=torch.float64)
    loss = fastrank.ranking_loss(
        scores, rewards, loss=fastrank.LambdaRank(), cu_groups=offsets, reduction="none"
    )
    (got,) = torch.autograd.grad((loss * upstream).sum(), scores)
    want = torch.zeros(())
    for (a, b), factor in zip(itertools.pairwise(offsets.tolist()), upstream, strict=True):
        s, r = scores[a:b], rewards[a:b]
        if r.max() == r.min():
            continue
        weights = torch.tensor(
            plain_losses.lambda_weights(s.tolist(), r.tolist()), dtype=torch.float64
        )
        d = s[:, None] - s[None, :]
        pair = (r[:, None] > r[None, :]).double()
        want = want + factor * (pair * weights * torch.nn.functional.softplus(-d)).sum()
    (want_grad,) = torch.autograd.grad(want, scores)
    torch.testing.assert_close(got, want_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_float32_is_close_and_stays_finite_at_extreme_scores(name, options) -> None:
    loss = fastrank.loss_from_name(name, **options)
    scores, rewards, offsets = ragged(7, [4, 8, 2])
    wide = scores.clone().requires_grad_()
    narrow = scores.float().requires_grad_()
    kwargs = {"loss": loss, "cu_groups": offsets}
    (want,) = torch.autograd.grad(fastrank.ranking_loss(wide, rewards, **kwargs), wide)
    value = fastrank.ranking_loss(narrow, rewards.float(), **kwargs)
    (got,) = torch.autograd.grad(value, narrow)
    assert value.dtype == got.dtype == torch.float32
    assert (got.double() - want).abs().max() < 1e-5 * max(1.0, want.abs().max().item())
    extreme = torch.tensor([-9e3, 9e3, 0.0], requires_grad=True)
    value = fastrank.ranking_loss(extreme, torch.tensor([2.0, 1.0, 0.0]), loss=loss)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(extreme.grad).all()


def test_a_losing_score_of_minus_infinity_is_the_limit_of_low_ones() -> None:
    """Value and gradient by the formulas at a score so low that it says the same; where these grow
    without bound the loss is infinite, and never NaN."""
    scores = torch.tensor([-1.0, -2.0, 0.5, -1e9, -1.5, -0.7], dtype=torch.float64)
    rewards = torch.tensor([3.0, 1.0, 2.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    ruled_out = scores.masked_fill(scores < -1e8, -torch.inf).requires_grad_()
    bounded = 0
    for name, options in CASES:
        value = fastrank.ranking_loss(
            ruled_out, rewards, loss=fastrank.loss_from_name(name, **options)
        )
        (got,) = torch.autograd.grad(value, ruled_out)
        want = plain_losses.rank_term(name, scores.tolist(), rewards.tolist(), **options)
        assert not got.isnan().any(), name
        if abs(want) > 1e4:
            assert value.item() == math.copysign(math.inf, want), name
            continue
        bounded += 1
        assert value.item() == pytest.approx(want, rel=1e-12, abs=1e-12)
        if name != "lambdarank":
            own = plain_losses.gradient(name, scores.tolist(), rewards.tolist(), **options)
            want_gradient = torch.tensor(own, dtype=torch.float64)
            torch.testing.assert_close(got, want_gradient, rtol=1e-10, atol=1e-10)
    assert bounded >= 20


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("width", [1, 2, 5])
def test_groups_of_one_size(name, options, width) -> None:
    """They are not gathered: value and gradient by the formulas, whichever way they are given."""
    loss = fastrank.loss_from_name(name, **options)
    scores, rewards, offsets = ragged(17, [width] * 4)
    scores.requires_grad_()
    upstream = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    flat = fastrank.ranking_loss(scores, rewards, loss=loss, cu_groups=offsets, reduction="none")
    dense = fastrank.ranking_loss(
        scores.view(4, width), rewards.view(4, width), loss=loss, reduction="none"
    )
    want = torch.tensor(expected(name, options, scores, rewards, offsets), dtype=torch.float64)
    for values in (flat, dense):
        torch.testing.assert_close(values.detach(), want, rtol=1e-12, atol=1e-12)
    gathered = fastrank.ranking_loss(
        scores.view(4, width),
        rewards.view(4, width),
        loss=loss,
        where=torch.ones(4, width, dtype=torch.bool),
        reduction="none",
    )
    (want,) = torch.autograd.grad((gathered * upstream).sum(), scores)
    for values in (flat, dense):
        (got,) = torch.autograd.grad((values * upstream).sum(), scores)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_dense_without_candidates(shape) -> None:
    scores = torch.zeros(shape, requires_grad=True)
    value = fastrank.ranking_loss(scores, torch.zeros(shape), loss=fastrank.PRO())
    value.backward()
    assert value.item() == 0.0 and scores.grad.shape == shape


class Operations(TorchDispatchMode):
    """The operations that are done within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["rrhf", "pro"])
def test_groups_of_one_size_take_no_more_operations_than_plain_pytorch(name) -> None:
    """Their number is the time at such sizes. An operator of our own is one that costs more than
    all the others; only a compiler needs it."""
    scores, rewards = torch.randn(64, 8, requires_grad=True), torch.rand(64, 8)
    with Operations() as ours:
        value = fastrank.ranking_loss(scores, rewards, loss=fastrank.loss_from_name(name))
        (grad,) = torch.autograd.grad(value, scores)
    with Operations() as plain:
        exact = ranking_term(scores, rewards, name).mean()
        (want,) = torch.autograd.grad(exact, scores)
    torch.testing.assert_close((value, grad), (exact, want))
    assert len(ours.names) <= len(plain.names), ours.names
    assert not [x for x in ours.names if "fastrank" in x]


def test_reductions_of_groups_of_one_size_and_their_gradients() -> None:
    scores, rewards, _ = ragged(3, [6] * 5)
    scores, rewards, upstream = scores.view(5, 6), rewards.view(5, 6), torch.rand(5).double()
    offsets = torch.arange(6, dtype=torch.int32) * 6
    for name in fastrank.losses.LOSSES:
        loss, leaf = fastrank.loss_from_name(name), scores.clone().requires_grad_()
        flat = leaf.view(-1), rewards.view(-1)
        for reduction, factor in {
            "none": upstream,
            "sum": upstream[0],
            "mean": upstream[1],
        }.items():
            value = fastrank.ranking_loss(leaf, rewards, loss=loss, reduction=reduction)
            want = fastrank.ranking_loss(*flat, loss=loss, cu_groups=offsets, reduction="none")
            want = {"none": want, "sum": want.sum(), "mean": want.sum() / 5}[reduction]
            grads = (torch.autograd.grad((x * factor).sum(), leaf)[0] for x in (value, want))
            torch.testing.assert_close(value, want)
            torch.testing.assert_close(*grads)


def test_many_groups_are_handled_in_slices(monkeypatch) -> None:
    from fastrank_kernels import reference

    scores, rewards, offsets = ragged(13, [5, 3, 8, 1, 2, 8, 4])
    kwargs = {"loss": fastrank.PRO(), "cu_groups": offsets, "reduction": "none"}
    want = fastrank.ranking_loss(scores, rewards, **kwargs)
    monkeypatch.setattr(reference, "_PAIR_ELEMENTS", 2 * 8 * 8)
    torch.testing.assert_close(fastrank.ranking_loss(scores, rewards, **kwargs), want)


def test_nan_scores_are_not_hidden() -> None:
    scores = torch.tensor([0.0, float("nan"), 1.0], requires_grad=True)
    for name in fastrank.losses.LOSSES:
        loss = fastrank.loss_from_name(name)
        value = fastrank.ranking_loss(scores, torch.tensor([2.0, 1.0, 0.0]), loss=loss)
        (grad,) = torch.autograd.grad(value, scores)
        assert torch.isnan(grad).any(), name


def test_no_group_at_all_is_zero() -> None:
    scores = torch.zeros(0, requires_grad=True)
    offsets = torch.zeros(1, dtype=torch.int32)
    value = fastrank.ranking_loss(scores, torch.zeros(0), loss=fastrank.RRHF(), cu_groups=offsets)
    value.backward()
    assert value.item() == 0.0 and scores.grad.shape == (0,)


S3 = torch.zeros(3)


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"rewards": torch.zeros(4)}, ValueError, r"rewards must have shape \[3\], got \[4\]"),
        ({"scores": S3.long()}, TypeError, "scores must be floating, got torch.int64"),
        ({"loss": "rrhf"}, TypeError, "loss must be a fastrank loss"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got"),
        ({"cu_groups": torch.tensor([0, 2])}, ValueError, r"end at 3 \(number of scores\), got 2"),
        ({"cu_groups": torch.tensor([1, 3])}, ValueError, "cu_groups must begin at 0, got 1"),
        ({"cu_groups": torch.tensor([0, 4, 3])}, ValueError, "must not fall, got 4 then 3"),
        ({"cu_groups": torch.tensor([0.0, 3.0])}, TypeError, "cu_groups must be int32"),
        (
            {"rewards": torch.tensor([0.0, float("nan"), 1.0])},
            ValueError,
            "rewards must be finite, got nan at index 1",
        ),
        (
            {"rewards": torch.tensor([0.0, 1.0, -float("inf")])},
            ValueError,
            "rewards must be finite, got -inf at index 2",
        ),
        ({"where": torch.ones(3, dtype=torch.bool)}, ValueError, "where goes with scores"),
        ({"scores": torch.zeros(1, 1, 3)}, ValueError, r"\[C\] or \[G, n\], got \[1, 1, 3\]"),
    ],
)
def test_wrong_arguments_say_argument_expected_got(kwargs, error, text) -> None:
    arguments = {"scores": S3, "rewards": S3, "loss": fastrank.RRHF(), **kwargs}
    scores, rewards = arguments.pop("scores"), arguments.pop("rewards")
    with pytest.raises(error, match=text):
        fastrank.ranking_loss(scores, rewards, **arguments)
