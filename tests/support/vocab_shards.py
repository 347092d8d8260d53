"""The fused losses with the vocabulary divided among processes: ``vocab_shards.py OUT``.

Every process holds an uneven part of a head, computes every case in float64, and checks it against
the whole head, which it has too; what differs between processes it leaves for the test to compare.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import fastrank
from fastrank import losses
from fastrank.loss import Loss
from fastrank_kernels import planner, reference

VOCABULARY, WIDTH = 103, 8
SIZES = (3, 5, 1, 4)
ROWS = 24  # of a small budget: some groups fit, not all


def all_losses() -> list[Loss]:
    """Every loss with its defaults, and some variants."""
    made = [cls() for cls in vars(losses).values() if _is_loss(cls)]
    return [*made, fastrank.PRO(top_k=1), fastrank.RRHF(margin=0.5, sft_reduction="sum")]


def _is_loss(cls: Any) -> bool:
    public = getattr(cls, "__name__", None) in fastrank.__all__
    return public and isinstance(cls, type) and issubclass(cls, Loss) and cls is not Loss


class Problem:
    """Hidden rows, head, labels and rewards, the same on every process."""

    def __init__(self, world_size: int, rank: int, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(7)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        lengths = torch.randint(1, 7, (sum(SIZES),), generator=generator)
        self.tokens = int(lengths.sum())
        self.cu_responses = _offsets(lengths)
        self.cu_groups = _offsets(torch.tensor(SIZES))
        self.hidden = random(self.tokens - 2, WIDTH)
        self.rows = torch.randint(0, self.tokens - 2, (self.tokens,), generator=generator)
        self.weight, self.bias = 2 * random(VOCABULARY, WIDTH), random(VOCABULARY)
        self.labels = torch.randint(0, VOCABULARY, (self.tokens,), generator=generator)
        self.rewards = torch.randint(0, 3, (sum(SIZES),), generator=generator).to(dtype)
        # Uneven, and the last process has the least.
        shares = torch.arange(world_size, 0, -1).double().cumsum(0)
        ends = [0, *(VOCABULARY * shares / shares[-1]).long().tolist()]
        self.own = slice(ends[rank], ends[rank + 1])
        self.largest = max(b - a for a, b in zip(ends, ends[1:], strict=False))

    def inputs(self, own: bool, frozen: bool) -> tuple[Tensor, Tensor, Tensor]:
        at = self.own if own else slice(None)
        return (
            self.hidden.clone().requires_grad_(),
            self.weight[at].clone().requires_grad_(not frozen),
            self.bias[at].clone().requires_grad_(not frozen),
        )

    def small_budget(self) -> int:
        """For the logits of some groups but not of all, planned for the largest part."""
        return ROWS * planner.row_pitch(self.largest) * self.hidden.element_size()


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0))).int()


class Collectives:
    """Counts the collectives of the fused losses, by their shape."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def __enter__(self) -> Collectives:
        original = dist.all_reduce

        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            kinds = {1: "top", WIDTH: "hidden"}
            last = tensor.shape[-1] if tensor.dim() == 2 else 1
            pair = tensor.dim() == 2 and tensor.shape[0] == 2 and last != WIDTH
            self.seen["pair" if pair else kinds[last]] += 1
            return original(tensor, *args, **kwargs)

        self._patch = mock.patch.object(dist, "all_reduce", counted)
        self._patch.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._patch.__exit__(*error)


def ranking_cases(problem: Problem) -> Iterator[tuple[str, dict[str, Any]]]:
    for loss in all_losses():
        yield f"{loss} group", {"loss": loss}
    small = problem.small_budget()
    for loss in (fastrank.RRHF(), fastrank.ListMLE(), fastrank.DPO()):
        for budget in (small, 1):
            yield f"{loss} {budget}", {"loss": loss, "logits_memory": budget}
            yield f"{loss} {budget} frozen", {"loss": loss, "logits_memory": budget, "frozen": True}
        yield f"{loss} none", {"loss": loss, "reduction": "none"}
        yield f"{loss} frozen", {"loss": loss, "frozen": True}
        yield f"{loss} plain", {"loss": loss, "softcap": None, "logit_scale": 1.0}


def compute(problem: Problem, group: Any, *, frozen: bool = False, **options: Any) -> list[Tensor]:
    """Values, then gradients of a non-uniform function of the loss."""
    hidden, weight, bias = problem.inputs(group is not None, frozen)
    how = {"softcap": 5.0, "logit_scale": 0.7, **options}
    output = fastrank.linear_ranking_loss(
        hidden, weight, problem.labels, problem.rewards, rows=problem.rows, bias=bias,
        cu_responses=problem.cu_responses, cu_groups=problem.cu_groups, vocab_group=group, **how,
    )  # fmt: skip
    upstream = torch.linspace(0.5, 2.0, output.loss.numel(), dtype=output.loss.dtype)
    (output.loss.reshape(-1) * upstream).sum().backward()
    grads = [tensor.grad for tensor in (hidden, weight, bias) if tensor.grad is not None]
    return [t.detach() for t in output] + grads


