"""`dlogits` against the reference in float64, in memory of its own and over the logits."""

from __future__ import annotations

import pytest
import torch
from error_budget import gradient_error

pytest.importorskip("triton")

from fastrank_kernels import reference, triton_backend  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = {
    "bare": {"bias": False, "logit_scale": 1.0, "softcap": None},
    "bias and scale": {"bias": True, "logit_scale": 0.37, "softcap": None},
    "softcap": {"bias": False, "logit_scale": 1.0, "softcap": 30.0},
    "all": {"bias": True, "logit_scale": 1.7, "softcap": 7.5},
}
# What may lie over what: no wider, row by row from the same address.
OVERLAYS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]


class Case:
    """Logits, statistics from the reference in float64, and coefficients of both signs and 0."""

    def __init__(self, rows, vocab, dtype, device, *, bias=False, logit_scale=1.0, softcap=None):
        self.logits = (torch.randn(rows, vocab) * 4).to(device=device, dtype=dtype)
        self.labels = torch.randint(0, vocab, (rows,), device=device)
        self.bias = torch.randn(vocab, device=device).to(dtype) if bias else None
        self.scale, self.cap = logit_scale, softcap
        self.coefficients = torch.randn(rows, device=device) * torch.logspace(
            -3, 3, rows, device=device
        )
        self.coefficients[rows // 2] = 0.0
        self.measure()

    def measure(self) -> None:
        wide = None if self.bias is None else self.bias.double()
        stats = reference.row_stats(self.logits.double(), self.labels, wide, self.scale, self.cap)
        self.lse, self.logp = (x.float() for x in stats)
        self.exact = torch.empty_like(self.logits, dtype=torch.float64)
        reference.dlogits(
            self.logits.double(), self.labels, *stats, self.coefficients.double(), wide,
            self.scale, self.cap, out=self.exact,
        )  # fmt: skip

    def run(self, out, live=None, logits=None):
        return triton_backend.dlogits(
            self.logits if logits is None else logits, self.labels, self.lse, self.logp,
            self.coefficients, self.bias, self.scale, self.cap, out=out, live=live,
        )  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("vocab", [1, 7, 32, 257, 1000, 4101])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference(device, approximate, dtype, vocab, options) -> None:
    case = Case(3, vocab, dtype, device, **options)
    memory = torch.full((3, vocab + 3), float("nan"), device=device)
    out = case.run(memory[:, :vocab])
    assert out.data_ptr() == memory.data_ptr()
    z = (case.logits.double() + (0.0 if case.bias is None else case.bias.double())) * case.scale
    z = z if case.cap is None else case.cap * torch.tanh(z / case.cap)
    error = (out - case.exact).abs().amax(1)
    assert (error <= gradient_error(z, case.cap, case.coefficients, case.scale)).all()
    assert memory[:, vocab:].isnan().all()


@pytest.mark.parametrize("options", [OPTIONS["bare"], OPTIONS["all"]], ids=["bare", "all"])
@pytest.mark.parametrize("vocab", [5, 1000, 8193])
@pytest.mark.parametrize(("dtype", "narrow"), OVERLAYS, ids=str)
def test_over_the_logits_bit_for_bit(device, dtype, narrow, vocab, options) -> None:
    """A race between blocks would show as a difference from a second buffer."""
    case = Case(4, vocab, dtype, device, **options)
    separate = case.run(torch.full((4, vocab), float("nan"), dtype=narrow, device=device))
    memory = case.logits.clone()
    overlay = memory.view(narrow)[:, :vocab]
    out = case.run(overlay, logits=memory)
    assert out.data_ptr() == memory.data_ptr()
    assert torch.equal(out, separate)


@pytest.mark.parametrize("module", [reference, triton_backend], ids=["reference", "triton"])
@pytest.mark.parametrize("options", [OPTIONS["bare"], OPTIONS["all"]], ids=["bare", "all"])
@pytest.mark.parametrize("in_place", [True, False])
def test_parts_of_the_vocabulary_make_the_whole_bit_for_bit(
    device, module, options, in_place
) -> None:
    """A label lies in one of three uneven parts, and is no column of the others."""
    case = Case(6, 301, torch.float32, device, **options)
    case.labels[:4] = torch.tensor([0, 116, 117, 300])
    case.measure()
    live = torch.tensor([0, 1, 4, 5], device=device)

    def run(first: int, end: int, sharded: bool, live=None) -> torch.Tensor:
        logits = case.logits[:, first:end].clone()
        apart = not in_place or live is not None
        return module.dlogits(
            logits, case.labels - first, case.lse, case.logp, case.coefficients,
            None if case.bias is None else case.bias[first:end], case.scale, case.cap,
            out=torch.empty_like(logits) if apart else logits, live=live, sharded=sharded,
        )  # fmt: skip

    for rows in (None, live):
        parts = [run(*at, True, rows) for at in ((0, 117), (117, 120), (120, 301))]
        assert torch.equal(torch.cat(parts, 1), run(0, 301, False, rows))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "narrow"), OVERLAYS, ids=str)
