"""Training in two phases: exact gradients in memory that does not grow with the candidates.

A ranking loss couples all candidates of a prompt, so ordinary (joint) training holds the
activations of all of them until the backward. But it couples them through one number per candidate,
and the derivative of the loss by each token's log-probability is known as soon as the scores are:

1. Every candidate is scored without a graph, in packs of any size.
2. The loss gives the coefficients c_t = ∂L/∂logp_t of all response tokens. Only candidates
   whose coefficient is not exactly zero are run again, with a graph, in packs of any size, and each
   pack back-propagates Σ c_t logp_t: by the chain rule, its part of the exact gradient.

With F for a forward pass over the tokens, joint training costs 3F, 4F with gradient checkpointing,
and two phases (1 + 3a)F, a being the share of tokens that is run again. That is less than
checkpointing wherever candidates drop out (RRHF: those already in their place), and never needs
more memory than one pack. The price: a prompt whose candidates do not fit into one pack is encoded
once for each, and both phases have to compute the same function, so a model that is random is
refused. Rates of dropout and noise that its modules state are named first; what they do not state
(a rate read from elsewhere, experts that are sampled) shows in the random numbers that a forward
pass draws.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrank.arguments import check_count
from fastrank.data.candidate_packs import (
    CandidatePack,
    Candidates,
    candidate_packs,
    filler_pack,
)
from fastrank.data.group import check_groups
from fastrank.data.packing import Group, Pack
from fastrank.errors import InputError
from fastrank.function_loss import as_loss
from fastrank.loss import Loss
from fastrank.modeling.dropout import random_rates
from fastrank.modeling.prepare import prepared_state
from fastrank.modeling.unwrap import causal_lm, unwrap, vocab_size
from fastrank.ranking import rank_coefficients
from fastrank.training.engine import Engine, engine_of
from fastrank.training.splitting import CandidateShare
from fastrank.training.step_metrics import work_saved
from fastrank_kernels import live_candidates, reuse_head_cast
from fastrank_kernels.host_memory import send


class TwoPhaseOutput(NamedTuple):
    """Result of `two_phase_backward` on this process. Nothing in it carries gradients."""

    loss: Tensor
    """``rank_loss + sft_loss``: this process's groups, summed, over ``num_groups``."""
    rank_loss: Tensor
    """The ranking term, likewise."""
    sft_loss: Tensor
    """The supervised term with its weight, likewise."""
    scores: Tensor
    """[C] the model's own scores of all candidates, in the order of the groups."""
    token_logprobs: Tensor
    """[T] log-probability of each response token, as phase one saw it."""
    live_fraction: float
    """Share of the response tokens whose candidate has a gradient that is not exactly zero."""
    tokens_joint: int
    """Tokens that joint training would compute and back-propagate, each group in one pack."""
    tokens_scored: int
    """Tokens computed in phase one: the joint ones, and prompts encoded again."""
    tokens_backpropagated: int
    """Tokens computed and back-propagated in phase two."""
    drift: Tensor
    """Largest difference between the two phases' log-probabilities of a token: rounding alone."""

    @property
    def work_saved(self) -> float:
        """As `fastrank.training.step_metrics.work_saved`."""
        return work_saved(self.tokens_joint, self.tokens_scored, self.tokens_backpropagated)


def two_phase_backward(
    model: nn.Module,
    groups: Sequence[Group],
    *,
    loss: Loss | Callable[..., Any],
    max_tokens: int,
    score_tokens: int | None = None,
    num_groups: int | None = None,
    logits_memory: int | None = None,
    backend: str | None = None,
    engine: Engine | None = None,
) -> TwoPhaseOutput:
    """Add the exact gradients of a ranking loss to ``.grad``, pack by pack.

    Takes the place of ``model(pack=..., loss=...).loss.backward()`` over all packs of a step:

        fastrank.prepare_model(model)
        for groups in batches:
            fastrank.two_phase_backward(model, groups, loss=fastrank.RRHF(), max_tokens=8192)
            optimizer.step()
            optimizer.zero_grad()

    Under DDP or FSDP2 every process calls it with its own groups (possibly none), and all of them
    run equally many packs.

    Args:
        model: a prepared model (`fastrank.prepare_model`), wrapped or not.
        groups: this process's share of the step's groups. They may be larger than ``max_tokens``; a
            prompt with one of its responses may not.
        loss: e.g. ``fastrank.RRHF()``, or a function, see `fastrank.FunctionLoss`.
        max_tokens: tokens of a pack that is back-propagated; memory follows from it.
        score_tokens: tokens of a pack that is only scored, default ``max_tokens``. Without a graph
            more fit, and fewer prompts are encoded twice.
        num_groups: divides the sum over groups; default: the groups of all processes.
        logits_memory: as for `fastrank.token_logprobs`.
        backend: as for `fastrank.token_logprobs`.
        engine: how the model is run; default: as PyTorch's DDP or FSDP2 wrapped it.

    Raises:
        InputError: the model has a dropout, router jitter or other randomness, by name.
        TypeError: something else than groups, or a number of them that is no integer.
        ValueError: the model is not prepared, or a candidate does not fit into a pack.
    """
    phases = Phases(
        model,
        loss,
        max_tokens=max_tokens,
        score_tokens=score_tokens,
        logits_memory=logits_memory,
        backend=backend,
        engine=engine,
    )
    groups = check_groups(groups)
    if num_groups is not None:
        check_count("num_groups", num_groups, least=0)
    else:
        num_groups = sum(phases.engine.gather_count(len(groups), phases.device))
    with phases.engine.step(model), reuse_head_cast():
        scored = phases.score(groups)
        ranked = phases.rank(scored, 1.0 / max(num_groups, 1))
        return phases.differentiate(groups, scored, ranked)


