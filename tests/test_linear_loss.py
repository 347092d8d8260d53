"""linear_ranking_loss: every loss and strategy against the plain computation, with gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plain_linear import ErrorComparison, largest_error, make_problem

import fastrank
import fastrank_kernels
from fastrank.losses import LOSSES
from fastrank_kernels.projection import Logits

LOSS_CASES = [cls() for cls in LOSSES.values()] + [
    fastrank.RRHF(sft_reduction="sum"),
    fastrank.RRHF(normalize="sum", margin=0.5),
    fastrank.SLiC(normalize=0.6, margin_by="rank", rank_weight=0.4, sft_weight=0.3),
    fastrank.ListMLE(beta=0.4, uses_reference=True, normalize="sum", sft_weight=0.1),
    fastrank.ListNet(beta=0.3, uses_reference=True, normalize="sum"),
    fastrank.NCA(beta=0.2),
    fastrank.LIRE(sft_weight=0.2),
    fastrank.DPO(margin=0.2, margin_by="rank", label_smoothing=0.1, robust=True),
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


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("loss", LOSS_CASES, ids=repr)
def test_equals_the_plain_computation(loss, strategy, monkeypatch) -> None:
    options = dict(STRATEGIES[strategy])
    problem = make_problem(3, frozen_head=options.pop("frozen_head", False))
    want = problem.exact(loss, -1.7)
    assert largest_error(problem.value_and_gradients(loss, -1.7, **options), want) < 1e-12
    narrow = problem.on("cpu", torch.float32)
    assert largest_error(narrow.value_and_gradients(loss, -1.7, **options), want) < 1e-5


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
    for loss in (fastrank.RRHF(), fastrank.PRO(), fastrank.ListNet(sft_weight=0.5)):
        for memory in (None, 1):
            got = problem.value_and_gradients(loss, 0.3, logits_memory=memory)
            assert largest_error(got, problem.exact(loss, 0.3)) < 1e-12


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
    got = problem.value_and_gradients(fastrank.RRHF(), 2.5, logits_memory=memory)
    assert largest_error(got, problem.exact(fastrank.RRHF(), 2.5)) < 1e-12
    call = problem.projection(needs=[bool(need) for need in needs], logits_memory=memory)
    grads = fastrank_kernels.ops.linear_ranking(
        **call._asdict(), **problem.groups(), device_offsets=[], reference_scores=None,
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
    problem = make_problem(13, groups=(3,), repeat_rows=False).on("cpu", torch.float32)
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
    problem = make_problem(15).on("cpu", torch.float32)
    out = problem.fused(fastrank.RRHF())
    first = torch.autograd.grad(out.loss * 3, problem.leaves(), retain_graph=True)
    second = torch.autograd.grad(out.loss * 3, problem.leaves())
    again = torch.autograd.grad(problem.fused(fastrank.RRHF()).loss * 3, problem.leaves())
    for a, b, c in zip(first, second, again, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_dropping_dead_rows_changes_no_live_row() -> None:
    problem = make_problem(17, groups=(6, 6, 6, 6), longest=20, repeat_rows=False, softcap=None)
    problem = problem.to(torch.float32)
    # Of its own generator: in one of 45 random orders of the rewards every candidate is live.
    problem.rewards = torch.rand(24, generator=torch.Generator().manual_seed(0))
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


def test_draws_do_not_depend_on_the_tests_before() -> None:
    """With random rewards of the process's own generator, the test above once had no dead row."""
    state = torch.get_rng_state()
    assert torch.equal(state, torch.Generator().manual_seed(torch.initial_seed()).get_state())


def test_all_rows_dead_gives_zero_gradients() -> None:
    problem = make_problem(19)
    problem.rewards.zero_()
    for memory in (None, 97 * 8 * 2):
        out = problem.fused(fastrank.RRHF(sft_weight=0.0), logits_memory=memory)
        grads = torch.autograd.grad(out.loss, problem.leaves())
        assert out.loss.item() == 0 and not any(g.any() for g in grads)


def test_chunks_of_groups_do_not_change_the_result(monkeypatch) -> None:
    problem = make_problem(21, groups=(3, 4, 2, 5, 1, 3))
    want = problem.value_and_gradients(fastrank.PRO())
    seen = []
    make = Logits.make
    monkeypatch.setattr(Logits, "make", lambda self, h: seen.append(h.shape[0]) or make(self, h))
    monkeypatch.setattr("fastrank_kernels.planner.CPU_CHUNK_ROWS", 25)
    got = problem.value_and_gradients(fastrank.PRO())
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
    errors = ErrorComparison()
    for seed in range(6):
        problem = make_problem(seed, groups=(4, 3, 5), longest=12, softcap=None, bias=False)
        if confident:
            problem.make_confident()
        narrow = problem.on("cpu", torch.bfloat16)
        ours = narrow.value_and_gradients(loss, logits_memory=memory)[1:]
        plain = torch.autograd.grad(narrow.plain(loss).mean(), narrow.leaves())
        errors.add(ours, plain, narrow.exact(loss)[1:])
    errors.check()


