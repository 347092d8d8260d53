"""The operators under torch.compile, opcheck and their fake implementations."""

from __future__ import annotations

import pytest
import torch
from plain_linear import make_problem

import fastrank
from fastrank_kernels import ops

TESTS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


RRHF = fastrank.RRHF().spec().encode()


def head_call(problem, needs, memory) -> dict:
    """The keyword arguments that every operator over logits takes."""
    problem.softcap = 5.0
    return problem.projection(needs=list(needs), logits_memory=memory)._asdict()


def opcheck(operator, **arguments) -> None:
    """By name, as they are called; the checkers want what may be positional to be so."""
    tensors = [
        arguments.pop(argument.name)
        for argument in operator._opoverload._schema.arguments
        if not argument.kwarg_only
    ]
    torch.library.opcheck(operator, tuple(tensors), arguments, test_utils=TESTS)


@pytest.mark.parametrize("memory", [None, 97 * 8 * 2])
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False,) * 3])
def test_opcheck_linear_ranking(needs, memory) -> None:
    problem = make_problem(0)
    groups = problem.groups()
    copies = [] if memory else [groups["cu_responses"].clone(), groups["cu_groups"].clone()]
    with torch.no_grad():
        opcheck(
            ops.linear_ranking, **head_call(problem, needs, memory), **groups,
            device_offsets=copies, reference_scores=None, spec=RRHF, scale=0.2, drop_dead_rows=True,
        )  # fmt: skip


@pytest.mark.parametrize("memory", [None, 97 * 8 * 2])
@pytest.mark.parametrize("need_head", [True, False])
def test_opcheck_linear_logprobs(need_head, memory) -> None:
    call = head_call(make_problem(0), (True, need_head, need_head), memory)
    with torch.no_grad():
        opcheck(ops.linear_logprobs, **call)
        logp, norm, saved = ops.linear_logprobs(**call)
        opcheck(
            ops.linear_logprobs_backward, **call, grad=torch.randn_like(logp), logp=logp, norm=norm,
            saved=saved,
        )  # fmt: skip


def test_opcheck_of_scores_and_tokens() -> None:
    scores, rewards = torch.randn(9), torch.rand(9)
    cu_groups = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    cu_responses = torch.arange(10, dtype=torch.int32)
    for loss in (fastrank.RRHF(), fastrank.PRO(), fastrank.ListNet()):
        common = {"rewards": rewards, "cu_groups": cu_groups, "spec": loss.spec().encode(),
                  "backend": None}  # fmt: skip
        opcheck(ops.rank_scores, scores=scores, valid=None, **common)
        opcheck(
            ops.rank_tokens, token_logprobs=scores, cu_responses=cu_responses,
            reference_scores=None, scale=0.3, validate=False, **common,
        )  # fmt: skip
    torch.library.opcheck(ops.segment_sum, (scores.requires_grad_(), cu_groups))


def fused(p, hidden, weight, bias):
    return fastrank.linear_ranking_loss(
        hidden, weight, p.labels, p.rewards, cu_responses=p.cu_responses, cu_groups=p.cu_groups,
        loss=fastrank.PRO(), rows=p.rows, bias=bias, softcap=5.0,
    ).loss  # fmt: skip


def unfused(p, hidden, weight, bias):
    logp = fastrank.token_logprobs(hidden, weight, p.labels, rows=p.rows, bias=bias, softcap=5.0)
    scores = fastrank.sequence_scores(logp, p.cu_responses)
    return fastrank.ranking_loss(scores, p.rewards, loss=fastrank.ListMLE(), cu_groups=p.cu_groups)


@pytest.mark.parametrize("step", [fused, unfused])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_compiles_without_a_graph_break(step, autocast) -> None:
    torch.compiler.reset()
    problem = make_problem(1).to(torch.float32)
    problem.rewards = problem.rewards.float()

    def whole(hidden, weight, bias):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return step(problem, torch.tanh(hidden) * 2, weight, bias) * 3

    leaves = problem.leaves()
    want = whole(*leaves)
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    got = compiled(*leaves)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    grads = torch.autograd.grad(want, leaves), torch.autograd.grad(got, leaves)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*leaves), want.detach(), rtol=1e-5, atol=1e-6)


def test_lengths_that_change_recompile_at_most_once() -> None:
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(hidden, weight, labels, rewards, cu_responses, cu_groups):
        return fastrank.linear_ranking_loss(
            hidden, weight, labels, rewards, cu_responses=cu_responses, cu_groups=cu_groups,
            loss=fastrank.RRHF(),
        ).loss  # fmt: skip

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for seed in range(5):
        p = make_problem(seed, groups=(3, 2 + seed), repeat_rows=False).to(torch.float32)
        rewards = p.rewards.float()
        arguments = (p.hidden, p.weight, p.labels, rewards, p.cu_responses, p.cu_groups)
        torch.testing.assert_close(compiled(*arguments), step(*arguments))
    assert counter.frame_count <= 2


def test_value_errors_surface_from_a_compiled_step() -> None:
    torch.compiler.reset()
    p = make_problem(1).to(torch.float32)
    p.rewards = p.rewards.float()
    compiled = torch.compile(
        lambda labels: fastrank.token_logprobs(p.hidden, p.weight, labels, rows=p.rows),
        fullgraph=True,
        backend="aot_eager",
    )
    compiled(p.labels)
    with pytest.raises(ValueError, match="labels must lie in"):
        compiled(p.labels + 1000)
