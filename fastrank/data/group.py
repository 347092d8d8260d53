"""One prompt and its tokenised candidates: the unit that is packed and ranked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastrank.data.records import narrowed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Types that float32 cannot hold every value of.
_WIDE = (torch.float64, torch.int64, torch.int32)

#: Stands between prompt and response.
BOUNDARY = "┃"

#: Most characters shown of the prompt's end and of the response's beginning and end.
_SHOWN = 600


@dataclass(frozen=True, eq=False)
class Group:
    """One prompt and its tokenised candidates, in the given order.

    Attributes:
        prompt_ids: int64 [P], P >= 1; any sequence of integers is accepted.
        response_ids: n >= 1 sequences of integers, kept as int64 [R_i], R_i >= 1.
        rewards: float32 [n] (a float64 tensor or array stays one), finite, higher is better. Where
            float32 would make different ones equal, `fastrank.data.records.narrowed` shifts them.
        reference_scores: float32 [n], the reference model's scores, for losses that use them.
        name: where the group comes from, for messages, e.g. ``"data.jsonl:17"``.

    Raises:
        ValueError: an empty prompt (no row would predict the first response token) or response, a
            negative token, a reward that is not finite, lengths that disagree.
        TypeError: token ids that are no integers.
    """

    prompt_ids: Tensor
    response_ids: tuple[Tensor, ...]
    rewards: Tensor
    reference_scores: Tensor | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        where = self.name or "group"
        set_field = object.__setattr__  # the fields are frozen for everyone else
        set_field(self, "prompt_ids", _token_ids(self.prompt_ids, f"{where}: prompt_ids"))
        responses = tuple(
            _token_ids(ids, f"{where}: response_ids[{i}]")
            for i, ids in enumerate(self.response_ids)
        )
        if not responses:
            raise ValueError(f"{where}: response_ids must hold at least one response, got none")
        set_field(self, "response_ids", responses)
        rewards = per_response(self.rewards, len(responses), f"{where}: rewards", ordered=True)
        set_field(self, "rewards", rewards)
        if self.reference_scores is not None:
            scores = per_response(
                self.reference_scores, len(responses), f"{where}: reference_scores"
            )
            set_field(self, "reference_scores", scores)

    def __reduce__(self) -> tuple[Any, ...]:
        # By value: as tensors, every response would take a file descriptor on its way between the
        # processes of a loader.
        reference = None if self.reference_scores is None else self.reference_scores.numpy()
        responses = tuple(ids.numpy() for ids in self.response_ids)
        fields = (self.prompt_ids.numpy(), responses, self.rewards.numpy(), reference, self.name)
        return type(self), fields

    @property
    def num_candidates(self) -> int:
        return len(self.response_ids)

    @property
    def num_response_tokens(self) -> int:
        return sum(len(ids) for ids in self.response_ids)

    @property
    def num_tokens_shared(self) -> int:
        """Tokens with the prompt once: P + sum of R_i."""
        return len(self.prompt_ids) + self.num_response_tokens

    @property
    def num_tokens_separate(self) -> int:
        """Tokens with the prompt before every response: sum of P + R_i."""
        return self.num_candidates * len(self.prompt_ids) + self.num_response_tokens

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest [prompt; response]."""
        return len(self.prompt_ids) + max(len(ids) for ids in self.response_ids)


def _token_ids(ids: Any, what: str) -> Tensor:
    tensor = ids if isinstance(ids, Tensor) else torch.from_numpy(np.array(ids))
    if tensor.ndim != 1 or not tensor.numel():
        raise ValueError(
            f"{what} must be a sequence of at least one token, got shape {tuple(tensor.shape)}"
        )
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{what} must be integers, got {tensor.dtype}")
    tensor = tensor.to(device="cpu", dtype=torch.int64)
    if int(tensor.min()) < 0:
        raise ValueError(f"{what} must not be negative, got {int(tensor.min())}")
    return tensor


def per_response(values: Any, num_candidates: int, what: str, *, ordered: bool = False) -> Tensor:
    """One number for each response, float32 or float64 [n]; ``ordered`` as `Group.rewards` are.

    Raises:
        TypeError: they are no numbers.
        ValueError: another number of them, or one that is not finite.
    """
    # Plain Python floats become float32, as torch makes them; a tensor or array keeps float64.
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(values)
    kind = torch.float64 if getattr(values, "dtype", None) == torch.float64 else torch.float32
    if not isinstance(values, Tensor):
        try:
            values = torch.tensor(values, dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{what} must be numbers, got {values!r}") from error
    values = values.detach().cpu()
    if ordered and values.dtype in _WIDE and values.ndim == 1 and bool(values.isfinite().all()):
        values = torch.tensor(narrowed(values.double().tolist()), dtype=torch.float64)
    values = values.to(kind)
    if values.shape != (num_candidates,):
        raise ValueError(
            f"{what} must have one value for each of {num_candidates} responses, "
            f"got shape {tuple(values.shape)}"
        )
    if not all(map(math.isfinite, values.tolist())):  # of so few numbers, faster than torch's
        raise ValueError(f"{what} must be finite, got {values.tolist()}")
    return values


def example_parts(group: Group, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The name, the prompt and the best response of a group, decoded from its tokens."""
    best = group.response_ids[int(group.rewards.argmax())]
    prompt = _decoded(group.prompt_ids, tokenizer)
    whole = _decoded(torch.cat([group.prompt_ids, best]), tokenizer)
    # Alone, a response would lose the space that some tokenizers have in its first token.
    response = whole[len(prompt) :] if whole.startswith(prompt) else _decoded(best, tokenizer)
    return {"name": str(group.name), "prompt": prompt, "response": response}


def example_text(group: Group, tokenizer: PreTrainedTokenizerBase, *, colour: bool = False) -> str:
    """The same for a person: a heading and the indented text; in colour the prompt is dim."""
    parts = example_parts(group, tokenizer)
    prompt, response = parts["prompt"], parts["response"]
    if len(prompt) > _SHOWN:
        prompt = "…" + prompt[-_SHOWN:]
    if len(response) > _SHOWN:
        half = _SHOWN // 2
        response = f"{response[:half]} … {response[-half:]}"
    dim, bold, plain = ("\x1b[2m", "\x1b[1m", "\x1b[0m") if colour else ("", "", "")
    text = f"{dim}{prompt}{plain}{bold}{BOUNDARY}{response}{plain}"
    lines = text.replace("\n", "\n    ")
    return f"  example     {parts['name']}, its best response after {BOUNDARY}\n    {lines}"


def _decoded(ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
