"""The papers' metrics of a policy: reward, perplexity, ranking accuracy, BLEU, wins.

Everything here works on loaded models and on samples in memory; `fastrank.workflow.evaluate` is
the command around it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrank.data.load import fit_context
from fastrank.data.packing import Group
from fastrank.data.tokenize import TokenizeOptions
from fastrank.metrics import ranking_metrics
from fastrank.modeling.context import context_length
from fastrank.modeling.score import enough_tokens, score
from fastrank.options import DecodingOptions
from fastrank.workflow.candidates import group_of_item
from fastrank.workflow.generation import Response
from fastrank.workflow.items import PromptItem
from fastrank.workflow.policy import draw, encode_prompts

_PACK_TOKENS = 16384


@dataclass(frozen=True)
class Samples:
    """Fresh responses to prompts, in the prompts' order.

    Attributes:
        items: each prompt with its responses; an empty response is kept, it counts.
        num_tokens: tokens generated.
    """

    items: list[PromptItem]
    num_tokens: int

    @property
    def num_responses(self) -> int:
        return sum(len(item.responses) for item in self.items)


def sample_items(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[PromptItem],
    drawing: DecodingOptions,
    *,
    source: str,
    progress: Callable[[int], Any] = lambda done: None,
) -> Samples:
    """Draw fresh responses; those that the items have are left aside.

    Two policies drawn with the same options get the same seeds, batch by batch.
    """
    encoded = encode_prompts(
        [item.prompt for item in items],
        tokenizer,
        drawing,
        context_length(model.config),
        as_chat=drawing.as_chat,
        tools=[item.tools for item in items],
    )
    found: list[list[Response]] = [[] for _ in items]
    batches = draw(
        model, tokenizer, encoded, drawing, batch_size=drawing.batch_size, seed=drawing.seed
    )
    for _, members, batch in batches:
        for i, responses in zip(members, batch, strict=True):
            found[i] = responses
        progress(len(members))
    drawn = []
    for item, responses in zip(items, found, strict=True):
        bare = drawing.as_chat or not isinstance(item.prompt, str)
        texts = [r.text.strip() if bare else r.text for r in responses]
        drawn.append(
            replace(
                item,
                responses=texts,
                scores=[None] * len(texts),
                sources=[source] * len(texts),
                ended=[r.ended for r in responses],
            )
        )
    return Samples(drawn, sum(r.num_tokens for row in found for r in row))


@dataclass(frozen=True)
class MeanReward:
    """Mean over prompts of their mean rewards, with its standard error."""

    mean: float
    standard_error: float
    num_prompts: int


def mean_reward(rewards: Sequence[Sequence[float | None]]) -> MeanReward:
    """The mean reward of samples; prompts without a reward are left out, none at all gives NaN."""
    means = [mean for mean in prompt_means(rewards) if mean is not None]
    if not means:
        return MeanReward(math.nan, math.nan, 0)
    spread = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return MeanReward(statistics.fmean(means), spread, len(means))


def prompt_means(rewards: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Mean reward per prompt, None where nothing was scored."""
    known = [[value for value in row if value is not None] for row in rewards]
    return [statistics.fmean(row) if row else None for row in known]


def compare_rewards(
    first: Sequence[Sequence[float | None]], second: Sequence[Sequence[float | None]]
) -> dict[str, int]:
    """Count the prompts whose first mean reward is above (win), equal to or below the second.

    >>> compare_rewards([[1.0], [2.0, 0.0], [0.0]], [[0.0], [1.0], [3.0]])
    {'win': 1, 'tie': 1, 'lose': 1}
    """
    counts = {"win": 0, "tie": 0, "lose": 0}
    for a, b in zip(prompt_means(first), prompt_means(second), strict=True):
        if a is not None and b is not None:
            counts["win" if a > b else "lose" if a < b else "tie"] += 1
    return counts


def perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Samples,
    *,
    as_chat: bool = False,
) -> float:
    """exp of the mean negative log-probability of the samples' tokens under a causal model.

    The mean is over all tokens of all responses, given their prompts. The end of turn counts where
    the policy itself ended the response, not where it was cut off.

    Args:
        model: a transformers causal language model, prepared or not.
        tokenizer: its tokenizer, which may differ from the policy's.
        samples: drawn responses.
        as_chat: text prompts are one user message.
    """
    limit = fit_context(TokenizeOptions(as_chat=as_chat), context_length(model.config))  # type: ignore[arg-type]
    groups = []
    for item in samples.items:
        group = group_of_item(item, tokenizer, limit)
        if group is not None:
            groups.append(group)
    if not groups:
        return math.nan
    tokens_at_once = enough_tokens(groups, _PACK_TOKENS)
    found = score(model, groups, max_tokens=tokens_at_once, normalize="sum")
    total = math.fsum(float(values.double().sum()) for values in found)
    tokens = sum(number for group in groups for number in group.label_counts)
    return math.exp(min(-total / tokens, 700.0))


def ranking_accuracy(model: nn.Module, groups: Sequence[Group]) -> dict[str, float]:
    """Metrics of the order of the model's scores; see `fastrank.metrics.ranking_metrics`."""
    found = score(model, groups, max_tokens=enough_tokens(groups, _PACK_TOKENS))
    return ranking_metrics(found, [group.rewards for group in groups])


def bleu(samples: Samples, references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU of every response against its prompt's references, by sacrebleu (0 to 100).

    Args:
        samples: drawn responses.
        references: of each prompt; responses to a prompt without any are left out.

    Raises:
        ModuleNotFoundError: sacrebleu is not installed (the extra ``eval``).
    """
    from sacrebleu import corpus_bleu

    hypotheses, beside = [], []
    for item, own in zip(samples.items, references, strict=True):
        for response in item.texts("BLEU compares texts") if own else ():
            hypotheses.append(response)
            beside.append(own)
    if not hypotheses:
        return math.nan
    most = max(map(len, beside))
    # sacrebleu takes None for a reference that is not there.
    streams: Any = [[own[k] if k < len(own) else None for own in beside] for k in range(most)]
    return float(corpus_bleu(hypotheses, streams).score)
