"""linear_ranking_loss: every loss and strategy against the plain computation, with gradients."""

from __future__ import annotations

import pytest
import torch
from plain_linear import Problem, largest_error, make_problem

import fastrank
import fastrank_kernels
from fastrank.losses import LOSSES
from fastrank_kernels.projection import Logits

LOSS_CASES = [cls() for cls in LOSSES.values()] + [
    fastrank.RRHF(sft_reduction="sum"),
    fastrank.RRHF(normalize="sum", margin=0.5),
    fastrank.PRO(sft_reduction="mean"),
    fastrank.DPO(pairs="best_worst", sft_weight=0.3),
    fastrank.ListMLE(top_k=1, sft_weight=0.2, sft_reduction="sum"),
]
# Bytes of logits for each strategy: everything, or fewer rows than the largest group has.
STRATEGIES = {
    "group": {},
    "recompute": {"logits_memory": 97 * 8 * 2},
    "unit": {"logits_memory": 97 * 8 * 2, "frozen_head": True},
    "frozen group": {"frozen_head": True},
}


def run(problem: Problem, loss, upstream, **options):
    """Loss, and gradients under an upstream factor that is not 1."""
    out = problem.fused(loss, **options)
    return [out.loss, *torch.autograd.grad(out.loss, problem.leaves(), upstream)]


