"""Kernels on a GPU: no waiting, replay in a graph, other devices."""

from __future__ import annotations

import pytest
import torch
from error_budget import assert_within, log_probability_error, within_roundings

pytest.importorskip("triton")

from fastrank_kernels import RankSpec, reference, triton_backend  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


class Workload:
    """G groups of n candidates of a given length; everything on the device."""

    def __init__(self, groups: int, candidates: int, length: int, device: str = "cuda") -> None:
        count = groups * candidates
        self.logp = -3 * torch.rand(count * length, device=device)
        self.rewards = torch.randint(0, 5, (count,), device=device).float()
        steps = torch.arange(count + 1, dtype=torch.int32, device=device)
        self.cu_responses = steps * length
        self.cu_groups = steps[: groups + 1] * candidates

    def run(self, spec: RankSpec, module=triton_backend, cast=lambda x: x):
        return module.rank_tokens(
            cast(self.logp), self.rewards, self.cu_responses, self.cu_groups, None, spec, 0.5
        )

    def exact(self, spec: RankSpec):
        return within_roundings(lambda cast: self.run(spec, reference, cast))


HINGE = RankSpec("pairwise", sft_weight=1.0)
PRO = RankSpec("staged", stage_scale="reward_gap", sft_weight=0.05, sft_growth="square")


@pytest.mark.parametrize("spec", [HINGE, PRO], ids=["rrhf", "pro"])
def test_rank_waits_for_nothing_with_device_offsets(spec) -> None:
    work = Workload(8, 6, 50)
    work.run(spec)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work.run(spec)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("spec", [HINGE, PRO], ids=["rrhf", "pro"])
def test_rank_replayed_in_a_graph(spec) -> None:
    work = Workload(64, 8, 40)
    work.run(spec)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work.run(spec)
    work.logp.copy_(-3 * torch.rand_like(work.logp))
    graph.replay()
    for ours, theirs in zip(captured, work.run(spec), strict=True):
        assert torch.equal(ours, theirs)
    assert_within(captured, work.exact(spec))


def test_a_training_sized_chunk_gives_the_same_bits_each_time() -> None:
    logits = torch.randn(2048, 128256, device="cuda") * 4
    labels = torch.randint(0, 128256, (2048,), device="cuda")
    first = triton_backend.row_stats(logits, labels, None, 1.0, None)
    for _ in range(5):
        again = triton_backend.row_stats(logits, labels, None, 1.0, None)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    exact = torch.logsumexp(logits[:256].double(), -1)
    assert ((first[0][:256] - exact).abs() <= log_probability_error(logits[:256], None)).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_tensors_on_a_device_that_is_not_the_current_one() -> None:
    work = Workload(4, 5, 30, device="cuda:1")
    with torch.cuda.device(0):
        actual = work.run(HINGE)
    assert all(x.device == torch.device("cuda:1") for x in actual)
    assert_within(actual, work.exact(HINGE))
