"""Start-up checks: a few tokens through the model when it is prepared.

They catch two silent errors that no configuration reveals: a head whose logits differ from those
that the fused loss would compute, and an architecture on which a response in a shared pack differs
from the same response in a row of its own. The cost is a handful of passes over a few tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastrank.data.packing import Group, pack
from fastrank.errors import InputError, one_line
from fastrank.modeling.heads import Head, head_in_own_dtype, measure_head, not_plain
from fastrank.modeling.unwrap import vocab_size


def probe_group(model: PreTrainedModel) -> Group:
    """Group of random tokens, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    prompt, *responses = torch.randint(0, vocab_size(model), (3, 3), generator=generator)
    return Group(prompt, tuple(responses), torch.arange(2.0), name="start-up check")


def probe_head(
    model: nn.Module,
    lm: PreTrainedModel,
    forward: Callable[..., Any],
    hidden_states: Callable[..., Tensor],
) -> Head:
    """Measure the head on one short row; ``forward`` is the model's own."""
    reason = not_plain(model, lm)
    if reason is not None:
        return Head(False, reason)
    group = probe_group(lm)
    row = torch.cat((group.prompt_ids, group.response_ids[0]))[None].to(lm.device)
    hidden = hidden_states(input_ids=row)
    with head_in_own_dtype(lm):
        logits = forward(input_ids=row).logits
        return measure_head(lm, hidden, logits)


def check_causal(model: PreTrainedModel, hidden_states: Callable[..., Tensor]) -> None:
    """Raise InputError if later tokens, such as padding, change a token's hidden state."""
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
    """Raise InputError if hidden states in a shared pack differ from those in separate rows."""
    group = probe_group(model)
    groups = [group, Group(group.response_ids[1], group.response_ids, group.rewards)]
    shared, separate = (
        pack(groups, max_tokens=64, shared_prompts=sharing)[0].to(model.device)
        for sharing in (True, False)
    )
    try:
        packed = pack_hidden(shared)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        # Architectures that compute with the mask themselves fail on the layout in its place.
        raise InputError(
            f"{type(model).__name__} cannot share prompts: it fails on a pack "
            f"({type(error).__name__}: {one_line(error)}); use shared_prompts=False"
        ) from error
    # [1, N, D] and [C, L, D]: the rows of the same labels.
    alone = hidden_states(input_ids=separate.input_ids)
    found = _disagreement(
        model, packed.flatten(0, 1)[shared.rows], alone.flatten(0, 1)[separate.rows]
    )
    if found is not None:
        raise InputError(
            f"{type(model).__name__} cannot share prompts: a response's hidden states in a pack "
            f"differ from those in a row of its own (relative error {found:.1e}); use "
            "shared_prompts=False"
        )


def _disagreement(model: PreTrainedModel, found: Tensor, expected: Tensor) -> float | None:
    """Relative error of hidden states [S, D] if it exceeds rounding, else None.

    The worst token decides in float32, the median in lower precisions, where a single token may be
    routed to another expert. Raises InputError if ``expected``, from plain rows, is not finite:
    then the weights are at fault.
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
