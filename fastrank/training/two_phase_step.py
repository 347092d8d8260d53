"""Two-phase training inside `RankTrainer`: its step, its evaluation, its guards.

Which candidates are packed is known only after they were scored, so the loader hands on groups.
Every process takes its share of a step's groups, whole ones, of like size in tokens; a group larger
than a pack is cut by `fastrank.training.two_phase`. The alternative, spreading the candidates of a
group over processes, would balance better and exchange scores in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastrank.data.packing import Group, Pack
from fastrank.losses import Loss
from fastrank.outputs import RankingOutput
from fastrank.training.batching import StepBatch
from fastrank.training.engine import Engine, Synchronising
from fastrank.training.evaluation import Evaluated
from fastrank.training.memory import explained_out_of_memory
from fastrank.training.step_metrics import HasCandidates, StepWindow
from fastrank.training.two_phase import Phases


def trainer_phases(
    model: nn.Module,
    loss: Loss,
    *,
    max_tokens: int,
    world_size: int,
    synchronising: Synchronising,
    backward: Callable[[Tensor], Any],
) -> Phases:
    """The phases as a trainer's engine runs them; out of memory, the pack is named."""
    engine = Engine(
        world_size=world_size,
        synchronising=synchronising,
        backward=backward,
        computing=lambda pack: explained_out_of_memory(pack, max_tokens, _describe_candidates),
    )
    return Phases.of(model, loss, max_tokens=max_tokens, engine=engine)


def two_phase_step(
    phases: Phases, batch: StepBatch, window: StepWindow
) -> tuple[Tensor, list[tuple[HasCandidates, RankingOutput]]]:
    """Accumulate the gradients of a step.

    Returns:
        The loss as ``training_step`` has to return it (times the number of processes), and this
        process's groups with their sums of losses, if it has any.
    """
    scored = phases.score(batch.groups)
    ranked = phases.rank(scored, 1.0 / batch.num_groups)
    output = phases.differentiate(batch.groups, scored, ranked)
    window.add_work(output.tokens_joint, output.tokens_scored, output.tokens_backpropagated)
    total = output.loss * phases.engine.world_size
    if not batch.groups:
        return total, []
    sums = RankingOutput(
        loss=output.loss * batch.num_groups,
        rank_loss=output.rank_loss * batch.num_groups,
        sft_loss=output.sft_loss * batch.num_groups,
        scores=output.scores,
        token_logprobs=output.token_logprobs,
    )
    return total, [(scored.candidates._replace(group_index=batch.members), sums)]


def evaluate_groups(
    phases: Phases, batches: Iterable[StepBatch], on_step: Callable[[], None]
) -> Iterator[Evaluated]:
    """Phase one alone over every batch; all processes must take equally many."""
    for batch in batches:
        scored = phases.score(batch.groups)
        ranked = phases.rank(scored, 1.0)
        on_step()
        output = RankingOutput(
            loss=ranked.rank_loss + ranked.sft_loss,
            rank_loss=ranked.rank_loss,
            sft_loss=ranked.sft_loss,
            scores=ranked.scores,
            token_logprobs=scored.token_logprobs,
        )
        if batch.groups:
            yield Evaluated(output, scored.candidates, batch.members)


def is_sound(
    model: nn.Module, group: Group, loss: Loss, max_tokens: int, weights: Sequence[Tensor]
) -> bool:
    """Whether a group by itself has a finite loss and gradient. ``.grad`` is left alone, and
    nothing is communicated."""
    found = [True]

    def look(total: Tensor) -> None:
        grads = torch.autograd.grad(total, weights, allow_unused=True)
        found.append(all(bool(g.isfinite().all()) for g in grads if g is not None))

    phases = Phases.of(model, loss, max_tokens=max_tokens, engine=Engine(backward=look))
    scored = phases.score([group])
    ranked = phases.rank(scored, 1.0)
    if not bool((ranked.rank_loss + ranked.sft_loss).isfinite().all()):
        return False
    phases.differentiate([group], scored, ranked)
    return all(found)


def _describe_candidates(failing: Pack, max_tokens: int) -> str:
    """As `fastrank.training.memory.describe_groups`, of a pack that holds parts of groups."""
    what = f"{failing.num_candidates} candidates and {failing.num_tokens} tokens"
    if failing.num_candidates > 1:
        return f"{what}: lower --max_tokens ({max_tokens})"
    alone = f" ({failing.names[0]})" if failing.names[0] else ""
    return (
        f"{what}: it holds one response{alone}, so a lower --max_tokens does not help: lower "
        "--max_response_length or --max_prompt_length"
    )
