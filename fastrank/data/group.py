"""One prompt and its tokenised candidates: the unit that is packed and ranked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastrank.data.fields import LARGEST_REWARD
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
        ranked: n sequences of booleans, kept as bool [R_i]: the tokens that scores and losses are
            of. The others, turns of a user or a tool inside a candidate, are context. None where
            all are ranked.

    Raises:
        ValueError: an empty prompt (no row would predict the first response token) or response, one
            without a ranked token, a negative token, a reward that is not finite or beyond 1e15,
            lengths that disagree.
        TypeError: token ids that are no integers, a text among them.
    """

    prompt_ids: Tensor
    response_ids: tuple[Tensor, ...]
    rewards: Tensor
    reference_scores: Tensor | None = None
    name: str | None = None
    ranked: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        where = self.name or "group"
        set_field = object.__setattr__  # the fields are frozen for everyone else
        set_field(self, "prompt_ids", _token_ids(self.prompt_ids, f"{where}: prompt_ids"))
        responses = tuple(
            _token_ids(ids, f"{where}: response_ids[{i}]")
            for i, ids in enumerate(_sequences(self.response_ids, f"{where}: response_ids"))
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
        if self.ranked is not None:
            ranked = tuple(torch.as_tensor(mask, dtype=torch.bool).cpu() for mask in self.ranked)
            _check_ranked(ranked, responses, f"{where}: ranked")
            set_field(self, "ranked", None if all(map(torch.all, ranked)) else ranked)

    @classmethod
    def of_marked(
        cls, prompt_ids: Tensor, marked: Sequence[Tensor], rewards: Tensor, name: str
    ) -> Group:
        """The group of which these are the `marked` responses."""
        ranked = tuple(ids >= 0 for ids in marked)
        plain = tuple(
            torch.where(mask, ids, ~ids) for mask, ids in zip(ranked, marked, strict=True)
        )
        return cls(prompt_ids, plain, rewards, name=name, ranked=ranked)

    @property
    def marked(self) -> tuple[Tensor, ...]:
        """The responses' ids, ``~id`` where a token is not ranked: one array for both, in which
        groups are stored and told apart."""
        if self.ranked is None:
            return self.response_ids
        both = zip(self.ranked, self.response_ids, strict=True)
        return tuple(torch.where(mask, ids, ~ids) for mask, ids in both)

    def take(self, members: Sequence[int]) -> Group:
        """The group with the candidates at these positions, in this order."""
        chosen = list(members)
        references, ranked = self.reference_scores, self.ranked
        return Group(
            self.prompt_ids,
            tuple(self.response_ids[i] for i in chosen),
            self.rewards[chosen],
            None if references is None else references[chosen],
            self.name,
            None if ranked is None else tuple(ranked[i] for i in chosen),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # By value: as tensors, every response would take a file descriptor on its way between the
        # processes of a loader.
        reference = None if self.reference_scores is None else self.reference_scores.numpy()
        responses = tuple(ids.numpy() for ids in self.response_ids)
        ranked = None if self.ranked is None else tuple(mask.numpy() for mask in self.ranked)
        rewards = self.rewards.numpy()
        fields = (self.prompt_ids.numpy(), responses, rewards, reference, self.name, ranked)
        return type(self), fields

    @property
    def num_candidates(self) -> int:
        return len(self.response_ids)

    @property
    def num_response_tokens(self) -> int:
        """Tokens of all responses, context included."""
        return sum(len(ids) for ids in self.response_ids)

    @property
    def label_counts(self) -> list[int]:
        """Ranked tokens of each response, the |y| of its score."""
        if self.ranked is None:
            return [len(ids) for ids in self.response_ids]
        return [int(mask.sum()) for mask in self.ranked]

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


def check_groups(groups: Any) -> list[Group]:
    """The groups as a list.

    Raises:
        TypeError: they are something else.
    """
    if isinstance(groups, Group) or not isinstance(groups, Iterable):
        raise TypeError(f"groups must be a sequence of Groups, got {type(groups).__name__}")
    found = list(groups)
    for i, group in enumerate(found):
        if not isinstance(group, Group):
            raise TypeError(
                f"groups[{i}] must be a Group (fastrank.load_groups makes them of records), got "
                f"{type(group).__name__}"
            )
    return found


def _sequences(values: Any, what: str) -> Iterable[Any]:
    if isinstance(values, (str, bytes, dict)) or not isinstance(values, Iterable):
        raise TypeError(f"{what} must be sequences of token ids, got {type(values).__name__}")
    return values


def _token_ids(ids: Any, what: str) -> Tensor:
    if isinstance(ids, Tensor):
        tensor = ids
    else:
        if isinstance(ids, (str, bytes)):
            raise TypeError(f"{what} must be token ids, got a text: tokenise it first")
        try:
            tensor = torch.from_numpy(np.array(ids))
        except (TypeError, ValueError) as error:
            kind = type(ids).__name__
            raise TypeError(f"{what} must be integers that int64 holds, got {kind}") from error
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


def _check_ranked(ranked: Sequence[Tensor], responses: Sequence[Tensor], what: str) -> None:
    if len(ranked) != len(responses):
        raise ValueError(
            f"{what} must have one mask for each of {len(responses)} responses, got {len(ranked)}"
        )
    for i, (mask, ids) in enumerate(zip(ranked, responses, strict=True)):
        if mask.shape != ids.shape:
            expected, got = tuple(ids.shape), tuple(mask.shape)
            raise ValueError(f"{what}[{i}] must have shape {expected}, got {got}")
        if not bool(mask.any()):
            raise ValueError(f"{what}[{i}] must have at least one True, got none")


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
    if ordered and not bool((values.abs() <= LARGEST_REWARD).all()) and values.isfinite().all():
        raise ValueError(f"{what} must lie within ±{LARGEST_REWARD:g}, got {values.tolist()}")
    if ordered and values.dtype in _WIDE and values.ndim == 1 and bool(values.isfinite().all()):
        values = torch.tensor(narrowed(values.double().tolist()), dtype=torch.float64)
    values = values.to(kind)
    if values.shape != (num_candidates,):
        raise ValueError(
            f"{what} must have one value for each of {num_candidates} responses, "
            f"got shape {tuple(values.shape)}"
        )
    numbers = values.tolist()
    if not all(map(math.isfinite, numbers)):  # of so few numbers, faster than torch's
        raise ValueError(f"{what} must be finite, got {numbers}")
    return values


def example_parts(group: Group, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The name, the prompt and the best response of a group, decoded from its tokens; and the texts
    that are ranked, where that is not all of the response."""
    prompt, *pieces = _pieces(group, tokenizer)
    parts = {"name": str(group.name), "prompt": prompt, "response": "".join(pieces)}
    if group.ranked is None:
        return parts
    return parts | {"ranked": [text for text in pieces[::2] if text]}


def example_text(group: Group, tokenizer: PreTrainedTokenizerBase, *, colour: bool = False) -> str:
    """The same for a person: a heading and the indented text, with `BOUNDARY` where what is ranked
    begins and ends; in colour the rest is dim."""
    dim, bold, plain = ("\x1b[2m", "\x1b[1m", "\x1b[0m") if colour else ("", "", "")
    prompt, *pieces = _pieces(group, tokenizer)
    if len(prompt) > _SHOWN:
        prompt = "…" + prompt[-_SHOWN:]
    text = f"{dim}{prompt}{plain}"
    for number, piece in enumerate(pieces):
        if len(piece) > _SHOWN:
            half = _SHOWN // 2
            piece = f"{piece[:half]} … {piece[-half:]}"
        text += f"{dim if number % 2 else bold}{BOUNDARY}{piece}{plain}"
    lines = text.replace("\n", "\n    ")
    what = "its best response" if group.ranked is None else "the assistant's turns of its best"
    return f"  example     {group.name}, {what} after {BOUNDARY}\n    {lines}"


def _pieces(group: Group, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The prompt, and of the best response by turns what is ranked and what is context."""
    best = int(group.rewards.argmax())
    ids = group.response_ids[best]
    ranked = torch.ones(len(ids), dtype=torch.bool) if group.ranked is None else group.ranked[best]
    cuts = (ranked[1:] != ranked[:-1]).nonzero().flatten().add(1).tolist()
    begins = [0, *cuts] if ranked[0] else [0, 0, *cuts]
    before = group.prompt_ids
    pieces = [_decoded(before, tokenizer)]
    for begin, stop in pairwise([*begins, len(ids)]):
        # Alone, a piece would lose the space that some tokenizers have in its first token.
        known = _decoded(before, tokenizer)
        before = torch.cat([before, ids[begin:stop]])
        text = _decoded(before, tokenizer)
        alone = _decoded(ids[begin:stop], tokenizer)
        pieces.append(text[len(known) :] if text.startswith(known) else alone)
    return pieces


def _decoded(ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
