"""One round of online training: fresh candidates of the present model, rewarded and penalised.

The penalty is that of the RRHF paper's online rows: the reward of a response y to x becomes

    r(x, y) − β · [log π(y|x) − log ρ(y|x)]

with π the model as it is at the start of the round and ρ the reference. With ``kl_reduction="sum"``
log π and log ρ are sums over the response's tokens, and for a fresh response, drawn by π at
temperature 1, the bracket is the one-sample, unbiased estimate of the sequence's KL(π ‖ ρ), which
is also what is logged as ``online/kl``. With ``"mean"``, the default, it is that estimate divided
by the response's length: the sum is smallest for the shortest response, and a strong penalty then
teaches the model to say little. For a stored response the bracket is the same ratio, but no
estimate of a divergence. A non-negative estimator would have less variance, but only the order of
the penalised rewards inside a group matters here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrank.console import Bar
from fastrank.data.fields import Ends
from fastrank.data.packing import Group
from fastrank.data.records import spread
from fastrank.data.tokenize import TokenizeOptions
from fastrank.errors import InputError
from fastrank.modeling.score import enough_tokens, score
from fastrank.workflow.candidates import MixtureCounts, add_responses, group_of_item
from fastrank.workflow.generation import Response, batch_seed, generate
from fastrank.workflow.items import PromptItem
from fastrank.workflow.online_data import Round, RoundCandidates
from fastrank.workflow.online_options import OnlineTrainOptions
from fastrank.workflow.policy import EncodedPrompts
from fastrank.workflow.reward import Scorer, check_finite

#: Of stored candidates.
TEXTS_ALONE = "online training takes texts alone as stored candidates: leave it out"

#: The source of a response that the model drew in this round.
FRESH = "online"

Gather = Callable[[list[Any]], list[Any]]


@dataclass
class RoundMaker:
    """Makes rounds; every process of a run has one and makes its share.

    Attributes:
        items: all prompts, with their stored responses.
        encoded: the prompts as tokens.
        options: of the run.
        tokenizer: of the model.
        limit: in tokens of prompt and response.
        scorer: the reward.
        seed: of the run.
        reference: the reference model, prepared; None if neither penalty nor perplexity need it.
        rank, world_size: of this process.
        gather: every process's list, joined, on every process.
        max_tokens: of a pack, for scoring.
    """

    items: Sequence[PromptItem]
    encoded: EncodedPrompts
    options: OnlineTrainOptions
    tokenizer: PreTrainedTokenizerBase
    limit: TokenizeOptions
    scorer: Scorer
    seed: int
    reference: nn.Module | None
    rank: int = 0
    world_size: int = 1
    gather: Gather = list
    max_tokens: int = 16384

    def make(
        self,
        model: nn.Module,
        policy: PreTrainedModel,
        number: int,
        step: int,
        indices: Sequence[int],
    ) -> Round:
        """Sample, reward and penalise candidates for the prompts at ``indices``.

        The batches and their seeds depend on the round and the prompts only, so any number of
        processes draws the same.

        Args:
            model: the prepared model.
            policy: the transformers model in it, which generates.
            number: of the round.
            step: at which it begins.
            indices: prompts, in rising order; those that cannot be sampled for are left out.
        """
        counts = MixtureCounts()
        mine: list[RoundCandidates] = []
        batches = list(self._batches(indices))
        quiet = self.rank > 0
        for batch in Bar(batches, desc=f"round {number}", unit="batches", disable=quiet):
            drawn = self._draw(policy, number, batch)
            mine += self._score(model, batch, self._mix(batch, drawn, counts))
        shares = self.gather([(mine, counts.duplicates, counts.empty)])
        candidates = [own for share, _, _ in shares for own in share]
        return Round(
            number,
            step,
            sorted(candidates, key=lambda own: own.index),
            duplicates=sum(duplicates for _, duplicates, _ in shares),
            empty=sum(empty for _, _, empty in shares),
        )

    def group(self, own: RoundCandidates) -> Group:
        """The candidates as a group to train on."""
        item = self._item(own.index, own.responses, list(own.scores), list(own.ended))
        group = group_of_item(item, self.tokenizer, self.limit)
        assert group is not None and group.num_candidates == len(own.responses)
        return group

    def _item(
        self, index: int, responses: list[str], scores: list[float | None], ended: Ends
    ) -> PromptItem:
        return replace(
            self.items[index],
            responses=responses,
            scores=scores,
            sources=[FRESH] * len(responses),
            ended=ended,
            num_blank=0,
        )

    def _batches(self, indices: Sequence[int]) -> Iterator[_Batch]:
        """This process's batches of a round."""
        chosen = EncodedPrompts([self.encoded.ids[i] for i in indices])
        members = chosen.batches(self.options.online_batch_size)
        for number in range(self.rank, len(members), self.world_size):
            yield _Batch(number, [indices[i] for i in members[number]])

    def _draw(self, policy: PreTrainedModel, number: int, batch: _Batch) -> list[list[Response]]:
        prompts = [self.encoded.ids[i] for i in batch.members]
        seed = batch_seed(self.seed, FRESH, number, batch.number)
        return generate(policy, self.tokenizer, prompts, self.options.decoding, seed)

    def _mix(
        self, batch: _Batch, drawn: list[list[Response]], counts: MixtureCounts
    ) -> list[PromptItem]:
        """Fresh responses before stored ones, blanks and duplicates left out."""
        items = []
        for index, responses in zip(batch.members, drawn, strict=True):
            stored = self._stored(self.items[index])
            fresh = self._item(
                index,
                [r.text for r in responses],
                [None] * len(responses),
                [r.ended for r in responses],
            )
            both = replace(
                fresh,
                responses=[*fresh.responses, *stored.responses],
                scores=fresh.scores + stored.scores,
                sources=fresh.sources + stored.sources,
                ended=fresh.ended + stored.ended,
            )
            items.append(add_responses(both, [], counts))
        return items

    def _stored(self, item: PromptItem) -> PromptItem:
        """At most ``online_stored`` of the file's own responses; the best one first to stay."""
        count = self.options.online_stored
        known = [-math.inf if score is None else score for score in item.scores]
        kept = list(range(len(known)))
        if len(kept) > count:
            kept = spread(known, count) if count > 1 else [known.index(max(known))][:count]
        return item.take(kept)

    def _score(
        self, model: nn.Module, batch: _Batch, items: list[PromptItem]
    ) -> list[RoundCandidates]:
        rewards = self._rewards(items)
        groups = {}
        for i, item in enumerate(items):
            group = group_of_item(item, self.tokenizer, self.limit)
            if group is not None:
                groups[i] = group
        below = self._logprobs(self.reference, [*groups.values()])
        above = below if self.reference is None else self._logprobs(model, [*groups.values()])
        found = []
        for (i, group), own, reference in zip(groups.items(), above, below, strict=True):
            ratio = own - reference
            tokens = torch.tensor(group.label_counts)
            penalty = ratio / tokens if self.options.kl_reduction == "mean" else ratio
            scores = torch.tensor(rewards[i], dtype=torch.float64)
            found.append(
                RoundCandidates(
                    index=batch.members[i],
                    responses=items[i].texts(TEXTS_ALONE),
                    ended=[whole is not False for whole in items[i].ended],
                    fresh=[source == FRESH for source in items[i].sources],
                    rewards=rewards[i],
                    scores=(scores - self.options.kl_weight * penalty).tolist(),
                    log_ratios=ratio.tolist(),
                    reference_logprobs=reference.tolist(),
                    num_tokens=tokens.tolist(),
                )
            )
        return found

    def _rewards(self, items: list[PromptItem]) -> list[list[float]]:
        """Rewards of fresh responses, and of stored ones that have no score yet."""
        missing = [
            item.take([i for i, score in enumerate(item.scores) if score is None]) for item in items
        ]
        made = self.scorer(missing)
        rewards = []
        for item, lacking, values in zip(items, missing, made, strict=True):
            check_finite(lacking, values, str(self.options.reward))
            rest = iter(values)
            known = [next(rest) if score is None else score for score in item.scores]
            if any(value is None for value in known):
                raise InputError(f"{item.place}: {self.options.reward} gives no reward for it")
            rewards.append([float(value) for value in known if value is not None])
        return rewards

    def _logprobs(self, model: nn.Module | None, groups: list[Group]) -> list[Tensor]:
        """Summed log-probabilities of every candidate, float64; zeros without a model."""
        if model is None or not groups:
            return [torch.zeros(group.num_candidates, dtype=torch.float64) for group in groups]
        tokens = enough_tokens(groups, self.max_tokens)
        found = score(model, groups, max_tokens=tokens, normalize="sum")
        return [values.double() for values in found]


class _Batch(NamedTuple):
    number: int
    members: list[int]
