"""Random groups, and the separate forward passes that packs must equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastrank.data.packing import Group

VOCAB = 61


def random_groups(
    shapes: Sequence[tuple[int, Sequence[int]]], vocab: int = VOCAB, seed: int = 0
) -> list[Group]:
    """Groups of (prompt length, response lengths) with random tokens and rewards."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> Tensor:
        return torch.randint(0, vocab, (length,), generator=generator)

    return [
        Group(
            draw(prompt),
            tuple(draw(length) for length in responses),
            torch.rand(len(responses), generator=generator),
        )
        for prompt, responses in shapes
    ]


# One-token prompts and responses, a single candidate, ragged numbers and lengths.
RAGGED = [(7, [3, 1, 9]), (1, [4, 2]), (12, [5]), (4, [6, 6, 2, 11])]


def separate_scores(model: nn.Module, groups: Sequence[Group]) -> Tensor:
    """Mean log-probability of every response, each by a forward pass of its own: [C]."""
    scores = []
    for group in groups:
        for response in group.response_ids:
            row = torch.cat((group.prompt_ids, response))[None].to(model.device)
            logits = model(input_ids=row, use_cache=False).logits[0]
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logp = wide.log_softmax(-1)[len(group.prompt_ids) - 1 : -1]
            scores.append(logp.gather(1, response.to(model.device)[:, None]).mean())
    return torch.stack(scores)


def gradients(model: nn.Module, scores: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Parameter gradients of a weighted sum of scores."""
    model.zero_grad(set_to_none=True)
    (scores * weights).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(
    got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> None:
    """Every parameter's gradient within ``tolerance``, absolute on the largest entry's scale."""
    assert got.keys() == expected.keys()
    for name, reference in expected.items():
        scale = max(1.0, float(reference.abs().max()))
        error = float((got[name] - reference).abs().max())
        assert error <= tolerance * scale, f"{name}: {error:.1e} of {scale:.1e}"