def reference(problem: Problem, loss, upstream, reduction="mean"):
    per_group = problem.plain(loss)
    total = per_group.mean() if reduction == "mean" else per_group.sum()
    return [total, *torch.autograd.grad(total, problem.leaves(), upstream)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("loss", LOSS_CASES, ids=repr)
def test_equals_the_plain_computation(loss, strategy, monkeypatch) -> None:
    options = dict(STRATEGIES[strategy])
    problem = make_problem(3, frozen_head=options.pop("frozen_head", False))
    upstream = torch.tensor(-1.7, dtype=torch.float64)
    want = reference(problem, loss, upstream)
    assert largest_error(run(problem, loss, upstream, **options), want) < 1e-12
    narrow = problem.to(torch.float32)
    narrow.rewards = problem.rewards.float()
    narrow.reference_scores = problem.reference_scores.float()
    assert largest_error(run(narrow, loss, upstream.float(), **options), want) < 1e-5


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", [fastrank.RRHF(), fastrank.PRO(), fastrank.DPO()], ids=repr)
def test_reductions(loss, reduction) -> None:
    problem = make_problem(5)
    out = problem.fused(loss, reduction=reduction)
    per_group = problem.plain(loss)
    want = {"mean": per_group.mean(), "sum": per_group.sum(), "none": per_group}[reduction]
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(out.rank_loss + out.sft_loss, out.loss.detach())
    upstream = torch.randn(out.loss.shape, dtype=torch.float64) if reduction == "none" else None
    got = torch.autograd.grad(out.loss, problem.leaves(), upstream)
    expected = torch.autograd.grad(want, problem.leaves(), upstream)
    assert largest_error(list(got), list(expected)) < 1e-12
    assert not any(x.requires_grad for x in out[1:])


@pytest.mark.parametrize(
    "variant",
    [
        {"bias": False},
        {"softcap": None},
        {"logit_scale": 1.0, "softcap": None, "bias": False},
        {"repeat_rows": False},
        {"vocab": 1},
        {"groups": (1,), "longest": 1},
        {"groups": (17, 2), "vocab": 33},
    ],
    ids=str,
)
def test_every_kind_of_head_and_group(variant) -> None:
    problem = make_problem(7, **variant)
    upstream = torch.tensor(0.3, dtype=torch.float64)
    for loss in (fastrank.RRHF(), fastrank.PRO(), fastrank.ListNet(sft_weight=0.5)):
        for memory in (None, 1):
            got = run(problem, loss, upstream, logits_memory=memory)
            assert largest_error(got, reference(problem, loss, upstream)) < 1e-12


def test_scores_and_logprobs_are_the_models_own() -> None:
    problem = make_problem(9)
    out = problem.fused(fastrank.DPO())
    logp = problem.logprobs().detach()
    torch.testing.assert_close(out.token_logprobs, logp)
    sums = [logp[a:b].sum() for a, b in zip(problem.cu_responses, problem.cu_responses[1:])]  # noqa: B905
    torch.testing.assert_close(out.scores, torch.stack(sums))


@pytest.mark.parametrize(
    "needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 0)]
)
@pytest.mark.parametrize("memory", [None, 97 * 8 * 2])
def test_gradients_only_for_what_needs_them(needs, memory) -> None:
    problem = make_problem(11)
    for tensor, need in zip((problem.hidden, problem.weight, problem.bias), needs, strict=True):
        tensor.requires_grad_(bool(need))
    upstream = torch.tensor(2.5, dtype=torch.float64)
    got = run(problem, fastrank.RRHF(), upstream, logits_memory=memory)
    assert largest_error(got, reference(problem, fastrank.RRHF(), upstream)) < 1e-12
    call = problem.projection(needs=[bool(need) for need in needs], logits_memory=memory)
    grads = fastrank_kernels.ops.linear_ranking(
        **call._asdict(), **problem.groups(), reference_scores=None,
        spec=fastrank.RRHF().spec().encode(), scale=1.0, drop_dead_rows=True,
    )[4:]  # fmt: skip
    assert [g.numel() > 0 for g in grads] == list(map(bool, needs))


def products_in(call) -> int:
    """How many matrix products of logits size a call makes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    names = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::matmul"}
    return sum(event.count for event in profile.key_averages() if event.key in names)


def test_evaluation_pays_for_one_product_and_training_for_three() -> None:
    problem = make_problem(13, groups=(3,), repeat_rows=False).to(torch.float32)
    problem.rewards = problem.rewards.float()
    loss = fastrank.PRO()

    def train() -> None:
        problem.fused(loss).loss.backward()

    assert products_in(train) == 3
    with torch.no_grad():
        assert products_in(lambda: problem.fused(loss)) == 1
    with torch.inference_mode():
        assert products_in(lambda: problem.fused(loss)) == 1
    problem.weight.requires_grad_(False)
    problem.bias.requires_grad_(False)
    assert products_in(train) == 2


def test_second_backward_and_retain_graph_give_the_same_bits() -> None:
    problem = make_problem(15).to(torch.float32)
    problem.rewards = problem.rewards.float()
    out = problem.fused(fastrank.RRHF())
    first = torch.autograd.grad(out.loss * 3, problem.leaves(), retain_graph=True)
    second = torch.autograd.grad(out.loss * 3, problem.leaves())
    again = torch.autograd.grad(problem.fused(fastrank.RRHF()).loss * 3, problem.leaves())
    for a, b, c in zip(first, second, again, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_dropping_dead_rows_changes_no_live_row() -> None:
    problem = make_problem(17, groups=(6, 6, 6, 6), longest=20, repeat_rows=False, softcap=None)
    problem = problem.to(torch.float32)
    problem.rewards = torch.rand(24)
    spec = fastrank.RRHF(sft_weight=0.0).spec()
    grads = []
    for drop in (True, False):
        loss, *_ = fastrank_kernels.linear_ranking(
            problem.projection(), **problem.groups(), spec=spec, drop_dead_rows=drop
        )
        grads.append(torch.autograd.grad(loss, problem.leaves()))
    live = (grads[1][0] != 0).any(1)
    assert 0 < live.sum() < live.numel()
    assert torch.equal(grads[0][0][live], grads[1][0][live])
    assert not grads[0][0][~live].any()
    assert largest_error(list(grads[0]), list(grads[1])) < 1e-6


def test_all_rows_dead_gives_zero_gradients() -> None:
    problem = make_problem(19)
    problem.rewards.zero_()
    for memory in (None, 97 * 8 * 2):
        out = problem.fused(fastrank.RRHF(sft_weight=0.0), logits_memory=memory)
        grads = torch.autograd.grad(out.loss, problem.leaves())
        assert out.loss.item() == 0 and not any(g.any() for g in grads)


def test_chunks_of_groups_do_not_change_the_result(monkeypatch) -> None:
    problem = make_problem(21, groups=(3, 4, 2, 5, 1, 3))
    upstream = torch.tensor(1.0, dtype=torch.float64)
    want = run(problem, fastrank.PRO(), upstream)
    seen = []
    make = Logits.make
    monkeypatch.setattr(Logits, "make", lambda self, h: seen.append(h.shape[0]) or make(self, h))
    monkeypatch.setattr("fastrank_kernels.planner.CPU_CHUNK_ROWS", 25)
    got = run(problem, fastrank.PRO(), upstream)
    assert len(seen) > 2
    assert largest_error(got, want) < 1e-12


def test_no_group_and_no_token() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(5, 4, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.int32)
    none = torch.zeros(0, dtype=torch.int64)
    out = fastrank.linear_ranking_loss(
        hidden, weight, none, torch.zeros(0), cu_responses=zero, cu_groups=zero,
        loss=fastrank.PRO(), rows=none,
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.item() == 0 and not hidden.grad.any() and not weight.grad.any()


def test_nan_hidden_state_reaches_the_loss_and_the_gradient() -> None:
    problem = make_problem(23)
    with torch.no_grad():
        problem.hidden[problem.rows[0]] = float("nan")
    out = problem.fused(fastrank.RRHF())
    out.loss.backward()
    assert torch.isnan(out.loss) and torch.isnan(problem.weight.grad).any()


@pytest.mark.parametrize("loss", [fastrank.RRHF(), fastrank.PRO(), fastrank.RankNet()], ids=repr)
@pytest.mark.parametrize("memory", [None, 97 * 2 * 2])
@pytest.mark.parametrize("confident", [False, True])
def test_bf16_error_is_no_larger_than_plain_pytorch(loss, memory, confident) -> None:
    ours, plain = [], []
    for seed in range(6):
        exact = make_problem(seed, groups=(4, 3, 5), longest=12, softcap=None, bias=False)
        if confident:
            with torch.no_grad():
                # p(label) > 0.99: the label's head row points along the hidden row.
                h = exact.hidden[exact.rows]
                exact.weight[exact.labels] += 8 * h / h.norm(dim=1, keepdim=True)
        narrow = exact.to(torch.bfloat16)
        wide = narrow.to(torch.float64)  # the same rounded inputs, computed exactly
        want = reference(wide, loss, None)[1:]
        narrow.rewards = exact.rewards.float()
        got = torch.autograd.grad(narrow.fused(loss, logits_memory=memory).loss, narrow.leaves())
        peer = torch.autograd.grad(narrow.plain(loss).mean(), narrow.leaves())

        def distance(grads, want=want) -> list[float]:
            pairs = zip(grads, want, strict=True)
            return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]

        ours.append(distance(got))
        plain.append(distance(peer))
    ours, plain = torch.tensor(ours).mean(0), torch.tensor(plain).mean(0)
    # Two roundings of the same size differ by chance: means over the seeds, and 5 % for the rest.
    assert (ours <= 1.05 * plain).all(), (ours, plain)


def test_autocast_computes_narrow_and_returns_wide_gradients() -> None:
    problem = make_problem(25, softcap=None, bias=False).to(torch.float32)
    problem.rewards = problem.rewards.float()
    want = reference(problem, fastrank.RRHF(), None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = problem.fused(fastrank.RRHF())
    grads = torch.autograd.grad(out.loss, problem.leaves())
    assert [g.dtype for g in grads] == [torch.float32, torch.float32]
    assert 1e-6 < largest_error([out.loss, *grads], want) < 3e-2


def test_mixed_and_float16_inputs_are_computed_in_the_wider_dtype() -> None:
    problem = make_problem(27, softcap=None).to(torch.float32)
    problem.rewards = problem.rewards.float()
    problem.hidden = problem.hidden.detach().bfloat16().requires_grad_()
    out = problem.fused(fastrank.RRHF())
    exact = problem.to(torch.float64)
    grads = torch.autograd.grad(out.loss, problem.leaves())
    assert grads[0].dtype == torch.bfloat16 and grads[1].dtype == torch.float32
    assert largest_error([out.loss, *grads[1:]], [*reference(exact, fastrank.RRHF(), None)[:1],
                         *reference(exact, fastrank.RRHF(), None)[2:]]) < 1e-5  # fmt: skip
    half = problem.to(torch.float16)
    grads = torch.autograd.grad(half.fused(fastrank.RRHF()).loss, half.leaves())
    want = reference(half.to(torch.float64), fastrank.RRHF(), None)[1:]
    assert largest_error(list(grads), want) < 1e-3


OK = make_problem(1).to(torch.float32)


def replaced(**changes):
    arguments = {
        "hidden": OK.hidden, "weight": OK.weight, "labels": OK.labels, "rewards": OK.rewards,
        "cu_responses": OK.cu_responses, "cu_groups": OK.cu_groups, "loss": fastrank.RRHF(),
        "rows": OK.rows, "bias": OK.bias,
    }  # fmt: skip
    return {**arguments, **changes}


def moved(tensor: torch.Tensor, place: int, value: int) -> torch.Tensor:
    other = tensor.clone()
    other[place] = value
    return other


T, C = OK.labels.numel(), OK.rewards.numel()


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"hidden": OK.hidden[0]}, ValueError, r"hidden must have shape \[N, D\], got \[24\]"),
        ({"weight": OK.weight[:, :5]}, ValueError, r"weight must have shape \[V, 24\], got"),
        ({"weight": OK.weight.to("meta")}, ValueError, "weight must be on cpu, got meta"),
        ({"hidden": OK.hidden.long()}, TypeError, "hidden must be floating, got torch.int64"),
        ({"labels": OK.labels.int()}, TypeError, "labels must be int64, got torch.int32"),
        ({"labels": moved(OK.labels, 3, 97)}, ValueError,
         r"labels must lie in \[0, 97\) \(the vocabulary\), got 97 at index 3"),
        ({"labels": moved(OK.labels, 5, -100)}, ValueError, "got -100 at index 5"),
        ({"rows": moved(OK.rows, 0, 999)}, ValueError, "rows must lie in .* got 999 at index 0"),
        ({"rows": OK.rows[:-1]}, ValueError, rf"rows must have shape \[{T}\]"),
        ({"bias": OK.bias[:-1]}, ValueError, r"bias must have shape \[97\], got \[96\]"),
        ({"rewards": OK.rewards * float("nan")}, ValueError, "rewards must be numbers, got nan"),
        ({"rewards": OK.rewards[:-1]}, ValueError, rf"rewards must have shape \[{C}\]"),
        ({"cu_responses": moved(OK.cu_responses, -1, T - 1)}, ValueError,
         rf"cu_responses must end at {T} \(number of labels\), got {T - 1}"),
        ({"cu_responses": moved(OK.cu_responses, 1, 0)}, ValueError, "cu_responses must rise"),
        ({"cu_groups": moved(OK.cu_groups, -1, C + 1)}, ValueError, rf"cu_groups must end at {C}"),
        ({"cu_groups": moved(OK.cu_groups, 0, 1)}, ValueError, "cu_groups must begin at 0, got 1"),
        ({"cu_groups": torch.zeros(0, dtype=torch.int32)}, ValueError, "at least the offset 0"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive or None, got 0.0"),
        ({"logits_memory": 0}, ValueError, "logits_memory must be a positive number of bytes"),
        ({"reference_scores": OK.rewards}, ValueError, "goes with DPO or IPO, got RRHF"),
        ({"backend": "cuda"}, ValueError, "backend must be 'torch', 'triton' or None, got 'cuda'"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"loss": fastrank.RRHF}, TypeError, "loss must be a fastrank loss"),
    ],
)  # fmt: skip
def test_wrong_arguments_say_argument_expected_got(changes, error, text) -> None:
    arguments = replaced(**changes)
    names = ("hidden", "weight", "labels", "rewards")
    positional = [arguments.pop(name) for name in names]
    with pytest.raises(error, match=text):
        fastrank.linear_ranking_loss(*positional, **arguments)


def test_an_explicit_triton_backend_never_falls_back(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton' expected"):
        OK.fused(fastrank.RRHF(), backend="triton")
