"""Random groups, the separate forward passes that packs must equal, and gradients to compare."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import fastrank
from fastrank.data.packing import Group, Pack

VOCAB = 61

# Shapes of groups: (prompt length, response lengths).
# One-token prompts and responses, a single candidate, ragged numbers and lengths.
RAGGED = [(7, [3, 1, 9]), (1, [4, 2]), (12, [5]), (4, [6, 6, 2, 11])]
# Two of these groups are larger than a pack of 24 tokens.
LARGE = [(7, [3, 1, 9]), (1, [4, 2]), (12, [5]), (4, [6, 6, 2, 11, 5, 5, 7]), (9, [15, 3, 8])]


def random_groups(
    shapes: Sequence[tuple[int, Sequence[int]]] = RAGGED,
    vocab: int = VOCAB,
    seed: int = 0,
    *,
    references: bool = False,
    masked: bool = False,
    name: str | None = None,
) -> list[Group]:
    """Groups of random tokens and rewards; with reference scores, and with context inside the
    responses of all groups but the first, if asked for.

    ``name`` numbers the groups: ``"data"`` makes ``data:0``, ``data:1``.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> Tensor:
        return torch.randint(0, vocab, (length,), generator=generator)

    def draw_mask(length: int) -> Tensor:
        mask = torch.rand(length, generator=generator) < 0.6
        mask[int(torch.randint(0, length, (), generator=generator))] = True
        return mask

    return [
        Group(
            draw(prompt),
            tuple(draw(length) for length in responses),
            torch.rand(len(responses), generator=generator),
            -20 * torch.rand(len(responses), generator=generator) if references else None,
            name=f"{name}:{number}" if name else None,
            ranked=tuple(map(draw_mask, responses)) if masked and number else None,
        )
        for number, (prompt, responses) in enumerate(shapes)
    ]


def tied_groups(
    seed: int, max_candidates: int, vocab: int = 32, name: str = "group"
) -> list[Group]:
    """23 groups of 1 to ``max_candidates`` candidates of 1 to 9 tokens, with tied rewards; tokens
    0 to 2 are left to the special ones."""
    generator = random.Random(seed)
    groups = []
    for number in range(23):
        count = generator.randint(1, max_candidates)
        prompt = [generator.randrange(3, vocab) for _ in range(generator.randint(1, 7))]
        responses = [
            [generator.randrange(3, vocab) for _ in range(generator.randint(1, 9))]
            for _ in range(count)
        ]
        rewards = [float(generator.randint(0, 3)) for _ in range(count)]
        groups.append(Group(prompt, responses, rewards, name=f"{name}:{number}"))
    return groups


def one_pack(groups: Sequence[Group] | None = None, **options: bool) -> Pack:
    """All groups (`random_groups` without any) in one pack."""
    (only,) = fastrank.pack(
        random_groups() if groups is None else groups, max_tokens=4096, **options
    )
    return only


def separate_scores(model: nn.Module, groups: Sequence[Group]) -> Tensor:
    """Mean log-probability of the labels of every response, each by a forward pass of its own:
    [C]."""
    scores = []
    for group in groups:
        for response, labels in zip(group.response_ids, response_labels(group), strict=True):
            row = torch.cat((group.prompt_ids, response))[None].to(model.device)
            logits = model(input_ids=row, use_cache=False).logits[0]
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            own = wide[len(group.prompt_ids) - 1 : -1]
            scores.append(-F.cross_entropy(own, labels.to(model.device), ignore_index=-100))
    return torch.stack(scores)


def response_labels(group: Group) -> list[Tensor]:
    """The tokens of every response, −100 where they are not ranked."""
    masks = group.ranked or [ids >= 0 for ids in group.response_ids]
    both = zip(group.response_ids, masks, strict=True)
    return [torch.where(mask, ids, -100) for ids, mask in both]


def separate_loss(model: nn.Module, groups: Sequence[Group], loss: fastrank.Loss) -> Tensor:
    """Mean loss of the groups, supervised term included, on `separate_scores`."""
    means = separate_scores(model, groups)
    counts = [(labels >= 0).sum() for group in groups for labels in response_labels(group)]
    sums = means * torch.stack(counts)
    scores = sums if loss.normalize == "sum" else means
    supervised = sums if loss.sft_reduction == "sum" else means
    sizes = [group.num_candidates for group in groups]
    total = torch.zeros(())
    for group, own, logp in zip(groups, scores.split(sizes), supervised.split(sizes), strict=True):
        scale = (group.num_candidates - 1) ** 2 if isinstance(loss, fastrank.PRO) else 1
        sft = -loss.sft_weight * scale * logp[int(group.rewards.argmax())]
        if loss.uses_reference and group.reference_scores is not None:
            own = own - group.reference_scores
        total = total + fastrank.ranking_loss(own, group.rewards, loss=loss) + sft
    return total / len(groups)


def take_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by parameter name; the model is left without any."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is not None:
            found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    model.zero_grad(set_to_none=True)
    return found


def gradients(model: nn.Module, scores: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Parameter gradients of a weighted sum of scores."""
    model.zero_grad(set_to_none=True)
    (scores * weights).sum().backward()
    return take_gradients(model)


def assert_same_gradients(
    got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> None:
    """Every parameter's gradient within ``tolerance``, absolute on the largest entry's scale."""
    assert got.keys() == expected.keys()
    for name, reference in expected.items():
        scale = max(1.0, float(reference.abs().max()))
        error = float((got[name] - reference).abs().max())
        assert error <= tolerance * scale, f"{name}: {error:.1e} of {scale:.1e}"
