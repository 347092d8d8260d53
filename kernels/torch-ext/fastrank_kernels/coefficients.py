"""The rank operator on its own: from token log-probabilities to the loss's derivative by each.

Inside the fused loss it stands between two matrix products. Whoever computes log-probabilities and
gradients in separate passes (training in two phases) needs only this step, on its own, and gets the
same definition of every loss.
"""

from __future__ import annotations

from torch import Tensor

from . import ops
from .checks import check_offsets
from .reference import RankResult
from .spec import RankSpec


def rank_tokens(
    token_logprobs: Tensor,
    rewards: Tensor,
    cu_responses: Tensor,
    cu_groups: Tensor,
    spec: RankSpec,
    *,
    reference_scores: Tensor | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> RankResult:
    """Loss and scores of whole groups, and ``coefficients`` [T]: the derivative of
    ``scale * (rank_loss + sft_loss).sum()`` by each log-probability. Not differentiable.

    Args:
        token_logprobs: [T], response after response; float64 stays float64 on the torch backend.
        rewards: [C]. reference_scores: [C], subtracted from the scores.
        cu_responses, cu_groups: int32 ``[C + 1]`` and ``[G + 1]`` on the host.
        backend: ``"torch"``, ``"triton"``, or None for the device's own.

    Raises:
        ValueError: offsets that do not cover the tokens or candidates, an empty response, a backend
            that cannot run.
    """
    tokens, device = token_logprobs.shape[0], token_logprobs.device
    check_offsets("cu_responses", cu_responses, tokens, "token_logprobs", allow_empty=False)
    check_offsets("cu_groups", cu_groups, rewards.shape[0], "rewards", allow_empty=True)
    return ops._module(backend or "", device).rank_tokens(
        token_logprobs.detach(),
        rewards.to(device),
        cu_responses,
        cu_groups,
        None if reference_scores is None else reference_scores.to(device),
        spec,
        scale,
    )
