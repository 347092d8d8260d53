"""Losses of one's own: a Python function of a group's scores and rewards, wherever a loss goes.

A ranking loss reaches the tokens only through the scores, so any function of them that autograd can
differentiate takes the paths that save memory: its derivative by each score gives the coefficient
of each token. The price against a loss that the operators know is one Python call per group (or per
batch), and that the host waits for a GPU's rewards.
"""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastrank_kernels
from fastrank_kernels import RankSpec

from .errors import InputError
from .logprobs import sequence_scores
from .loss import Loss, parameters


@dataclasses.dataclass(frozen=True, repr=False)
class FunctionLoss(Loss):
    """A ranking term that is a Python function; a bare function means this one with its defaults.

    Args:
        function: ``function(scores, rewards)``, both [n] of one group, returning a scalar. Its
            parameters say what else it gets: with ``reference_scores`` also [n] scores of a
            reference model, not subtracted; with ``cu_groups`` it is called once for all groups,
            with [C] scores and rewards and int32 offsets [G + 1] on the host, and returns [G].
            Scores and rewards are float32 at least. As in every loss a group without a strict pair
            has a term of 0: the function does not see it.

    Raises, when it is used:
        InputError: the function returns something else, a value that is not finite for scores that
            are, or one that autograd cannot differentiate.

    A subclass of `Loss` with a method ``rank_term`` instead of a function may have options.

    >>> import torch, fastrank
    >>> def hinge(scores, rewards):
    ...     difference = scores[:, None] - scores[None, :]
    ...     return torch.relu(-difference)[rewards[:, None] > rewards[None, :]].sum()
    >>> s, r = torch.tensor([-1.0, -3.0, -2.0]), torch.tensor([0.1, 0.9, 0.5])
    >>> fastrank.ranking_loss(s, r, loss=hinge)
    tensor(4.)
    >>> fastrank.FunctionLoss(hinge, sft_weight=1.0)
    FunctionLoss(hinge, sft_weight=1.0)
    """

    function: Callable[..., Any]

    def __post_init__(self) -> None:
        if not callable(self.function) or isinstance(self.function, type):
            got = getattr(self.function, "__name__", type(self.function).__name__)
            raise ValueError(f"FunctionLoss: function must be a function, got {got}")
        super().__post_init__()

    @property
    def rank_term(self) -> Callable[..., Any]:
        return self.function

    def __repr__(self) -> str:
        given = [name_of(self), *(f"{k}={v!r}" for k, v in self.changed().items())]
        return f"FunctionLoss({', '.join(given)})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Frameworks pickle a run's arguments, and nothing reads them: a function that cannot be
        # pickled must not end a run at its first checkpoint.
        try:
            pickle.dumps(self.function)
        except Exception:  # whatever the function holds decides what is raised
            return _lost, (repr(self),)
        return super().__reduce_ex__(protocol)

    def __copy__(self) -> FunctionLoss:
        return self

    def __deepcopy__(self, _: Any) -> FunctionLoss:
        return self


def _lost(text: str) -> Any:
    raise InputError(f"{text} cannot be read back: its function could not be pickled")


def as_loss(loss: object) -> Loss:
    """``loss`` if it is one, or the `FunctionLoss` of a function.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(loss, Loss):
        return loss
    if callable(loss) and not isinstance(loss, type):
        return FunctionLoss(loss)
    got = f"the class {loss.__name__}" if isinstance(loss, type) else type(loss).__name__
    raise TypeError(
        f"loss must be a fastrank loss such as fastrank.RRHF(), or a function of scores and "
        f"rewards, got {got}"
    )


def name_of(loss: Loss) -> str:
    """The name of a loss of one's own, for messages."""
    if isinstance(loss, FunctionLoss):
        return str(getattr(loss.function, "__name__", type(loss.function).__name__))
    return type(loss).__name__


class OwnRanking(NamedTuple):
    """What an own loss computes, differentiable in the token log-probabilities."""

    rank_loss: Tensor
    """[G]"""
    sft_loss: Tensor
    """[G], weight included."""
    scores: Tensor
    """[C] the model's own."""