class ScoredCandidates(NamedTuple):
    """Result of phase one."""

    candidates: Candidates
    token_logprobs: Tensor
    """[T], on the model's device."""
    num_tokens: int
    """Tokens that were computed."""


class Ranked(NamedTuple):
    """The loss on the scores, and its derivative."""

    rank_loss: Tensor
    """[G], not scaled."""
    sft_loss: Tensor
    """[G], not scaled."""
    scores: Tensor
    """[C]"""
    coefficients: Tensor
    """[T] derivative of ``scale`` times the sum of the losses by each log-probability."""
    scale: float


def rank_candidates(
    loss: Loss,
    candidates: Candidates,
    token_logprobs: Tensor,
    scale: float,
    backend: str | None = None,
) -> Ranked:
    """The loss on log-probabilities [T] that are known, and ``scale`` times its derivative."""
    found = rank_coefficients(
        loss,
        token_logprobs,
        candidates.rewards.to(token_logprobs.dtype),
        cu_responses=candidates.cu_responses,
        cu_groups=candidates.cu_groups,
        reference_scores=candidates.reference_scores,
        scale=scale,
        backend=backend,
    )
    return Ranked(*found, scale)


def weighted_sum(token_logprobs: Tensor, coefficients: Tensor) -> Tensor:
    """Σ c_t logp_t, whose gradients are those of the loss. A coefficient of 0 leaves a token out,
    which may be impossible."""
    kept = torch.where(coefficients != 0, token_logprobs, 0.0)
    return (kept * coefficients).sum()


