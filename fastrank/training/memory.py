"""Out of memory: which pack it was, what to lower, and a search for a size that fits."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from fastrank.data.columns import group_sizes
from fastrank.data.packing import Group, Pack, pack
from fastrank.errors import TrainingStopped
from fastrank.losses import Loss
from fastrank.training.config import RankConfig

_GRANULARITY = 0.05  # the search stops when the bounds are this close, relative to the upper one


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that an allocation failed, on a device or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "not enough memory" in text or "out of memory" in text
    )


def describe_out_of_memory(failing: Pack, max_tokens: int, *, whole_groups: bool = True) -> str:
    """One line: the contents of the pack, and the option to lower. One of ``whole_groups`` cannot
    be made smaller than a group, one of candidates not smaller than a response."""
    holds = f"{failing.num_candidates} candidates and {failing.num_tokens} tokens"
    unit, count = "response", failing.num_candidates
    lower = "--max_response_length or --max_prompt_length"
    search = ""
    if whole_groups:
        unit, count = "group", failing.num_groups
        holds = f"{count} groups, {holds}"
        lower = "--max_response_length, --max_prompt_length or --max_candidates"
        search = " or pass --auto_find_pack_size true"
    if count > 1:
        advice = f"lower --max_tokens ({max_tokens}){search}"
    else:
        name = f" ({failing.names[0]})" if failing.names and failing.names[0] else ""
        advice = f"it holds one {unit}{name}, so a lower --max_tokens does not help: lower {lower}"
    return (
        f"out of memory in a pack of {holds}: {advice}; "
        "--gradient_checkpointing true saves memory at the price of time"
    )


@contextlib.contextmanager
def explained_out_of_memory(
    failing: Pack, max_tokens: int, *, whole_groups: bool = True
) -> Iterator[None]:
    """Turn a failed allocation into one line that names the pack and the setting to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        message = describe_out_of_memory(failing, max_tokens, whole_groups=whole_groups)
        raise TrainingStopped(message) from error


def find_pack_size(fits: Callable[[int], bool], smallest: int, largest: int) -> int | None:
    """The largest budget in [smallest, largest] that ``fits``, to within 5 %; None if none does.

    Tries ``largest`` first, so that a run with enough memory pays for one trial; then halves
    down to a budget that fits and bisects between it and the last that did not.
    """
    good, too_large = (largest, largest) if fits(largest) else (None, largest)
    while good is None or too_large - good > max(1, _GRANULARITY * too_large):
        if good is None and too_large <= smallest:
            return None
        trial = max(smallest, too_large // 2) if good is None else (good + too_large) // 2
        if fits(trial):
            good = trial
        else:
            too_large = trial
    return good


def largest_fitting(
    model: nn.Module,
    groups: Sequence[Group],
    loss: Loss,
    args: RankConfig,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]],
) -> int:
    """The largest ``max_tokens``, at most the one set, with which a full pack can be trained on.

    Tried with the fullest packs that the groups give, forward and backward, beside as much
    memory as AdamW's states will take. The model comes back without gradients. Nothing is
    communicated.

    Raises:
        TrainingStopped: not even the largest group fits.
    """
    smallest = int(group_sizes(groups).pack_tokens(args.shared_prompts).max())
    copies = 2 if args.world_size == 1 else 3  # AdamW's two averages; DDP's buckets
    weights = [p for p in model.parameters() if p.requires_grad]
    packs: dict[int, Pack] = {}

    def fits(budget: int) -> bool:
        chosen = fullest(groups, budget, args.shared_prompts)
        (packs[budget],) = pack(chosen, max_tokens=budget, shared_prompts=args.shared_prompts)
        model.train()
        try:
            reserved = [torch.empty_like(p) for _ in range(copies) for p in weights]
            with autocast():
                output = model(pack=packs[budget].to(args.device), loss=loss, reduction="sum")
            output.loss.backward()
            del reserved
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            model.zero_grad(set_to_none=True)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return True

    found = find_pack_size(fits, smallest, max(args.max_tokens, smallest))
    if found is None:
        raise TrainingStopped(describe_out_of_memory(packs[min(packs)], min(packs)))
    return found


def fullest(groups: Sequence[Group], max_tokens: int, shared_prompts: bool) -> list[Group]:
    """Groups that together come close to a budget: the largest that still fits, again and again."""
    sizes = group_sizes(groups)
    chosen: list[int] = []
    rows = length = used = 0
    for i in np.argsort(-sizes.pack_tokens(shared_prompts), kind="stable").tolist():
        if shared_prompts:
            after = used + int(sizes.num_tokens[i])
        else:
            longest = max(length, int(sizes.longest_sequence[i]))
            after = (rows + int(sizes.num_candidates[i])) * longest
        if after <= max_tokens:
            chosen.append(i)
            used = after
            rows += int(sizes.num_candidates[i])
            length = max(length, int(sizes.longest_sequence[i]))
    return [groups[i] for i in chosen]
