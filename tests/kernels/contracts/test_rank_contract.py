"""The rank kernel against the reference in float64: every form, every group size, ties, NaN."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from error_budget import ROUNDINGS, UNIT, Exact, assert_within, within_roundings

pytest.importorskip("triton")

from fastrank_kernels import RankSpec, rank, reference, triton_backend  # noqa: E402

FORMS = {
    **{
        f"{phi} {pairs} {weight}": RankSpec(
            "pairwise", phi, pairs, weight, margin=0.2, score_scale=1.3
        )
        for phi, pairs, weight in product(
            ("hinge", "logistic", "square"), ("all", "best_worst"), ("one", "lambda")
        )
    },
    "reward margin": RankSpec("pairwise", margin=0.3, margin_by="reward", rank_weight=0.6),
    "rank margin": RankSpec("pairwise", "logistic", margin=0.2, margin_by="rank"),
    "rank margin lambda": RankSpec(
        "pairwise", "logistic", "best_worst", "lambda", margin=0.2, margin_by="rank"
    ),
    "smoothed": RankSpec("pairwise", "logistic", margin=0.2, right=0.9, wrong=0.1),
    "robust": RankSpec(
        "pairwise", "logistic", margin=0.1, margin_by="reward", right=1.125, wrong=-0.125
    ),
    "listmle": RankSpec("staged"),
    "listmle top 3": RankSpec("staged", top_k=3, score_scale=0.7),
    "pro": RankSpec("staged", stage_scale="reward_gap"),
    "pro top 2": RankSpec("staged", stage_scale="reward_gap", top_k=2, score_scale=2.0),
    "listnet": RankSpec("softmax", temperature=0.6, score_scale=1.1),
    "expected reward": RankSpec("expected", target="reward", score_scale=0.5, rank_weight=1.7),
    "expected target": RankSpec("expected", temperature=0.8),
    "nca": RankSpec("pointwise", temperature=0.7, score_scale=0.3),
    "approx ndcg": RankSpec("positions", score_scale=1.4),
}
TERMS = {
    "no sft": {},
    "mean": {"sft_weight": 0.7},
    "sum": {"sft_weight": 0.3, "sft_reduction": "sum"},
    "square": {"sft_weight": 0.05, "sft_growth": "square", "sft_reduction": "sum"},
    "sums": {"length_exponent": 0.0, "sft_weight": 0.4},
    "exponent": {"length_exponent": 0.7, "sft_weight": 0.4, "sft_reduction": "sum"},
    "exponent mean": {"length_exponent": 1.3, "sft_weight": 0.4},
}
SIZES = {
    "small": [3, 0, 1, 8, 2, 5],
    "one block": [9, 32, 4, 0],
    "many blocks": [33, 70],
}


def offsets(lengths, device) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device)


pytestmark = pytest.mark.usefixtures("approximate")


class Groups:
    """Ragged groups with tied rewards and responses of very different lengths."""

    def __init__(self, sizes, device, *, longest=40, levels=4):
        self.cu_groups = offsets(sizes, "cpu")
        self.count = sum(sizes)
        lengths = torch.randint(1, longest + 1, (self.count,)).tolist()
        self.cu_responses = offsets(lengths, "cpu")
        self.logp = (-3 * torch.rand(sum(lengths))).to(device)
        self.rewards = torch.randint(0, levels, (self.count,)).float().to(device)
        self.reference = -torch.rand(self.count).to(device)
        self.scores = torch.randn(self.count).to(device)
        self.valid = torch.rand(self.count).to(device) < 0.7

    def tokens(self, module, spec, *, wide=False, with_reference=True, scale=0.37):
        def compute(cast):
            return module.rank_tokens(
                cast(self.logp), self.rewards.double() if wide else self.rewards,
                self.cu_responses, self.cu_groups, cast(self.reference) if with_reference else None,
                spec, scale,
            )  # fmt: skip

        return within_roundings(compute) if wide else compute(lambda x: x)

    def ranked(self, module, spec, valid=None, *, wide=False):
        def compute(cast):
            rewards = self.rewards.double() if wide else self.rewards
            return module.rank_scores(cast(self.scores), rewards, self.cu_groups, valid, spec)

        return within_roundings(compute) if wide else compute(lambda x: x)


@pytest.mark.parametrize("spec", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    "sizes",
    [*SIZES.values(), pytest.param([300], marks=pytest.mark.slow)],
    ids=[*SIZES, "five blocks"],
)
def test_scores_to_loss_and_gradients(device, poisoned, sizes, spec) -> None:
    groups = Groups(sizes, device)
    for valid in (None, groups.valid) if sizes == SIZES["small"] else (groups.valid,):
        actual = groups.ranked(triton_backend, spec, valid)
        assert_within(actual, groups.ranked(reference, spec, valid, wide=True))


@pytest.mark.parametrize("spec", FORMS.values(), ids=FORMS)
def test_tokens_to_coefficients(device, poisoned, spec) -> None:
    groups = Groups(SIZES["small"], device)
    actual = groups.tokens(triton_backend, spec)
    assert_within(actual, groups.tokens(reference, spec, wide=True))


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("form", ["hinge all one", "pro", "listnet"])
@pytest.mark.parametrize("sizes", [SIZES["small"], [65, 2]], ids=["small", "large"])
def test_supervised_term_and_normalisation(device, poisoned, sizes, form, terms) -> None:
    groups = Groups(sizes, device)
    spec = FORMS[form]._replace(**terms)
    for with_reference in (True, False) if len(sizes) > 2 else (True,):
        actual = groups.tokens(triton_backend, spec, with_reference=with_reference)
        expected = groups.tokens(reference, spec, wide=True, with_reference=with_reference)
        assert_within(actual, expected)


EVERY_SIZE = list(range(131))
AROUND_BLOCKS = [*range(18), 31, 32, 33, 63, 64, 65, 96, 97, 129]


@pytest.mark.parametrize(
    ("form", "sizes"),
    [
        ("pro", AROUND_BLOCKS),
        pytest.param("pro", EVERY_SIZE, marks=pytest.mark.slow),
        pytest.param("logistic all lambda", EVERY_SIZE, marks=pytest.mark.slow),
        pytest.param("listnet", EVERY_SIZE, marks=pytest.mark.slow),
        pytest.param("rank margin lambda", EVERY_SIZE, marks=pytest.mark.slow),
        pytest.param("approx ndcg", EVERY_SIZE, marks=pytest.mark.slow),
        pytest.param("expected target", EVERY_SIZE, marks=pytest.mark.slow),
    ],
    ids=["pro around blocks", "pro", "lambda", "listnet", "margin", "ndcg", "expected"],
)
def test_every_group_size_from_1_to_130(device, poisoned, form, sizes) -> None:
    groups = Groups(sizes, device, longest=2, levels=9)
    actual = groups.ranked(triton_backend, FORMS[form])
    assert_within(actual, groups.ranked(reference, FORMS[form], wide=True))


@pytest.mark.parametrize("form", ["logistic best_worst lambda", "pro", "listnet"])
def test_any_block_serves_any_group(device, poisoned, form, monkeypatch) -> None:
    """With offsets on the device the block is a guess: a group may be many times as large."""
    groups = Groups([45, 3, 20], device)
    expected = groups.tokens(reference, FORMS[form], wide=True)
    for tile in (8, 32):
        monkeypatch.setattr(rank, "tile_of_groups", lambda *_, tile=tile: tile)
        assert_within(groups.tokens(triton_backend, FORMS[form]), expected)


def test_block_of_groups() -> None:
    assert rank.tile_of_groups(offsets([3, 9, 2], "cpu"), 14) == 16
    assert rank.tile_of_groups(offsets([500], "cpu"), 500) == 64
    assert rank.tile_of_groups(offsets([], "cpu"), 0) == 8
    on_device = torch.empty(4, dtype=torch.int32, device="meta")
    assert rank.tile_of_groups(on_device, 30) == 16


@pytest.mark.parametrize("spec", FORMS.values(), ids=FORMS)
def test_a_group_without_a_strict_pair_is_zero_in_every_loss(device, poisoned, spec) -> None:
    groups = Groups([4, 1, 0, 3], device)
    groups.rewards.fill_(2.0)
    groups.scores[:] = torch.tensor([float("nan"), float("-inf"), 1e30, 0, 1, 2, 3, 4])
    loss, grads = groups.ranked(triton_backend, spec)
    assert (loss == 0).all() and (grads == 0).all()
    loss, sft, _, coefficients = groups.tokens(triton_backend, spec._replace(sft_weight=1.0))
    expected = groups.tokens(reference, spec._replace(sft_weight=1.0), wide=True)
    assert (loss == 0).all()
    assert_within((sft, coefficients), (expected.sft_loss, expected.coefficients))


@pytest.mark.parametrize("spec", FORMS.values(), ids=FORMS)
def test_what_is_not_finite_goes_where_the_reference_sends_it(device, spec) -> None:
    """NaN and infinities in small groups, where a tie with one is left out, and across blocks."""
    groups = Groups([5, 4] * 3 + [40], device)
    groups.rewards[:27] = torch.tensor([3.0, 0, 1, 1, 2, 0, 2, 1, 3]).repeat(3)
    for first, value in ((0, float("nan")), (9, float("-inf")), (18, float("inf"))):
        groups.scores[[first + 2, first + 6]] = value
    groups.scores[48] = float("-inf")
    valid = torch.ones(groups.count, dtype=torch.bool, device=device)
    valid[[6, 15, 24]] = False  # what is left out may hold anything
    loss, grads = groups.ranked(triton_backend, spec, valid)
    assert_within((loss, grads), groups.ranked(reference, spec, valid, wide=True))
    assert not grads[[6, 15, 24]].any() and loss[[1, 3, 5]].isfinite().all()


def test_a_token_that_is_not_a_number_reaches_its_group_and_no_other(device, poisoned) -> None:
    groups = Groups([3, 4, 2], device)
    groups.rewards[:] = torch.tensor([0.0, 1, 2, 3, 1, 2, 0, 1, 0])
    groups.logp[int(groups.cu_responses[4])] = float("nan")
    for spec in (FORMS["hinge all one"], FORMS["pro"]):
        spec = spec._replace(sft_weight=0.5)
        actual = groups.tokens(triton_backend, spec)
        assert_within(actual, groups.tokens(reference, spec, wide=True))
        assert actual.rank_loss.isnan().tolist() == [False, True, False]


def test_dead_candidates_are_exactly_zero(device) -> None:
    """What compaction relies on: the same exact zeros as in the reference."""
    groups = Groups([6] * 12, device, levels=6)
    ordered = torch.arange(6, device=device).repeat(12) * 0.5
    groups.logp = torch.repeat_interleave(
        -4 + ordered + 0.4 * torch.randn(72, device=device),
        (groups.cu_responses[1:] - groups.cu_responses[:-1]).to(device),
    )
    groups.rewards = torch.arange(6.0, device=device).repeat(12)
    spec = RankSpec("pairwise", sft_weight=1.0)
    ours = groups.tokens(triton_backend, spec, with_reference=False).coefficients
    theirs = groups.tokens(reference, spec, with_reference=False).coefficients
    assert torch.equal(ours == 0, theirs == 0)
    assert 0.1 < (ours == 0).float().mean() < 0.95


@pytest.mark.parametrize("scale", [1.0, 0.3, 1 / 3, 7.7])
def test_equal_scores_differ_by_exactly_nothing(device, scale) -> None:
    """A fused multiply and subtract would leave the rounding of one product as a difference."""
    scores = torch.randn(1, device=device).repeat(6)
    rewards = torch.arange(6.0, device=device)
    spec = RankSpec("pairwise", "square", score_scale=scale)
    loss, grads = triton_backend.rank_scores(scores, rewards, offsets([6], "cpu"), None, spec)
    assert loss.item() == 0 and (grads == 0).all()


def test_large_differences_and_large_rewards_do_not_overflow(device) -> None:
    groups = Groups([6, 5], device, levels=3)
    groups.scores *= 1e4
    for form in ("logistic all one", "listmle", "pro", "listnet"):
        actual = groups.ranked(triton_backend, FORMS[form])
        assert all(x.isfinite().all() for x in actual)
        assert_within(actual, groups.ranked(reference, FORMS[form], wide=True))


def test_the_logistic_loss_keeps_its_digits_where_it_is_small(device) -> None:
    """At a difference of 15 the loss is 3e-7, less than a rounding of ``1 + exp(-15)``."""
    differences = torch.linspace(1, 25, 13, device=device)
    scores = torch.stack([differences, torch.zeros_like(differences)], 1).reshape(-1)
    rewards = torch.tensor([1.0, 0.0], device=device).repeat(13)
    groups = torch.arange(0, 27, 2, dtype=torch.int32)
    spec = RankSpec("pairwise", "logistic")
    loss, grads = triton_backend.rank_scores(scores, rewards, groups, None, spec)
    exact = reference.rank_scores(scores.double(), rewards.double(), groups, None, spec)
    # An exponential's relative error is that of its argument; then a sum, a logarithm, a quotient.
    allowed = (differences.double() + ROUNDINGS) * UNIT
    assert ((loss - exact[0]).abs() <= allowed * exact[0]).all()
    assert ((grads - exact[1]).abs() <= allowed.repeat_interleave(2) * exact[1].abs()).all()


def test_long_responses_and_a_group_of_tokens_of_one_candidate(device, poisoned) -> None:
    groups = Groups([2, 1, 3], device, longest=1)
    lengths = [3001, 1, 700, 5, 2048, 257]
    groups.cu_responses = offsets(lengths, "cpu")
    groups.logp = (-5 * torch.rand(sum(lengths))).to(device)
    spec = RankSpec("pairwise", "logistic", sft_weight=0.5)
    assert_within(groups.tokens(triton_backend, spec), groups.tokens(reference, spec, wide=True))


def test_an_empty_response_has_no_mean(device, poisoned) -> None:
    groups = Groups([3, 2], device)
    groups.cu_responses = offsets([2, 0, 3, 1, 2], "cpu")
    groups.logp = groups.logp[:8]
    groups.rewards = torch.tensor([1.0, 0, 2, 1, 0], device=device)
    for exponent in (1.0, 0.0, 0.5):
        spec = RankSpec("pairwise", "logistic", length_exponent=exponent)
        assert_within(
            groups.tokens(triton_backend, spec), groups.tokens(reference, spec, wide=True)
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_rewards_of_any_type(device, dtype) -> None:
    groups = Groups([5, 9, 70], device)
    groups.rewards = groups.rewards.to(dtype)
    spec = RankSpec("staged", stage_scale="reward_gap", sft_weight=0.2)
    actual = groups.tokens(triton_backend, spec)
    groups.rewards = groups.rewards.float()
    assert_within(actual, groups.tokens(reference, spec, wide=True))


def test_the_best_is_found_in_the_rewards_own_type(device) -> None:
    """float64 tells apart what float32 ties; the ranking term sees float32, as in the reference."""
    groups = Groups([3, 2], device)
    groups.rewards = torch.tensor([1.0, 1.0 + 1e-12, 0.0, 1.0, 1.0 + 1e-12], dtype=torch.float64)
    groups.rewards = groups.rewards.to(device)
    spec = RankSpec("pairwise", "logistic", sft_weight=1.0)
    actual = groups.tokens(triton_backend, spec)
    # The reference with float32 log-probabilities ranks in float32 and finds the best in float64.
    expected = groups.tokens(reference, spec)
    assert_within(actual, [Exact(x.double(), torch.zeros_like(x)) for x in expected])
    assert actual.coefficients[int(groups.cu_responses[4])] != 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_scores_and_log_probabilities(device, dtype) -> None:
    groups = Groups([5, 9], device)
    groups.scores, groups.logp = groups.scores.to(dtype), groups.logp.to(dtype)
    groups.reference = groups.reference.to(dtype)
    spec = FORMS["logistic all one"]
    assert_within(groups.ranked(triton_backend, spec), groups.ranked(reference, spec, wide=True))
    assert_within(groups.tokens(triton_backend, spec), groups.tokens(reference, spec, wide=True))


def test_offsets_and_rewards_from_anywhere(device) -> None:
    groups = Groups([3, 5], device)
    spec = FORMS["pro"]
    expected = groups.tokens(triton_backend, spec)
    groups.cu_groups = groups.cu_groups.long().to(device)
    groups.cu_responses = groups.cu_responses.long().to(device)
    groups.rewards = groups.rewards.cpu()
    actual = groups.tokens(triton_backend, spec)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_views_that_are_not_contiguous(device) -> None:
    groups = Groups([3, 5], device)
    spec = FORMS["hinge all one"]
    expected = groups.tokens(triton_backend, spec)
    groups.logp = torch.stack([groups.logp, groups.logp * float("nan")], 1)[:, 0]
    groups.rewards = torch.stack([groups.rewards, groups.rewards + 7], 1)[:, 0]
    for ours, theirs in zip(groups.tokens(triton_backend, spec), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_results_share_no_memory(device) -> None:
    groups = Groups([3, 5], device)
    results = groups.tokens(triton_backend, FORMS["pro"])
    assert len({x.untyped_storage().data_ptr() for x in results}) == 4


def test_the_same_input_gives_the_same_bits(device) -> None:
    groups = Groups([40, 3, 20], device)
    for form in ("logistic all lambda", "pro", "listnet"):
        first = groups.tokens(triton_backend, FORMS[form])
        again = groups.tokens(triton_backend, FORMS[form])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_groups_of_one_size_need_no_offsets(device, poisoned) -> None:
    groups = Groups([5] * 7, device)
    for valid in (None, groups.valid):
        expected = groups.ranked(triton_backend, FORMS["pro"], valid)
        actual = triton_backend.rank_scores(
            groups.scores.view(7, 5), groups.rewards.view(7, 5), None,
            None if valid is None else valid.view(7, 5), FORMS["pro"],
        )  # fmt: skip
        assert torch.equal(actual[0], expected[0]) and actual[1].shape == (7, 5)
        assert torch.equal(actual[1].view(-1), expected[1])


def test_no_groups(device) -> None:
    nothing = torch.empty(0, device=device)
    start = torch.zeros(1, dtype=torch.int32)
    loss, grads = triton_backend.rank_scores(nothing, nothing, start, None, FORMS["pro"])
    assert loss.shape == grads.shape == (0,)
    result = triton_backend.rank_tokens(nothing, nothing, start, start, None, FORMS["pro"], 1.0)
    assert all(x.shape == (0,) for x in result)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_logprobs": torch.zeros(6, dtype=torch.float64)}, r"token_logprobs .*'torch'"),
        ({"token_logprobs": torch.zeros(2, 3)}, r"token_logprobs must have shape \(6,\), got"),
        ({"rewards": torch.zeros(3)}, r"cu_responses must have shape \(4,\), got \(3,\)"),
        ({"cu_responses": torch.zeros(3)}, r"cu_responses must be int64, int32 .* got float32"),
        ({"cu_groups": torch.tensor([0, 1])}, r"cu_groups must end at 2 .*, got 1"),
        ({"cu_groups": torch.tensor(2)}, r"cu_groups must have shape \[G \+ 1\], got \(\)"),
        ({"reference_scores": torch.zeros(3)}, r"reference_scores must have shape \(2,\), got"),
        ({"reference_scores": torch.zeros(2, device="meta")}, r"reference_scores must be on"),
    ],
)
def test_what_is_wrong_is_named(device, change, message) -> None:
    arguments = {
        "token_logprobs": torch.zeros(6),
        "rewards": torch.zeros(2),
        "cu_responses": torch.tensor([0, 3, 6]),
        "cu_groups": torch.tensor([0, 2]),
        "reference_scores": None,
    } | change
    for name in ("token_logprobs", "reference_scores"):
        value = arguments[name]
        if value is not None and value.device.type != "meta":
            arguments[name] = value.to(device)
    with pytest.raises(ValueError, match=message):
        triton_backend.rank_tokens(**arguments, spec=FORMS["pro"], scale=1.0)


def test_a_wrong_mask_is_named(device) -> None:
    scores = torch.zeros(4, device=device)
    start = offsets([4], "cpu")
    with pytest.raises(ValueError, match=r"valid must be bool .* got int64"):
        triton_backend.rank_scores(scores, scores, start, torch.ones(4).long(), FORMS["pro"])
    with pytest.raises(ValueError, match=r"valid must have shape \(4,\), got \(3,\)"):
        triton_backend.rank_scores(scores, scores, start, torch.ones(3).bool(), FORMS["pro"])


def test_the_error_that_is_allowed_is_small(device) -> None:
    """A result in bfloat16 is never within it."""
    groups = Groups([6, 5], device)
    for form in ("hinge all lambda", "pro", "listnet", "approx ndcg"):
        exact = groups.ranked(reference, FORMS[form], wide=True)
        assert exact[1].error.max() / exact[1].value.abs().max() < 2e-5
        with pytest.raises(AssertionError):
            assert_within([x.value.bfloat16().float() for x in exact], exact)