def own_ranking(
    loss: Loss,
    token_logprobs: Tensor,
    rewards: Tensor,
    *,
    cu_responses: Tensor,
    cu_groups: Tensor,
    reference_scores: Tensor | None,
) -> OwnRanking:
    """Both terms of a loss with an ``own_term`` from token log-probabilities [T]. Arguments as for
    `fastrank.linear_ranking_loss`."""
    rewards = rewards.to(token_logprobs.device)
    scores = sequence_scores(token_logprobs, cu_responses, normalize=loss.normalize)
    rank_loss = own_terms(
        loss, scores, rewards, cu_groups=cu_groups, reference_scores=reference_scores
    )
    spec = RankSpec("pairwise", sft_weight=float(loss.sft_weight))
    weights = fastrank_kernels.sft_weights(rewards, cu_groups, spec, scores.dtype)
    pooled = sequence_scores(token_logprobs, cu_responses, normalize=loss.sft_reduction)
    # Selected, not multiplied: a candidate that is not the best may have a score of -inf.
    terms = torch.where(weights != 0, -weights * pooled, torch.zeros_like(pooled))
    return OwnRanking(rank_loss, fastrank_kernels.segment_sum(terms, cu_groups), scores)


def own_terms(
    loss: Loss,
    scores: Tensor,
    rewards: Tensor,
    *,
    cu_groups: Tensor,
    reference_scores: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Ranking term [G] of each group, differentiable in ``scores`` [C]; ``valid`` (bool [C]) leaves
    candidates out.

    Raises:
        InputError: as `FunctionLoss` says.
    """
    function = loss.own_term
    assert function is not None
    dtype = torch.promote_types(scores.dtype, torch.float32)
    scores, rewards = scores.to(dtype), rewards.to(scores.device, dtype)
    given = parameters(function)
    extra: dict[str, Tensor] = {}
    if reference_scores is not None:
        reference_scores = reference_scores.to(scores.device, dtype)
        if "reference_scores" in given:
            extra["reference_scores"] = reference_scores
        else:
            scores = scores - reference_scores
    elif "reference_scores" in given:
        raise InputError(f"loss {name_of(loss)} takes reference_scores, got none")
    num_groups = cu_groups.numel() - 1
    members = _members(rewards, cu_groups, valid)
    # Attached to the scores, with a gradient of 0, whatever the function is called for.
    terms = torch.where(
        torch.zeros(num_groups, dtype=torch.bool, device=scores.device), scores.sum(), 0.0
    ).to(dtype)
    if not members or loss.rank_weight == 0:
        return terms
    if "cu_groups" in given:
        sizes = [len(own) for _, own in members]
        offsets = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
        index = torch.tensor([i for _, own in members for i in own], device=scores.device)
        parts = {name: values[index] for name, values in extra.items()}
        result = function(scores[index], rewards[index], cu_groups=offsets, **parts)
        found = _checked(loss, result, scores[index], (len(members),))
    else:
        each = []
        for _, own in members:
            index = torch.tensor(own, device=scores.device)
            parts = {name: values[index] for name, values in extra.items()}
            result = function(scores[index], rewards[index], **parts)
            each.append(_checked(loss, result, scores[index], ()))
        found = torch.stack(each)
    at = torch.tensor([g for g, _ in members], device=scores.device)
    return terms.index_add(0, at, found.to(dtype) * loss.rank_weight)


def _members(
    rewards: Tensor, cu_groups: Tensor, valid: Tensor | None
) -> list[tuple[int, list[int]]]:
    """Each group that has a strict pair, and its candidates."""
    values, bounds = rewards.tolist(), cu_groups.tolist()
    kept = [True] * len(values) if valid is None else valid.tolist()
    found = []
    for group, (first, last) in enumerate(itertools.pairwise(bounds)):
        own = [i for i in range(first, last) if kept[i]]
        if own and min(values[i] for i in own) < max(values[i] for i in own):
            found.append((group, own))
    return found


def _checked(loss: Loss, result: Any, scores: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The function's result for ``scores``, if it is one."""
    name = f"loss {name_of(loss)}"
    if isinstance(result, (int, float)) and result == 0 and shape == ():
        return scores.new_zeros(())  # the sum of no pair
    if not isinstance(result, Tensor):
        raise InputError(f"{name} must return a tensor, got {type(result).__name__}")
    if tuple(result.shape) != shape:
        expected = f"[{shape[0]}], one value per group," if shape else "[], a scalar per group,"
        raise InputError(f"{name} must return shape {expected} got {list(result.shape)}")
    if not result.is_floating_point():
        raise InputError(f"{name} must return a floating dtype, got {result.dtype}")
    if not bool(result.isfinite().all()) and bool(scores.isfinite().all()):
        raise InputError(
            f"{name} returned {_first_bad(result)} for {len(scores)} candidates whose scores are "
            "finite"
        )
    if scores.requires_grad and not result.requires_grad and bool((result != 0).any()):
        raise InputError(
            f"{name} must be differentiable in scores, got a value without gradient (detached, or "
            "taken to Python?)"
        )
    return result


def _first_bad(result: Tensor) -> float:
    flat = result.detach().reshape(-1)
    return float(flat[~flat.isfinite()][0])