def test_over_the_logits_bit_for_bit_at_scale(device, dtype, narrow) -> None:
    case = Case(512, 128256, dtype, device)
    separate = case.run(torch.empty(512, 128256, dtype=narrow, device=device))
    for _ in range(20):
        memory = case.logits.clone()
        assert torch.equal(case.run(memory.view(narrow)[:, :128256], logits=memory), separate)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("logits_dtype", ["the same", "float32"])
def test_confident_tokens_are_no_worse_than_plain_pytorch(device, dtype, logits_dtype) -> None:
    """At p_y > 0.99 the label's gradient is a small difference of numbers near 1."""
    vocab, rows = 515, 24
    logits = torch.randn(rows, vocab, device=device).to(dtype)
    labels = torch.randint(0, vocab, (rows,), device=device)
    confident = torch.linspace(13, 18, rows, device=device).to(dtype)
    logits[torch.arange(rows, device=device), labels] = confident
    plain = logits.clone().requires_grad_()
    # Large enough to keep float16's subnormal numbers out of the comparison.
    coefficients = torch.full((rows,), -64.0, device=device)
    picked = torch.log_softmax(plain, -1).gather(1, labels[:, None]).squeeze(1)
    picked.backward(coefficients.to(dtype))
    case = Case(rows, vocab, torch.float32, device)
    case.logits = logits if logits_dtype == "the same" else logits.float()
    case.labels, case.coefficients = labels, coefficients
    case.measure()
    assert (case.logp.exp() > 0.99).all()
    out = case.run(torch.full((rows, vocab), float("nan"), dtype=dtype, device=device))
    at = labels[:, None]
    exact = case.exact.gather(1, at)
    ours = ((out.double().gather(1, at) - exact) / exact).abs().max()
    theirs = ((plain.grad.double().gather(1, at) - exact) / exact).abs().max()
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    assert ours <= 1.01 * rounding  # nothing but the last cast
    assert ours <= theirs


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16], ids=str)
def test_live_rows_are_written_in_order(device, narrow) -> None:
    case = Case(12, 300, torch.float32, device, **OPTIONS["all"])
    live = torch.tensor([0, 3, 4, 9, 11], device=device)
    out = case.run(torch.full((5, 300), float("nan"), dtype=narrow, device=device), live)
    whole = case.run(torch.full((12, 300), float("nan"), dtype=narrow, device=device))
    assert torch.equal(out, whole[live])


def test_live_leaves_the_rest_of_a_larger_buffer_alone(device) -> None:
    case = Case(6, 40, torch.float32, device)
    buffer = torch.full((6, 40), float("nan"), device=device)
    out = case.run(buffer, torch.tensor([1, 5], device=device))
    assert out.shape == (2, 40) and not out.isnan().any() and buffer[2:].isnan().all()
    nothing = case.run(buffer, torch.empty(0, dtype=torch.int64, device=device))
    assert nothing.shape == (0, 40)


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16], ids=str)
def test_live_over_the_logits_is_refused(device, narrow) -> None:
    case = Case(6, 40, torch.float32, device)
    live = torch.tensor([1, 5], device=device)
    with pytest.raises(ValueError, match="out must be separate from logits when live is given"):
        case.run(case.logits.view(narrow)[:, :40], live)


def test_a_dead_row_is_zero_without_hiding_a_nan(device) -> None:
    case = Case(4, 50, torch.float32, device)
    case.coefficients.zero_()
    case.logits[1, 7] = float("nan")
    case.logits[2] = float("-inf")
    case.labels[3] = 50
    case.measure()
    expected = torch.empty(4, 50, device=device)
    reference.dlogits(
        case.logits, case.labels, case.lse, case.logp, case.coefficients, None, 1.0, None,
        out=expected,
    )  # fmt: skip
    out = case.run(torch.full((4, 50), float("nan"), device=device))
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert (out[0] == 0).all() and out[1].isnan().all() and out[3, 49].isnan()


