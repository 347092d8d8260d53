"""Looking before leaping: a few tokens through the model when it is prepared.

Two silent errors are caught here that no configuration reveals: a head whose logits are not what
the fused loss would make of its hidden rows, and an architecture on which a response in a shared
pack is not what it is in a row of its own. The cost is a handful of passes over a few tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastrank.data.packing import Group, pack
from fastrank.errors import InputError
from fastrank.modeling.heads import Head, head_in_own_dtype, measure_head, not_plain
from fastrank.modeling.unwrap import vocab_size

_PROMPT_LENGTH, _RESPONSE_LENGTHS = 3, (3, 3)


def probe_group(model: PreTrainedModel) -> Group:
    """A group of random tokens, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    draws = [
        torch.randint(0, vocab_size(model), (length,), generator=generator)
        for length in (_PROMPT_LENGTH, *_RESPONSE_LENGTHS)
    ]
    return Group(draws[0], tuple(draws[1:]), torch.arange(2.0), name="start-up check")


def first_line(error: Exception) -> str:
    """The first line of an exception's text, for messages of one line."""
    return str(error).strip().split("\n", 1)[0]


def probe_head(
    model: PreTrainedModel, forward: Callable[..., Any], hidden_states: Callable[..., Tensor]
) -> Head:
    """Measure the head on one short row; ``forward`` is the model's own."""
    reason = not_plain(model)
    if reason is not None:
        return Head(False, reason)
    group = probe_group(model)
    row = torch.cat((group.prompt_ids, group.response_ids[0]))[None].to(model.device)
    hidden = hidden_states(input_ids=row)
    with head_in_own_dtype(model):
        logits = forward(input_ids=row).logits
    return measure_head(model, hidden[0], logits[0])


def check_causal(model: PreTrainedModel, hidden_states: Callable[..., Tensor]) -> None:
    """Padded rows need that nothing on its right changes a token; raise InputError otherwise."""
    group = probe_group(model)
    row = torch.cat((group.prompt_ids, *group.response_ids))[None].to(model.device)
    cut = len(group.prompt_ids) + len(group.response_ids[0])
    found = _disagreement(
        model, hidden_states(input_ids=row)[0, :cut], hidden_states(input_ids=row[:, :cut])[0]
    )
    if found is not None:
        raise InputError(
            f"{type(model).__name__} is not causal: a token's hidden state depends on those after "
            f"it (relative error {found:.1e}); expected a causal language model"
        )


def check_sharing(
    model: PreTrainedModel,
    pack_hidden: Callable[..., Tensor],
    hidden_states: Callable[..., Tensor],
) -> None:
    """Compare a shared pack with rows of their own; raise InputError where they differ."""
    group = probe_group(model)
    shared = pack(
        [group, Group(group.response_ids[1], group.response_ids, group.rewards)], max_tokens=64
    )[0].to(model.device)
    try:
        packed = pack_hidden(shared)[0]
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        # Architectures that compute with the mask themselves stumble over the layout in its place.
        raise InputError(
            f"{type(model).__name__} cannot share prompts: it fails on a pack "
            f"({type(error).__name__}: {first_line(error)}); use shared_prompts=False"
        ) from error
    assert shared.segments is not None
    together, alone = [], []
    for span in shared.segments.groups:
        prompt = shared.input_ids[0, span.prompt.start : span.prompt.stop]
        for response in span.responses:
            own = shared.input_ids[0, response.start : response.stop]
            together.append(packed[response.start : response.stop])
            path = torch.cat((prompt, own))[None]
            alone.append(hidden_states(input_ids=path)[0, len(prompt) :])
    found = _disagreement(model, torch.cat(together), torch.cat(alone))
    if found is not None:
        raise InputError(
            f"{type(model).__name__} cannot share prompts: a response's hidden states in a pack "
            f"differ from those in a row of its own (relative error {found:.1e}); use "
            "shared_prompts=False"
        )


def _disagreement(model: PreTrainedModel, found: Tensor, expected: Tensor) -> float | None:
    """The relative error of hidden states [S, D] if it is more than rounding, else None.

    In float32 the worst token decides; in lower precisions the median, because a single token may
    flip an expert of a mixture. InputError if a plain row is not finite: then the weights are at
    fault, and no comparison can say anything.
    """
    if not bool(expected.isfinite().all()):
        raise InputError(
            f"{type(model).__name__} gives hidden states that are not finite; expected a model "
            "whose weights are numbers"
        )
    wide = found.element_size() >= 4
    difference = (found.double() - expected.double()).norm(dim=-1)
    relative = difference / expected.double().norm(dim=-1)
    error = float(relative.max() if wide else relative.median())
    return None if error < (3e-3 if wide else 0.1) else error
