"""The rank operator on its own gives what autograd gives through scores and loss."""

from __future__ import annotations

import pytest
import torch

import fastrank
import fastrank_kernels

LENGTHS = [3, 1, 4, 2, 5, 1, 2]
GROUPS = [3, 1, 0, 3]


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


@pytest.mark.parametrize(
    "loss",
    [fastrank.RRHF(margin=0.2), fastrank.PRO(), fastrank.ListMLE(sft_weight=0.3), fastrank.DPO()],
    ids=repr,
)
@pytest.mark.parametrize("with_reference", [False, True])
def test_coefficients_are_the_derivative_of_the_loss(loss, with_reference):
    generator = torch.Generator().manual_seed(3)
    logp = -3 * torch.rand(sum(LENGTHS), generator=generator, dtype=torch.float64)
    rewards = torch.tensor([0.2, 0.9, 0.2, 1.0, 0.5, 0.5, -1.0], dtype=torch.float64)
    reference = None
    if with_reference and loss.uses_reference:
        reference = -torch.rand(len(rewards), generator=generator, dtype=torch.float64)
    cu_responses, cu_groups = offsets(LENGTHS), offsets(GROUPS)
    result = fastrank_kernels.rank_tokens(
        logp, rewards, cu_responses=cu_responses, cu_groups=cu_groups, spec=loss.spec(),
        reference_scores=reference, scale=0.7,
    )  # fmt: skip

    leaf = logp.clone().requires_grad_()
    scores = fastrank.sequence_scores(leaf, cu_responses, normalize=loss.normalize)
    compared = scores if reference is None else scores - reference
    total = fastrank.ranking_loss(
        compared, rewards, loss=loss, cu_groups=cu_groups, reduction="sum"
    )
    torch.testing.assert_close(result.rank_loss.sum(), total.detach())
    best_term = fastrank.sequence_scores(leaf, cu_responses, normalize=loss.sft_reduction)
    for first, size in zip(cu_groups.tolist(), GROUPS, strict=False):
        if size:
            growth = (size - 1) ** 2 if isinstance(loss, fastrank.PRO) else 1
            best = first + int(rewards[first : first + size].argmax())
            total = total - loss.sft_weight * growth * best_term[best]
    (0.7 * total).backward()
    torch.testing.assert_close(result.coefficients, leaf.grad, atol=1e-14, rtol=1e-12)
    assert not result.coefficients.requires_grad


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
            torch.zeros(5), torch.zeros(2), cu_responses=offsets(lengths),
            cu_groups=offsets(groups), spec=fastrank.RRHF().spec(), backend=backend,
        )  # fmt: skip
