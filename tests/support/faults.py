"""Models that fail on purpose: numbers that are not finite, memory that runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastrank.data.group import Group

TRIGGER = 31
"""A token that spoils the groups it is in; the groups of `clean_groups` have none."""


class InfiniteGradient(torch.autograd.Function):
    """The value as it is; an infinite gradient where ``hit``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, hit: Tensor) -> Tensor:
        ctx.save_for_backward(hit)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (hit,) = ctx.saved_tensors
        return torch.where(hit, torch.full_like(grad, float("inf")), grad), None


def spoil_scores(model: Any) -> None:
    """Hidden rows of the trigger become NaN: the scores show it."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        hit = (inputs[0] == TRIGGER)[..., None]
        return torch.where(hit, torch.full_like(output, float("nan")), output)

    model.get_input_embeddings().register_forward_hook(hook)


def spoil_gradients(model: Any) -> None:
    """Losses and scores stay good; the gradient of the trigger's row is infinite."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return InfiniteGradient.apply(output, (inputs[0] == TRIGGER)[..., None])

    model.get_input_embeddings().register_forward_hook(hook)


def rule_out(model: Any) -> None:
    """The trigger has a probability of exactly 0: a response that holds it scores -inf."""
    head = model.get_output_embeddings()
    bias = torch.zeros(head.out_features)
    bias[TRIGGER] = -torch.inf
    del head.bias
    head.register_buffer("bias", bias)  # as a parameter it would be a weight that is not finite


def limit_memory(model: Any, tokens: int, error: type[Exception] = torch.OutOfMemoryError) -> None:
    """A device that can hold packs of ``tokens`` tokens."""

    def hook(module: nn.Module, inputs: Any) -> None:
        if inputs[0].numel() > tokens:
            raise error("CUDA out of memory. Tried to allocate 20.00 MiB.\nA second line.")

    model.get_input_embeddings().register_forward_pre_hook(hook)


def clean_groups(groups: Iterable[Group], count: int = 24) -> list[Group]:
    """The first groups without a trigger, named ``menu:0``, ``menu:1``."""
    clean = [
        g for g in groups if all(TRIGGER not in ids for ids in (g.prompt_ids, *g.response_ids))
    ]
    return [replace(group, name=f"menu:{i}") for i, group in enumerate(clean)][:count]


def poison(groups: Sequence[Group], positions: Iterable[int]) -> list[Group]:
    """The groups with a trigger in the first response of those at ``positions``."""
    poisoned = list(groups)
    for i in positions:
        first, *rest = poisoned[i].response_ids
        worse = torch.cat((torch.tensor([TRIGGER]), first))
        poisoned[i] = replace(poisoned[i], response_ids=(worse, *rest))
    return poisoned


Inject = Callable[[Any], None]
