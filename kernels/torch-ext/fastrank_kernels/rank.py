"""From token log-probabilities, or from scores, to a ranking loss and its gradients, in one launch.

One program takes one group, so nothing is exchanged between programs, nothing is atomic, and the
same input gives the same bits. The loss is data (`RankSpec`): its form is compiled in, its numbers
are arguments. A group that is larger than a block is walked in blocks by the same program; many
programs per group would use more of the GPU where groups are few and huge, and would need a second
launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .host_memory import send
from .launch import (
    FLOATS,
    INTEGERS,
    Launch,
    power_of_two,
    require_device,
    require_dtype,
    require_shape,
    run,
)
from .rank_kernel import rank_kernel
from .reference import RankResult, equal_offsets
from .spec import RankSpec

_LARGEST_TILE = 64
_ALL_STAGES = 2**31 - 1


def rank_tokens(
    token_logprobs: Tensor,
    rewards: Tensor,
    cu_responses: Tensor,
    cu_groups: Tensor,
    reference_scores: Tensor | None,
    spec: RankSpec,
    scale: float,
) -> RankResult:
    """`reference.rank_tokens` as one launch; all results float32.

    ``token_logprobs`` [T] and ``reference_scores`` [C] are on the GPU. ``rewards`` [C] and the
    offsets int32 ``[C + 1]``, ``[G + 1]`` may be on the host: they are copied. Host offsets also
    tell the size of the largest group; with device offsets the block is chosen by the mean size,
    so that nothing waits for the device. ValueError for a wrong device, dtype or shape.
    """
    require_device(token_logprobs=token_logprobs, reference_scores=reference_scores)
    require_dtype(FLOATS, token_logprobs=token_logprobs)
    require_dtype((*FLOATS, torch.float64), reference_scores=reference_scores)
    num_tokens, num_candidates = token_logprobs.numel(), rewards.numel()
    num_groups = cu_groups.numel() - 1
    require_shape((num_tokens,), token_logprobs=token_logprobs)
    require_shape((num_candidates,), rewards=rewards, reference_scores=reference_scores)
    require_shape((num_candidates + 1,), cu_responses=cu_responses)
    _require_offsets(cu_groups, num_candidates)
    require_dtype(INTEGERS, cu_responses=cu_responses)
    device = token_logprobs.device
    # Four allocations and not one: results of an operator must not share their memory.
    sizes = (num_groups, num_groups, num_candidates, num_tokens)
    result = RankResult(*(torch.empty(n, dtype=torch.float32, device=device) for n in sizes))
    launch = plan_rank(
        spec,
        rewards=rewards,
        cu_groups=cu_groups,
        scores=result.scores,
        rank_loss=result.rank_loss,
        token_logprobs=token_logprobs,
        cu_responses=cu_responses,
        reference_scores=reference_scores,
        sft_loss=result.sft_loss,
        coefficients=result.coefficients,
        scale=scale,
    )
    run(launch, device)
    return result


def rank_scores(
    scores: Tensor,
    rewards: Tensor,
    cu_groups: Tensor | None,
    valid: Tensor | None,
    spec: RankSpec,
) -> tuple[Tensor, Tensor]:
    """`reference.rank_scores` as one launch: ranking term [G] and score gradients, float32.

    ``scores`` are on the GPU; ``rewards`` and ``valid`` bool, of their shape, and ``cu_groups``
    int32 [G + 1] may be on the host: they are copied. ValueError for a wrong device, dtype or
    shape.
    """
    require_device(scores=scores)
    require_dtype(FLOATS, scores=scores)
    require_shape(tuple(scores.shape), rewards=rewards, valid=valid)
    require_dtype((torch.bool,), valid=valid)
    if cu_groups is None:
        cu_groups = equal_offsets(scores)
    _require_offsets(cu_groups, scores.numel())
    rank_loss = torch.empty(cu_groups.numel() - 1, dtype=torch.float32, device=scores.device)
    score_grads = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
    launch = plan_rank(
        spec,
        rewards=rewards,
        cu_groups=cu_groups,
        scores=scores.contiguous(),
        rank_loss=rank_loss,
        valid=valid,
        score_grads=score_grads,
    )
    run(launch, scores.device)
    return rank_loss, score_grads


def plan_rank(
    spec: RankSpec,
    *,
    rewards: Tensor,
    cu_groups: Tensor,
    scores: Tensor,
    rank_loss: Tensor,
    token_logprobs: Tensor | None = None,
    cu_responses: Tensor | None = None,
    reference_scores: Tensor | None = None,
    valid: Tensor | None = None,
    sft_loss: Tensor | None = None,
    score_grads: Tensor | None = None,
    coefficients: Tensor | None = None,
    scale: float = 1.0,
) -> Launch:
    """The launch that `rank_tokens` (with ``token_logprobs``) or `rank_scores` does."""
    device = scores.device
    tile = tile_of_groups(cu_groups, scores.numel())
    pairwise = spec.form == "pairwise"
    by_score, by_reward = spec.pair_weight == "lambda", spec.margin_by == "rank"
    # What each candidate has to know of the others; places by score and by reward are two numbers.
    if pairwise:
        numbers = int(by_score) + int(by_reward)
    else:
        numbers = int(spec.form in ("staged", "positions"))
    scratch = None
    if numbers:
        scratch = torch.empty(numbers * scores.numel(), dtype=torch.float32, device=device)
    if not rewards.is_floating_point():
        rewards = rewards.to(torch.float32)
    arguments = {
        "token_logprobs": _vector(token_logprobs, device),
        "scores": scores,
        "rewards": _vector(rewards, device),
        "cu_responses": _vector(cu_responses, device),
        "cu_groups": _vector(cu_groups, device),
        "reference_scores": _vector(reference_scores, device),
        "valid": _vector(valid, device),
        "rank_loss": rank_loss,
        "sft_loss": sft_loss,
        "score_grads": score_grads,
        "coefficients": coefficients,
        "scratch": scratch,
        "num_tokens": 0 if token_logprobs is None else token_logprobs.numel(),
        "num_candidates": scores.numel(),
        "scale": float(scale),
        "score_scale": float(spec.score_scale),
        "margin": float(spec.margin),
        "right": float(spec.right),
        "wrong": float(spec.wrong),
        "temperature": float(spec.temperature),
        "rank_weight": float(spec.rank_weight),
        "top_k": spec.top_k or _ALL_STAGES,
        "sft_weight": float(spec.sft_weight),
        "length_exponent": float(spec.length_exponent),
        "sft_mean": int(spec.sft_reduction == "mean"),
        "sft_square": int(spec.sft_growth == "square"),
        "FORM": spec.form,
        "PHI": spec.phi if pairwise else "none",
        "BEST_WORST": pairwise and spec.pairs == "best_worst",
        "LAMBDA": pairwise and by_score,
        "MARGIN_BY": spec.margin_by if pairwise else "constant",
        "SMOOTHED": pairwise and spec.phi == "logistic" and spec.wrong != 0.0,
        "REWARD_GAP": spec.form == "staged" and spec.stage_scale == "reward_gap",
        "TARGET": spec.target if spec.form == "expected" else "softmax",
        "ROWS": tile,
        "COLUMNS": min(tile, 32),
        "BLOCK_T": 2048 // tile,
    }
    # With 4 warps blocks of 16 and 32 spill on sm_80.
    num_warps = 4 if tile == 8 else 8
    # Not fused: equal scores must have a difference of exactly 0, whatever they are scaled by.
    return Launch(
        rank_kernel,
        (cu_groups.numel() - 1,),
        arguments,
        num_warps,
        fp_fusion=False,
        max_registers=128,
    )


def tile_of_groups(cu_groups: Tensor, num_candidates: int) -> int:
    """Side of the block in which a group's n x n comparison is walked, 8 to 64.

    It fits the largest group where the offsets are on the host, and the mean group where only the
    device knows them: any tile serves any group, at another speed.
    """
    num_groups = cu_groups.numel() - 1
    if num_groups < 1:
        return 8
    if cu_groups.device.type == "cpu":
        widest = int((cu_groups[1:] - cu_groups[:-1]).max())
    else:
        widest = -(-num_candidates // num_groups)
    return min(max(power_of_two(widest), 8), _LARGEST_TILE)


def _vector(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    if tensor is None:
        return None
    return send(tensor, device).contiguous()


def _require_offsets(cu_groups: Tensor, num_candidates: int) -> None:
    require_dtype(INTEGERS, cu_groups=cu_groups)
    if cu_groups.dim() != 1 or cu_groups.numel() < 1:
        raise ValueError(f"cu_groups must have shape [G + 1], got {tuple(cu_groups.shape)}")
    if cu_groups.device.type == "cpu" and int(cu_groups[-1]) != num_candidates:
        raise ValueError(
            f"cu_groups must end at {num_candidates} (number of candidates), "
            f"got {int(cu_groups[-1])}"
        )
