"""Responses of a model to a batch of prompts, through transformers' ``generate``.

A batch is the unit of randomness: its samples depend on its seed, its prompts and their order, and
on nothing that was drawn before, so that work can be done in any order and taken up again. (One
seed per prompt would survive another batch size too, but needs a sampler of our own; batched matrix
products change with the batch's shape anyway, in the last bits.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StopStringCriteria,
)

from fastrank.errors import InputError
from fastrank.options import Decoding


class Response(NamedTuple):
    """One generated response.

    Attributes:
        text: without special tokens and stop texts; it may be empty.
        num_tokens: tokens generated, the end of turn included; with a stop text, those kept.
        ended: the model ended it; False if it was cut at ``max_new_tokens``.
    """

    text: str
    num_tokens: int
    ended: bool


def batch_seed(*parts: object) -> int:
    """A seed from anything with a text: equal parts, equal seed, on every machine.

    >>> batch_seed(0, 1) == batch_seed(0, 1) != batch_seed(1, 0)
    True
    """
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    seed: int,
) -> list[list[Response]]:
    """Draw ``decoding.num_responses`` responses to each prompt.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        prompts: token ids, at least one per prompt; padded on the left here.
        decoding: how to draw.
        seed: of this batch; the caller's random state is left as it was.

    Raises:
        InputError: not enough memory for the batch.
    """
    pad = _pad_token(model, tokenizer)
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    ends = end_tokens(model, tokenizer)
    devices = [model.device] if model.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.no_grad(),
        _only_special_tokens(model, pad, ends),
    ):
        torch.manual_seed(seed)
        try:
            found = _search(
                model, tokenizer, ids.to(model.device), mask.to(model.device), decoding, pad, ends
            )
        except torch.cuda.OutOfMemoryError as error:
            raise InputError(
                f"{len(prompts)} prompts of up to {longest} tokens with {decoding.num_responses} "
                f"responses of {decoding.max_new_tokens} do not fit into memory; lower the batch "
                "size"
            ) from error
    new = found[:, longest:].cpu().tolist()
    n = decoding.num_responses
    return [
        [_response(tokenizer, prompt, new[n * row + k], decoding.stop, ends) for k in range(n)]
        for row, prompt in enumerate(prompts)
    ]


def _check_stop(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
    """Refuse stop texts with a tokenizer in whose output transformers cannot look for them."""
    try:
        StopStringCriteria(tokenizer, list(stop))
    except ValueError as error:
        raise InputError(
            f"stop: this {type(tokenizer).__name__} does not write spaces as they are, and no text "
            "can be looked for; expected none"
        ) from error


def _search(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    mask: Tensor,
    decoding: Decoding,
    pad: int,
    ends: list[int],
) -> Tensor:
    """Token ids [B·n, prompt and response], the responses of a prompt together."""
    options: dict[str, Any] = {"max_new_tokens": decoding.max_new_tokens}
    call: dict[str, Any] = {"attention_mask": mask}
    if decoding.stop:
        _check_stop(tokenizer, decoding.stop)
        options["stop_strings"] = list(decoding.stop)
        call["tokenizer"] = tokenizer
    n = decoding.num_responses
    if decoding.strategy == "top_p":
        options |= {
            "do_sample": True,
            "top_p": 1.0 if decoding.top_p is None else decoding.top_p,
            "temperature": 1.0 if decoding.temperature is None else decoding.temperature,
            "top_k": 0,
            "num_return_sequences": n,
        }
        return _generate(model, ids, options, call)
    if decoding.strategy == "beam":
        return _generate(model, ids, options | _beams(n), call)
    groups = decoding.num_beam_groups or n
    penalty = 1.0 if decoding.diversity_penalty is None else decoding.diversity_penalty
    end_ids = torch.tensor(ends, device=ids.device)
    diversity = DiversityPenalty(ids.shape[1], len(ids), penalty, end_ids)
    call["logits_processor"] = LogitsProcessorList([diversity])
    found = []
    for _ in range(groups):
        sequences = _generate(model, ids, options | _beams(n // groups), call)
        diversity.finish_group(sequences)
        found.append(sequences.view(len(ids), n // groups, -1))
    width = max(group.shape[2] for group in found)
    padded = [torch.nn.functional.pad(g, (0, width - g.shape[2]), value=pad) for g in found]
    return torch.cat(padded, 1).view(len(ids) * n, width)


def _beams(num_beams: int) -> dict[str, Any]:
    return {"do_sample": False, "num_beams": num_beams, "num_return_sequences": num_beams}


def _generate(
    model: PreTrainedModel, ids: Tensor, options: dict[str, Any], call: dict[str, Any]
) -> Tensor:
    search: Any = model.generate
    result = search(ids, generation_config=GenerationConfig(**options), **call)
    assert isinstance(result, Tensor)
    return result


class DiversityPenalty(LogitsProcessor):
    """Lower a token by ``penalty`` for every beam of an earlier group that took it at this step.

    Diverse beam search (Vijayakumar et al., arXiv:1610.02424) on transformers' plain beam search:
    transformers moved its own version to code that is fetched from the Hub and run, and fastrank
    runs no fetched code. A group of beams depends only on the groups before it, so the groups are
    searched one after the other, each by the library's beam search (greedy search for one beam);
    the price is one pass over the prompt per group.

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


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a response: the model's (a chat model may have several) and the tokenizer's."""
    config = model.generation_config
    own = None if config is None else config.eos_token_id
    found = set(own) if isinstance(own, list) else {own}
    return sorted(int(i) for i in found | {tokenizer.eos_token_id} if i is not None)


def _pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to pad with; what it is does not matter, as it is masked."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


@contextmanager
def _only_special_tokens(model: PreTrainedModel, pad: int, ends: list[int]) -> Iterator[None]:
    """Keep a model's own generation defaults out of what was asked for."""
    before = model.generation_config
    config = GenerationConfig(pad_token_id=pad, eos_token_id=ends or None, use_cache=True)
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = before


def _response(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    ids: list[int],
    stop: Sequence[str],
    ends: list[int],
) -> Response:
    at = next((i for i, token in enumerate(ids) if token in ends), None)
    text = continuation(tokenizer, prompt, ids if at is None else ids[:at])
    length = len(ids) if at is None else at + 1
    cut = min((text.find(mark) for mark in stop if mark in text), default=None)
    if cut is None:
        return Response(text, length, at is not None)
    text = text[:cut]
    return Response(text, len(tokenizer.encode(text, add_special_tokens=False)), True)


def continuation(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], ids: Sequence[int]
) -> str:
    """The text that ``ids`` add to a prompt.

    Decoded behind the prompt: many tokenizers drop the space that a first token begins with.
    """
    options: dict[str, Any] = {
        "skip_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    before = str(tokenizer.decode(list(prompt), **options))
    whole = str(tokenizer.decode([*prompt, *ids], **options))
    if whole.startswith(before):
        return whole[len(before) :]
    return str(tokenizer.decode(list(ids), **options))  # a character spans the boundary