class Phases:
    """The two passes over packs of one model, in step with the other processes.

    Args and errors as for `two_phase_backward`; ``explain`` gives a context for each pass over a
    pack, to explain its errors.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | Callable[..., Any],
        *,
        max_tokens: int,
        score_tokens: int | None = None,
        logits_memory: int | None = None,
        backend: str | None = None,
        engine: Engine | None = None,
        explain: Callable[[Pack], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        loss = as_loss(loss)
        state = prepared_state(model)
        if state is None:
            raise ValueError(
                f"model must be prepared with fastrank.prepare_model, got {type(model).__name__}"
            )
        check_deterministic(model)
        lm = causal_lm(unwrap(model))
        self.model, self.loss = model, loss
        self.engine = engine or engine_of(model)
        self.max_tokens = max_tokens
        self.score_tokens = score_tokens or max_tokens
        self.device = lm.device
        self.shared_prompts = state.shared_prompts
        self.vocab_size = vocab_size(lm)
        self.backend = backend
        self.how: dict[str, Any] = {"logits_memory": logits_memory, "backend": backend}
        self.explain = explain

    def score(
        self, groups: Sequence[Group], share: CandidateShare | None = None
    ) -> ScoredCandidates:
        """Phase one: the log-probability of every response token, without a graph; where
        processes share candidates, each computes its own."""
        candidates = Candidates.of(groups, self.shared_prompts)
        packs = candidate_packs(
            groups,
            max_tokens=self.score_tokens,
            shared_prompts=self.shared_prompts,
            live=None if share is None else share.own.tolist(),
            vocab_size=self.vocab_size,
        )
        logprobs: Tensor | None = None
        with torch.no_grad():
            for number, chosen in enumerate(self._in_step(packs)):
                with (
                    self.explain(chosen.pack),
                    no_random_numbers(self.model, self.device, watch=number == 0),
                ):
                    found = self._logprobs(chosen.pack)
                if logprobs is None:
                    logprobs = found.new_zeros(candidates.num_response_tokens)
                if len(chosen.tokens):
                    logprobs[send(chosen.tokens, self.device)] = found
            assert logprobs is not None
            if share is not None:
                share.exchange(logprobs, self.engine.add_up)
        return ScoredCandidates(candidates, logprobs, sum(p.pack.num_tokens for p in packs))

    def rank(self, scored: ScoredCandidates, scale: float) -> Ranked:
        """The loss on the scores and its derivative by each log-probability."""
        return rank_candidates(
            self.loss, scored.candidates, scored.token_logprobs, scale, self.backend
        )

    def differentiate(
        self,
        groups: Sequence[Group],
        scored: ScoredCandidates,
        ranked: Ranked,
        share: CandidateShare | None = None,
    ) -> TwoPhaseOutput:
        """Phase two: back-propagate Σ c_t logp_t of this process's candidates that have a
        gradient."""
        candidates, logprobs = scored.candidates, scored.token_logprobs
        # Reading which candidates are live waits for the device.
        live = live_candidates(ranked.coefficients, candidates.cu_responses).cpu()
        packs = candidate_packs(
            groups,
            max_tokens=self.max_tokens,
            shared_prompts=self.shared_prompts,
            live=(live if share is None else live & share.own).tolist(),
        )
        drift = logprobs.new_zeros(())
        # With nothing to learn a filler still runs: gradients of zero, as joint training has them,
        # let an optimiser's momentum and decay go on.
        passes = self._in_step(packs)
        for number, chosen in enumerate(passes):
            last = number == len(passes) - 1
            with self.explain(chosen.pack), self.engine.synchronising(self.model, last):
                found = self._logprobs(chosen.pack)
                if len(chosen.tokens):
                    at = send(chosen.tokens, self.device)
                    total = weighted_sum(found, ranked.coefficients[at]) * self.engine.world_size
                    # The same -inf twice is no difference.
                    now, before = found.detach(), logprobs[at]
                    apart = torch.where(now == before, 0.0, (now - before).abs())
                    drift = torch.maximum(drift, apart.max())
                else:
                    total = found.sum() * 0.0
                with torch.autocast(self.device.type, enabled=False):
                    self.engine.backward(total)
        lengths = candidates.cu_responses.diff()
        rank_loss = ranked.rank_loss.sum() * ranked.scale
        sft_loss = ranked.sft_loss.sum() * ranked.scale
        return TwoPhaseOutput(
            loss=rank_loss + sft_loss,
            rank_loss=rank_loss,
            sft_loss=sft_loss,
            scores=ranked.scores,
            token_logprobs=logprobs,
            live_fraction=int(lengths[live].sum()) / max(candidates.num_response_tokens, 1),
            tokens_joint=candidates.num_tokens,
            tokens_scored=scored.num_tokens,
            tokens_backpropagated=sum(p.pack.num_tokens for p in packs),
            drift=drift,
        )

    def _logprobs(self, pack: Pack) -> Tensor:
        output = self.model(pack=pack.to(self.device, non_blocking=True), **self.how)
        logprobs: Tensor = output.token_logprobs
        return logprobs

    def _in_step(self, packs: list[CandidatePack]) -> list[CandidatePack]:
        """The packs, at least one, and fillers until every process has equally many."""
        rounds = max(1, *self.engine.gather_count(len(packs), self.device))
        missing = rounds - len(packs)
        return packs + ([filler_pack(self.shared_prompts)] * missing if missing else [])


def check_deterministic(model: nn.Module) -> None:
    """Refuse a model with a dropout or jitter: its two phases would compute different functions.

    Raises:
        InputError: naming the rates.
    """
    rates = random_rates(model)
    if rates:
        more = f" and {len(rates) - 3} more" if len(rates) > 3 else ""
        raise InputError(
            "two-phase training needs a model without randomness, expected rates of 0, got "
            f"{', '.join(rates[:3])}{more}; fastrank.modeling.dropout.disable_dropout(model) sets "
            "dropouts to 0, the model's configuration the others"
        )


@contextlib.contextmanager
def no_random_numbers(model: nn.Module, device: torch.device, *, watch: bool) -> Iterator[None]:
    """Raise InputError if the model draws random numbers meanwhile, whatever it does with them:
    some read a rate from their configuration, others sample their experts."""
    if not watch:
        yield
        return
    before = _random_states(device)
    yield
    if any(not torch.equal(a, b) for a, b in zip(before, _random_states(device), strict=True)):
        config = causal_lm(unwrap(model)).config.get_text_config().to_dict()
        named = [
            f"{name}={value}"
            for name, value in config.items()
            if ("drop" in name or "jitter" in name) and isinstance(value, float) and value
        ]
        raise InputError(
            "two-phase training needs a model without randomness, but "
            f"{type(model).__name__} draws random numbers in training mode (its configuration has "
            f"{', '.join(named) or 'no dropout or jitter'})"
        )


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states
