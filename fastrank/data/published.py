"""One prompt as the papers' scripts compute it: for whoever has to reproduce their runs.

The scripts and the papers differ, and fastrank computes the papers' formulas. RRHF's script
(arXiv:2304.05302) counts the padding: it divides every sum of log-probabilities by the length of
the prompt's padded rows, in the supervised term too. It scores the BOS that its tokenizer puts
before each response, and cuts long queries on the right, which leaves no room for a response. PRO's
script (arXiv:2306.17492) compares in the order of the file, adds 1e-10 inside a logarithm without a
log-sum-exp, and lets every candidate but the longest end in the EOS that pads it.

Both take one prompt at a time, because the padded length is a prompt's own:

    group, loss = rrhf_script(query, responses, scores, tokenizer)
    (pack,) = fastrank.pack([group], max_tokens=4096)
    model(pack=pack, loss=loss).loss.backward()
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastrank.data.group import Group
from fastrank.errors import InputError
from fastrank.loss import Loss
from fastrank.losses import RRHF


class ScriptPrompt(NamedTuple):
    """A prompt and its candidates as a script tokenises them, and its loss for them."""

    group: Group
    loss: Loss


@dataclasses.dataclass(frozen=True, repr=False)
class ScriptPRO(Loss):
    """PRO's ranking term as its script has it: stages in the given order, whatever the rewards are,
    and ``log(1e-10 + Σ exp)``, which overflows and underflows."""

    def rank_term(self, scores: Tensor, rewards: Tensor) -> Tensor:
        total = scores.new_zeros(())
        for k in range(len(scores) - 1):
            gaps = rewards[k] - rewards[k + 1 :]
            own = scores[k] * gaps.max()
            others = torch.exp(scores[k + 1 :] * gaps).sum()
            total = total + torch.log(1e-10 + own.exp() + others) - own
        return total


def rrhf_script(
    query: str,
    responses: Sequence[str],
    scores: Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 512,
    rrhf_weight: float = 100.0,
    length_penalty: float = 1.0,
) -> ScriptPrompt:
    """What RRHF's ``train.py`` computes for a prompt, in its collator, ``get_score``, ``rrhf_loss``
    and ``sft_loss``.

    Args:
        query, responses, scores: a record; higher scores are better.
        tokenizer: adds a BOS to every text, if it does.
        max_length: ``model_max_length``, of query and response together.
        rrhf_weight: weight of the ranking term; 100 in the script, 1 in its command line.
        length_penalty: exponent of the padded length in a score.

    Raises:
        InputError: the query leaves no room for a response.
    """
    with _cutting(tokenizer, "right"):
        prompt = _ids(tokenizer, query, max_length)
        room = max_length - len(prompt)
        if room < 1:
            raise InputError(f"query must be shorter than max_length={max_length}, got no room")
        rows = [_ids(tokenizer, f"{text}{tokenizer.eos_token}", room) for text in responses]
    padded = len(prompt) + max(map(len, rows))
    loss = RRHF(
        normalize="sum",
        rank_weight=rrhf_weight / padded**length_penalty,
        sft_weight=1 / padded,
        sft_reduction="sum",
    )
    return ScriptPrompt(_group(prompt, rows, scores), loss)


def pro_script(
    prefix: str,
    suffixes: Sequence[str],
    rewards: Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sft_index: int = 0,
    max_length: int = 512,
    sft_weight: float = 0.05,
) -> ScriptPrompt:
    """What PRO's script computes for a prompt that is a batch of its own, on the dialogue task:
    ``train_data_collator`` and ``compute_loss``.

    Where all rewards are equal the script's ranking term is a constant, here it is 0.

    Args:
        prefix, suffixes, rewards, sft_index: a record, in the order of the stages.
        tokenizer: of the model.
        max_length: ``block_size``; a prefix may take all but 128 tokens of it.
        sft_weight: multiplied by (n − 1)²; 0.05 in the script's command line.

    Raises:
        InputError: the supervised candidate is not the first of the best, or a suffix changes the
            tokens of its prefix.
    """
    if sft_index != max(range(len(rewards)), key=lambda i: (rewards[i], -i)):
        raise InputError(f"sft_index must be that of the first of the best, got {sft_index}")
    for tag, turn in (("<|prompter|>", "\n\nHuman: "), ("<|assistant|>", "\n\nAssistant: ")):
        prefix = prefix.replace(tag, turn)
    with _cutting(tokenizer, "left"):
        kept = _ids(tokenizer, prefix.rstrip(), max_length - 128)
    prefix = str(tokenizer.decode(kept, skip_special_tokens=True))
    with _cutting(tokenizer, "right"):
        rows = [_ids(tokenizer, f"{prefix} {suffix}", max_length) for suffix in suffixes]
    start, longest = len(tokenizer(prefix)["input_ids"]), max(map(len, rows))
    prompt = rows[0][:start]
    if any(row[:start] != prompt for row in rows):
        raise InputError(f"the tokens of the prefix {prefix[-20:]!r} depend on what follows")
    end = [tokenizer.eos_token_id]
    responses = [row[start:] + end * (len(row) < longest) for row in rows]
    weight = sft_weight * (len(rows) - 1) ** 2
    loss = ScriptPRO(sft_weight=weight, sft_reduction="sum")
    return ScriptPrompt(_group(prompt, responses, rewards), loss)


def _group(prompt: list[int], responses: list[list[int]], rewards: Sequence[float]) -> Group:
    rows = tuple(torch.tensor(row, dtype=torch.int64) for row in responses)
    return Group(torch.tensor(prompt), rows, torch.tensor(rewards, dtype=torch.float64))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, most: int) -> list[int]:
    found: list[int] = tokenizer(text, max_length=most, truncation=True)["input_ids"]
    return found


@contextmanager
def _cutting(tokenizer: PreTrainedTokenizerBase, side: Literal["left", "right"]) -> Iterator[None]:
    before, tokenizer.truncation_side = tokenizer.truncation_side, side
    try:
        yield
    finally:
        tokenizer.truncation_side = before
