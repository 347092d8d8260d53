"""A head is cast once per step, and no copy of it outlives its weights or its step."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
from plain_linear import Problem, make_problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastrank
from fastrank_kernels import reuse_head_cast
from fastrank_kernels.head_cast import cast_head

NARROW = torch.bfloat16


class HeadCasts(TorchDispatchMode):
    """How often a tensor of the head's shape is cast to the products' dtype."""

    def __init__(self, head: Tensor) -> None:
        super().__init__()
        self.shape, self.count = head.shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default:
            self.count += result.shape == self.shape and result.dtype == NARROW
        return result


@pytest.fixture
def problem() -> Problem:
    return make_problem(3).on("cpu", torch.float32)


def gradients(problem: Problem, *, logprobs: bool = False) -> list[Tensor]:
    with torch.autocast("cpu", NARROW):
        if logprobs:
            total = (
                fastrank.token_logprobs(
                    problem.hidden, problem.weight, problem.labels, **problem.head()
                )
                .square()
                .sum()
            )
        else:
            total = problem.fused(fastrank.PRO()).loss
    return list(torch.autograd.grad(total, problem.leaves()))


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def test_log_probabilities_cast_the_head_once_for_both_ways(problem) -> None:
    with HeadCasts(problem.weight) as casts:
        gradients(problem, logprobs=True)
    assert casts.count == 1


def test_a_context_casts_once_and_changes_no_bit(problem) -> None:
    expected = [gradients(problem), gradients(problem, logprobs=True)]
    for enabled, count in ((True, 1), (False, 3)):
        with HeadCasts(problem.weight) as casts, reuse_head_cast(enabled):
            with reuse_head_cast():  # an inner one ends without freeing what the outer keeps
                got = [gradients(problem)]
            got += [gradients(problem, logprobs=True), gradients(problem)]
        assert casts.count == count
        assert equal(got[0], expected[0]) and equal(got[1], expected[1])
        assert equal(got[2], expected[0])


def update_in_place(weight: Tensor) -> None:
    with torch.no_grad():
        weight.add_(1.0)


def update_beside_the_version(weight: Tensor) -> None:
    version = weight._version
    weight.data.add_(1.0)
    assert weight._version == version


def test_an_update_inside_is_noticed(problem) -> None:
    with reuse_head_cast():
        before = cast_head(problem.weight, NARROW)
        update_in_place(problem.weight)
        after = cast_head(problem.weight, NARROW)
    assert torch.equal(after, problem.weight.to(NARROW)) and not torch.equal(before, after)


@pytest.mark.parametrize("update", [update_in_place, update_beside_the_version])
def test_an_update_between_steps_counts(problem, update) -> None:
    with reuse_head_cast():
        gradients(problem)
    update(problem.weight)
    with reuse_head_cast():
        got = gradients(problem)
    assert equal(got, gradients(problem))


def alive(*references: weakref.ref) -> list[bool]:
    gc.collect()
    return [reference() is not None for reference in references]


def test_a_copy_lives_no_longer_than_step_and_weights() -> None:
    weights = [torch.ones(3, 2), torch.ones(3, 2)]
    with contextlib.suppress(KeyError), reuse_head_cast():
        copies = [weakref.ref(cast_head(weight, NARROW)) for weight in weights]
        assert alive(*copies) == [True, True]
        del weights[0]
        assert alive(*copies) == [False, True]
        raise KeyError
    assert alive(*copies) == [False, False]


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    yield


@pytest.mark.parametrize(
    "context", [nothing_kept, torch.inference_mode, lambda: reuse_head_cast(enabled=False)]
)
def test_where_nothing_is_kept(context) -> None:
    weight = torch.ones(3, 2, requires_grad=True)
    keeping = reuse_head_cast() if context is torch.inference_mode else nothing_kept()
    with keeping, context():
        assert cast_head(weight, NARROW) is not cast_head(weight, NARROW)
        assert cast_head(weight, torch.float32) is weight


def test_an_evaluation_leaves_no_copy_that_training_could_not_save(problem) -> None:
    with reuse_head_cast():
        with torch.inference_mode(), torch.autocast("cpu", NARROW):
            problem.fused(fastrank.PRO())
        with torch.no_grad(), torch.autocast("cpu", NARROW):
            problem.fused(fastrank.PRO())
        got = gradients(problem, logprobs=True)
    assert equal(got, gradients(problem, logprobs=True))


def test_other_dtypes_and_threads_are_served_by_themselves() -> None:
    weight, found = torch.ones(3, 2), []
    with reuse_head_cast():
        mine = cast_head(weight, NARROW)
        assert cast_head(weight, torch.float16).dtype == torch.float16
        thread = threading.Thread(target=lambda: found.append(cast_head(weight, NARROW)))
        thread.start()
        thread.join()
    assert found[0] is not mine and torch.equal(found[0], mine)
