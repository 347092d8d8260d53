"""The loss from token log-probabilities, and one of them -inf on every way to the loss.

A losing candidate with a token of probability 0 has a score of -inf. Most losses give it a
coefficient of exactly 0, and a product of the two anywhere would turn the whole step into NaN.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import pack_cases
import plain_losses
import pytest
import torch
from architectures import adapt, build
from plain_linear import Problem, make_problem
from torch import nn

import fastrank
import fastrank_kernels
from fastrank.modeling.prepare import head_path_of
from fastrank.ranking import ranking_from_logprobs

# In ListNet the loser keeps a share of the target distribution: an infinite loss, finite gradients.
LOSSES = [
    fastrank.RRHF(),
    fastrank.RRHF(normalize="sum", sft_reduction="sum", margin=0.5),
    fastrank.PRO(),
    fastrank.DPO(sft_weight=0.3),
    fastrank.LambdaRank(sft_weight=0.2),
    fastrank.ListMLE(sft_weight=0.2, sft_reduction="sum"),
    fastrank.ListNet(sft_weight=0.5),
]
by_loss = pytest.mark.parametrize("loss", LOSSES, ids=repr)
# Bytes of logits, and what is frozen, for each strategy of the fused loss.
STRATEGIES = {
    "group": (None, False),
    "recompute": (97 * 8 * 2, False),
    "unit": (97 * 8 * 2, True),
    "frozen group": (None, True),
}


def impossible_problem(frozen_head: bool = False) -> Problem:
    """The worst candidates of the first two groups have a label whose bias is -inf."""
    problem = make_problem(31, groups=(4, 3, 2), softcap=None, frozen_head=frozen_head)
    problem.rewards = torch.tensor([0.5, 1.0, 0.0, 2.0, 1.5, -1.0, 0.0, 3.0, 1.0]).double()
    problem.labels[problem.labels == 96] = 95
    for loser in (2, 5):
        problem.labels[int(problem.cu_responses[loser])] = 96
    with torch.no_grad():
        problem.bias[96] = float("-inf")
    return problem


def offsets(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def gradients(value: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    found = list(torch.autograd.grad(value, leaves, retain_graph=True))
    assert all(gradient.isfinite().all() for gradient in found)
    return found


@by_loss
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fused(loss, strategy, reduction) -> None:
    memory, frozen = STRATEGIES[strategy]
    problem = impossible_problem(frozen)
    want = problem.plain(loss)
    out = problem.fused(loss, reduction=reduction, logits_memory=memory)
    assert out.scores[[2, 5]].tolist() == [-torch.inf] * 2
    torch.testing.assert_close(out.loss, want if reduction == "none" else want.mean())
    factors = torch.tensor([0.7, -1.3, 2.0]) if reduction == "none" else torch.tensor(0.9)
    got = gradients((out.loss * factors).sum(), problem.leaves())
    expected = gradients((want * factors / (1 if want.dim() == factors.dim() else 3)).sum(),
                         problem.leaves())  # fmt: skip
    torch.testing.assert_close(got, expected)
    with torch.no_grad():
        forward_only = problem.fused(loss, reduction=reduction, logits_memory=memory)
    torch.testing.assert_close(forward_only, type(out)(*(x.detach() for x in out)))


@by_loss
@pytest.mark.parametrize("possible", [True, False])
def test_from_logprobs_and_from_scores(loss, possible) -> None:
    """Values by the papers' formulas in plain Python; gradients by autograd through the scores."""
    problem = make_problem(3, softcap=None) if possible else impossible_problem()
    cu_responses, cu_groups = problem.cu_responses, problem.cu_groups
    reference = problem.reference_scores if loss.uses_reference else None
    logp = problem.logprobs().detach().requires_grad_()
    out = ranking_from_logprobs(
        logp, **problem.groups(), loss=loss, reference_scores=reference, reduction="none"
    )
    own = fastrank.sequence_scores(logp, cu_responses, normalize=loss.normalize)
    compared = own if reference is None else own - reference
    term = fastrank.ranking_loss(
        compared, problem.rewards, loss=loss, cu_groups=cu_groups, reduction="none"
    )
    torch.testing.assert_close(term.detach(), out.rank_loss)
    name, s, r = type(loss).__name__.lower(), compared.tolist(), problem.rewards.tolist()
    options = {"margin": loss.margin} if isinstance(loss, fastrank.RRHF) else {}
    pool = fastrank.sequence_scores(logp, cu_responses, normalize=loss.sft_reduction)
    want, factors = torch.zeros((), dtype=torch.float64), torch.linspace(0.7, -2, len(term))
    for g, (a, b) in enumerate(pairwise(cu_groups.tolist())):
        if possible or not isinstance(loss, fastrank.ListNet):
            plain = plain_losses.rank_term(name, s[a:b], r[a:b], **options)
            torch.testing.assert_close(out.rank_loss[g].item(), plain)
        if a < b:
            weight = plain_losses.sft_weight(name, b - a, loss.sft_weight)
            want = want - factors[g] * weight * pool[a + plain_losses.order(r[a:b])[0]]
    want = gradients((term * factors).sum() + want, [logp])
    torch.testing.assert_close(gradients((out.loss * factors).sum(), [logp]), want)
    coefficients = fastrank_kernels.rank_tokens(
        logp, **problem.groups(), spec=loss.spec(), reference_scores=reference, scale=0.7
    ).coefficients
    assert not coefficients.requires_grad
    torch.testing.assert_close([coefficients], gradients(0.7 * out.loss.sum(), [logp]))