def test_a_label_outside_the_vocabulary_puts_nan_into_its_row(device) -> None:
    case = Case(4, 30, torch.float32, device)
    case.coefficients.fill_(1.0)
    case.labels = torch.tensor([-1, 30, 2**40, 29], device=device)
    case.measure()
    out = case.run(torch.empty(4, 30, device=device))
    assert out[0, 0].isnan() and out[1, 29].isnan() and out[2, 29].isnan()
    assert out.isnan().sum() == 3


def test_row_offsets_pass_two_to_the_31(device) -> None:
    stride, vocab = 2**30 + 5, 70
    memory = torch.empty(2 * stride + vocab, dtype=torch.float16, device=device)
    case = Case(3, vocab, torch.float16, device)
    logits = memory.as_strided((3, vocab), (stride, 1))
    logits.copy_(case.logits)
    expected = case.run(torch.empty(3, vocab, dtype=torch.float16, device=device))
    assert torch.equal(case.run(logits, logits=logits), expected)


def test_interleaved_memory_is_separate(device) -> None:
    """Logits in the left half of every row of a buffer and the result in the right half."""
    case = Case(5, 40, torch.float32, device)
    buffer = torch.full((5, 80), float("nan"), device=device)
    buffer[:, :40] = case.logits
    out = case.run(buffer[:, 40:], torch.tensor([2, 4], device=device), logits=buffer[:, :40])
    expected = case.run(torch.empty(5, 40, device=device))
    assert torch.equal(out, expected[[2, 4]]) and torch.equal(buffer[:, :40], case.logits)


def test_other_overlaps_are_refused(device) -> None:
    case = Case(4, 40, torch.float32, device)
    memory = torch.zeros(6, 40, device=device)
    wrong = {
        "a row later": (memory[:4], memory[1:5]),
        "a column later": (memory.view(-1)[:160].view(4, 40), memory.view(-1)[1:161].view(4, 40)),
        "another pitch": (memory[:4], memory.view(-1)[:160].view(torch.bfloat16)[:160].view(4, 40)),
    }
    for logits, out in wrong.values():
        with pytest.raises(ValueError, match="out must be separate from logits, or lie over it"):
            case.run(out, logits=logits)
    narrow = Case(4, 40, torch.bfloat16, device)
    wide = torch.zeros(4, 40, device=device)
    with pytest.raises(ValueError, match="no wider type"):
        narrow.run(wide, logits=wide.view(torch.bfloat16)[:, :40])


def test_the_same_input_gives_the_same_bits(device) -> None:
    case = Case(9, 5003, torch.float32, device, **OPTIONS["all"])
    first = case.run(torch.empty(9, 5003, device=device))
    for _ in range(3):
        assert torch.equal(case.run(torch.empty(9, 5003, device=device)), first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.zeros(2, 8)}, r"out must have shape \[3 or more, 8\], got \(2, 8\)"),
        ({"out": torch.zeros(3, 9)}, r"out must have shape \[3 or more, 8\], got \(3, 9\)"),
        ({"out": torch.zeros(3, 8).double()}, r"out must be float32, bfloat16, float16 .*float64"),
        ({"out": torch.zeros(8).expand(3, 8)}, r"out must have rows that do not overlap"),
        ({"lse": torch.zeros(2)}, r"lse must have shape \(3,\), got \(2,\)"),
        ({"coefficients": torch.zeros(3, 1)}, r"coefficients must have shape \(3,\), got \(3, 1\)"),
        ({"live": torch.zeros(2)}, r"live must be int64, int32 .* got float32"),
        ({"logp": torch.zeros(3, device="meta")}, r"logp must be on .* like logits, got meta"),
    ],
)
def test_what_is_wrong_is_named(device, change, message) -> None:
    arguments = {
        "logits": torch.zeros(3, 8),
        "labels": torch.zeros(3, dtype=torch.int64),
        "lse": torch.zeros(3),
        "logp": torch.zeros(3),
        "coefficients": torch.zeros(3),
        "out": torch.zeros(3, 8),
        "live": None,
    } | change
    for name, value in arguments.items():
        if value is not None and value.device.type != "meta":
            strides = value.stride()
            moved = value.to(device)
            arguments[name] = moved.expand(3, 8) if 0 in strides and name == "out" else moved
    if "do not overlap" in message:
        arguments["out"] = torch.zeros(8, device=device).expand(3, 8)
    with pytest.raises(ValueError, match=message):
        triton_backend.dlogits(**arguments, bias=None, logit_scale=1.0, softcap=None)
