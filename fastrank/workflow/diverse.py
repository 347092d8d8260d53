"""Diverse beam search (Vijayakumar et al., arXiv:1610.02424) on transformers' plain beam search.

transformers moved its own version out of the library, to code that is fetched from the Hub and run;
fastrank runs no fetched code. A group of beams depends only on the groups before it, so the groups
are searched one after the other, each by the library's beam search (greedy search for one beam),
and a logits processor remembers which tokens a group's beams took at each step and lowers them for
later groups. The result is the algorithm's; the price is one pass over the prompt per group.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor


class DiversityPenalty(LogitsProcessor):
    """Lower a token by ``penalty`` for every beam of an earlier group that took it at this step.

    Args:
        prompt_length: tokens of the (padded) prompts.
        num_prompts: prompts of the batch, B; beams of one prompt stand together.
        penalty: in log-probability, at least 0.
        end_tokens: ids that end a sequence; what stands after one is not counted.
    """

    def __init__(
        self, prompt_length: int, num_prompts: int, penalty: float, end_tokens: Tensor
    ) -> None:
        self._prompt_length = prompt_length
        self._num_prompts = num_prompts
        self._penalty = penalty
        self._end_tokens = end_tokens
        self._earlier: list[list[Tensor]] = []  # per step: [B, k] tokens of each earlier group
        self._current: list[Tensor] = []  # per step: [B, k] tokens of the group being searched

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores`` [B·k, V] less the penalties; ``input_ids`` is [B·k, prompt and steps]."""
        step = input_ids.shape[1] - self._prompt_length
        if step > len(self._current):
            self._remember(input_ids)
        if step >= len(self._earlier):
            return scores
        counts = scores.new_zeros(self._num_prompts, scores.shape[1] + 1)
        for tokens in self._earlier[step]:
            tokens = torch.where(tokens < 0, scores.shape[1], tokens)  # into a column of its own
            counts.scatter_add_(1, tokens, torch.ones_like(tokens, dtype=scores.dtype))
        beams = scores.shape[0] // self._num_prompts
        penalties = self._penalty * counts[:, :-1].repeat_interleave(beams, 0)
        return scores - penalties

    def finish_group(self, sequences: Tensor) -> None:
        """Close a group, whose search gave ``sequences`` [B·k, prompt and steps]."""
        steps = sequences.shape[1] - self._prompt_length
        if steps > len(self._current):  # the last step is followed by no call
            self._remember(sequences[:, : self._prompt_length + len(self._current) + 1])
        for step, tokens in enumerate(self._current):
            if step == len(self._earlier):
                self._earlier.append([])
            self._earlier[step].append(tokens)
        self._current = []

    def _remember(self, input_ids: Tensor) -> None:
        generated = input_ids[:, self._prompt_length :]
        ended = torch.isin(generated[:, :-1], self._end_tokens).any(1)
        tokens = torch.where(ended, -1, generated[:, -1])  # -1: this beam took none
        self._current.append(tokens.view(self._num_prompts, -1))