def compute_logprobs(problem: Problem, group: Any, budget: int | None, frozen: bool) -> Any:
    hidden, weight, bias = problem.inputs(group is not None, frozen)
    found = fastrank.token_logprobs(
        hidden, weight, problem.labels, rows=problem.rows, bias=bias, softcap=5.0,
        logits_memory=budget, vocab_group=group,
    )  # fmt: skip
    (found * torch.linspace(-1.0, 2.0, len(found), dtype=found.dtype)).sum().backward()
    return [found.detach(), *(t.grad for t in (hidden, weight, bias) if t.grad is not None)]


def error(got: list[Tensor], whole: list[Tensor], own: slice) -> float:
    """The largest difference; of the head's gradients in this process's rows."""
    worst = 0.0
    for found, wanted in zip(got, whole, strict=True):
        wanted = wanted if found.shape == wanted.shape else wanted[own]
        assert found.shape == wanted.shape and bool(found.isfinite().all())
        worst = max(worst, float((found - wanted).abs().max()))
    return worst


def narrow_errors(world_size: int, rank: int, group: Any) -> dict[str, list[tuple[float, float]]]:
    """In bfloat16: of each result the error against float64 with the divided and the whole head."""
    narrow, wide = Problem(world_size, rank, torch.bfloat16), Problem(world_size, rank)
    for name in ("hidden", "weight", "bias"):
        setattr(wide, name, getattr(narrow, name).double())
    found = {}
    for loss in (fastrank.RRHF(), fastrank.ListMLE(), fastrank.DPO()):
        for budget in (None, narrow.small_budget(), 1):
            options = {"loss": loss, "logits_memory": budget}
            exact = compute(wide, None, **options)
            divided, whole = (compute(narrow, g, **options) for g in (group, None))
            found[f"{loss} {budget}"] = [
                (error([d], [e], wide.own), error([w], [e], slice(None)))
                for d, w, e in zip(divided, whole, exact, strict=True)
            ]
    return found


def seen_coefficients() -> Any:
    """Patches the ranking so that it notes its coefficients."""
    rank, kept = reference.rank_tokens, []

    def noted(*args: Any) -> Any:
        result = rank(*args)
        kept.append(result.coefficients.clone())
        return result

    return mock.patch.object(reference, "rank_tokens", noted), kept


def refused(problem: Problem, group: Any) -> dict[str, str]:
    """What bad arguments are told."""
    found = {}
    hidden, weight, bias = problem.inputs(True, False)
    too_large = problem.labels.clone()
    too_large[3] = VOCABULARY
    for name, changed in {
        "kind": {"vocab_group": 3},
        "label": {"labels": too_large},
        "empty": {"weight": weight[:0], "bias": None},
        "bias": {"bias": problem.bias},
    }.items():
        arguments = {"weight": weight, "labels": problem.labels, "bias": bias, "vocab_group": group}
        arguments |= changed
        try:
            fastrank.token_logprobs(hidden, rows=problem.rows, **arguments)
        except (TypeError, ValueError) as error:
            found[name] = str(error)
    loss = fastrank.token_logprobs(
        hidden, weight, problem.labels, rows=problem.rows, vocab_group=group
    )
    try:
        torch.autograd.grad(loss.sum(), hidden, create_graph=True)
    except RuntimeError as error:
        found["second"] = str(error)
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    group, problem = dist.group.WORLD, Problem(world_size, rank)
    tokens = problem.cu_responses[problem.cu_groups.long()].tolist()
    chunks = len(planner.group_chunks(tokens, ROWS))
    result: dict[str, Any] = {"errors": {}, "counts": {}, "chunks": chunks}
    patch, coefficients = seen_coefficients()
    for name, options in ranking_cases(problem):
        whole = compute(problem, None, **options)
        with Collectives() as collectives, patch:
            got = compute(problem, group, **options)
        result["errors"][name] = error(got, whole, problem.own)
        result["counts"][name] = dict(collectives.seen)
    for budget in (None, problem.small_budget(), 1):
        for frozen in (False, True):
            whole = compute_logprobs(problem, None, budget, frozen)
            got = compute_logprobs(problem, group, budget, frozen)
            name = f"token_logprobs {budget} {frozen}"
            result["errors"][name] = error(got, whole, problem.own)
    result["coefficients"] = torch.cat(coefficients)
    result["narrow"] = narrow_errors(world_size, rank, group)
    result["refused"] = refused(problem, group)
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