@pytest.mark.parametrize(
    ("lengths", "groups", "backend", "text"),
    [
        ([2, 2], [2], None, r"cu_responses must end at 5 \(number of token_logprobs"),
        ([2, 3], [1], None, "cu_groups must end at 2"),
        ([0, 5], [2], None, "cu_responses must rise"),
        ([2, 3], [2], "magic", "backend must be one of"),
    ],
)
def test_what_does_not_fit_is_refused(lengths, groups, backend, text):
    with pytest.raises(ValueError, match=text):
        fastrank_kernels.rank_tokens(
            torch.zeros(5), torch.zeros(2), cu_responses=offsets(*lengths),
            cu_groups=offsets(*groups), spec=fastrank.RRHF().spec(), backend=backend,
        )  # fmt: skip


def impossible_groups() -> list[fastrank.Group]:
    """The worst response of two groups begins with token 60, which nothing else has."""
    groups = pack_cases.random_groups(pack_cases.RAGGED, vocab=60)
    for group in (groups[0], groups[3]):
        group.response_ids[int(group.rewards.argmin())][0] = 60
    return groups


def biased_model(adapted: bool) -> nn.Module:
    """A Phi whose head has a bias of -inf at token 60; with LoRA on the head it has to make its
    logits itself."""
    model = build("phi", vocab_size=61, num_hidden_layers=1)
    head = model.lm_head
    if adapted:
        model = adapt(model, target_modules=["lm_head"])
    fastrank.prepare_model(model)  # which probes the head with finite logits
    with torch.no_grad():
        head.bias[60] = float("-inf")
    assert head_path_of(model).fused == (not adapted)
    return model


@pytest.mark.parametrize("adapted", [False, True], ids=["fused head", "model's own logits"])
@pytest.mark.parametrize("loss", [LOSSES[0], LOSSES[2]], ids=repr)
def test_models_jointly_and_in_two_phases(loss, adapted) -> None:
    model, groups = biased_model(adapted), impossible_groups()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = pack_cases.separate_loss(model, groups, loss)
    want = gradients(total, weights)

    (pack,) = fastrank.pack(groups, max_tokens=4096)
    for reduction in ("mean", "sum", "none"):
        out = model(pack=pack, loss=loss, reduction=reduction)
        scale = 1.0 if reduction == "mean" else 1 / len(groups)
        torch.testing.assert_close(out.loss.sum() * scale, total, rtol=1e-5, atol=0)
        got = gradients(out.loss.sum() * scale, weights)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    model.zero_grad()
    out = fastrank.two_phase_backward(model, groups, loss=loss, max_tokens=40)
    torch.testing.assert_close(out.loss, total.detach(), rtol=1e-5, atol=0)
    got = [parameter.grad for parameter in weights]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert out.drift.isfinite()