def test_autocast_computes_narrow_and_returns_wide_gradients() -> None:
    problem = make_problem(25, softcap=None, bias=False).on("cpu", torch.float32)
    want = problem.exact(fastrank.RRHF())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = problem.fused(fastrank.RRHF())
    grads = torch.autograd.grad(out.loss, problem.leaves())
    assert [g.dtype for g in grads] == [torch.float32, torch.float32]
    assert 1e-6 < largest_error([out.loss, *grads], want) < 3e-2


@pytest.mark.parametrize("memory", [None, 97 * 2 * 2], ids=["at once", "in parts"])
def test_autocast_does_not_round_the_sum_of_a_wide_bias_or_head(memory) -> None:
    """Of the head, where it is a sum over chunks; a CPU's one product is narrow."""
    problem = make_problem(25, softcap=None, longest=20).on("cpu", torch.float32)
    want = problem.exact(fastrank.PRO())[1:]
    errors = {}
    for name in ("narrow", "wide"):
        leaves = [x.detach() for x in (problem.hidden, problem.weight, problem.bias)]
        if name == "narrow":
            leaves = [x.bfloat16() for x in leaves]
        case = replace(problem, **dict(zip(("hidden", "weight", "bias"), leaves, strict=True)))
        for leaf in (case.hidden, case.weight, case.bias):
            leaf.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            grads = case.value_and_gradients(fastrank.PRO(), logits_memory=memory)[1:]
        assert all(g.dtype == x.dtype for g, x in zip(grads, case.leaves(), strict=True))
        rounded = [torch.equal(g, g.bfloat16().to(g.dtype)) for g in grads]
        assert rounded == [True, name == "narrow" or memory is None, name == "narrow"]
        errors[name] = [float((g - w).norm() / w.norm()) for g, w in zip(grads, want, strict=True)]
    assert errors["wide"][2] < errors["narrow"][2]


def test_mixed_and_float16_inputs_are_computed_in_the_wider_dtype() -> None:
    problem = make_problem(27, softcap=None).on("cpu", torch.float32)
    problem.hidden = problem.hidden.detach().bfloat16().requires_grad_()
    got, want = problem.value_and_gradients(fastrank.RRHF()), problem.exact(fastrank.RRHF())
    assert got[1].dtype == torch.bfloat16 and got[2].dtype == torch.float32
    del got[1], want[1]
    assert largest_error(got, want) < 1e-5
    half = problem.to(torch.float16)
    got, want = half.value_and_gradients(fastrank.RRHF()), half.exact(fastrank.RRHF())
    assert largest_error(got[1:], want[1:]) < 1e-3


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
        ({"rewards": OK.rewards * float("nan")}, ValueError, "rewards must be finite, got nan"),
        ({"rewards": moved(OK.rewards, 1, float("inf"))}, ValueError, "finite, got inf at index 1"),
        ({"rewards": OK.rewards[:-1]}, ValueError, rf"rewards must have shape \[{C}\]"),
        ({"cu_responses": moved(OK.cu_responses, -1, T - 1)}, ValueError,
         rf"cu_responses must end at {T} \(number of labels\), got {T - 1}"),
        ({"cu_responses": moved(OK.cu_responses, 1, 0)}, ValueError, "cu_responses must rise"),
        ({"cu_groups": moved(OK.cu_groups, -1, C + 1)}, ValueError, rf"cu_groups must end at {C}"),
        ({"cu_groups": moved(OK.cu_groups, 0, 1)}, ValueError, "cu_groups must begin at 0, got 1"),
        ({"cu_groups": torch.zeros(0, dtype=torch.int32)}, ValueError, "at least the offset 0"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive or None, got 0.0"),
        ({"softcap": "30"}, ValueError, "softcap must be positive or None, got '30'"),
        ({"softcap": float("inf")}, ValueError, "softcap must lie from 1e-15 to 1e[+]15, or be"),
        ({"softcap": 1e-40}, ValueError, "softcap must lie from 1e-15 to 1e[+]15, or be None"),
        ({"logit_scale": float("nan")}, ValueError, "logit_scale must lie within ±1e[+]15, got n"),
        ({"logit_scale": -1e39}, ValueError, "logit_scale must lie within ±1e[+]15, got -1e[+]39"),
        ({"logit_scale": "2"}, ValueError, "logit_scale must lie within ±1e[+]15, got '2'"),
        ({"rewards": OK.rewards + 3e38}, ValueError, "rewards must lie within ±1e[+]16, got 3"),
        ({"logits_memory": float("nan")}, ValueError, "must be a positive number of bytes, got n"),
        ({"logits_memory": 0}, ValueError, "logits_memory must be a positive number of bytes"),
        ({"reference_scores": OK.rewards}, ValueError, r"uses_reference=True, got RRHF\(\)"),
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
