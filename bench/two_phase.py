"""Training in two phases against joint training: memory over n, tokens and time at 85 % accuracy.

    python -m bench.two_phase                      # both tables, and bench/results/two_phase.csv
    python -m bench.two_phase --only memory --candidates 8 64
    python -m bench.two_phase --only time --accuracy 0.75 0.85 0.95

Memory is the peak of a step beyond model and gradients, every figure in a process of its own. Times
are medians of steps that take turns in one process, after their gradients have been compared; the
rewards are made so that the model ranks them with the accuracy that is asked for.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import fastrank
from fastrank import metrics
from fastrank.benchmarks.peak_memory import fresh_process_peak
from fastrank.benchmarks.problem import rewards_with_accuracy
from fastrank.benchmarks.provenance import provenance
from fastrank.benchmarks.results import write_csv
from fastrank.benchmarks.timing import interleave
from fastrank.training.two_phase import TwoPhaseOutput

LARGEST_ERROR = 1e-4  # of a gradient, relative norm, float32
RESULTS = Path(__file__).parent / "results" / "two_phase.csv"
MODES = ("joint", "joint, checkpointed", "two-phase")
SHAPE = {"groups": 2, "prompt": 64, "response": 32, "vocab": 4096, "hidden": 256, "layers": 4,
         "max_tokens": 640}  # fmt: skip

Shape = dict[str, int]
"""Sizes by the names of `SHAPE`."""


@dataclass
class Row:
    """Figures of one mode: of its memory, or of its time and tokens."""

    mode: str
    candidates: int
    peak_mib: float | None = None
    ms: float | None = None
    spread: float | None = None
    accuracy: float | None = None
    ratio: float | None = None
    """``ms`` over that of checkpointed joint training."""
    live_fraction: float | None = None
    tokens_joint: int | None = None
    tokens_scored: int | None = None
    tokens_backpropagated: int | None = None
    work_saved: float | None = None
    gradient_error: float | None = None


def make_model(shape: Shape) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=3 * shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["hidden"] // 64,
        max_position_embeddings=shape["prompt"] + shape["response"],
        initializer_range=0.05,
        pad_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return fastrank.prepare_model(model).train()


def make_groups(shape: Shape, num_groups: int, candidates: int) -> list[fastrank.Group]:
    generator = torch.Generator().manual_seed(1)

    def draw(length: int) -> Tensor:
        return torch.randint(0, shape["vocab"], (length,), generator=generator)

    return [
        fastrank.Group(
            draw(shape["prompt"]),
            tuple(draw(shape["response"]) for _ in range(candidates)),
            torch.rand(candidates, generator=generator),
        )
        for _ in range(num_groups)
    ]


def with_accuracy(
    model: nn.Module, groups: Sequence[fastrank.Group], accuracy: float
) -> tuple[list[fastrank.Group], float]:
    """The groups with rewards that the model ranks with about this pairwise accuracy, and the
    accuracy found."""
    scores = fastrank.score(model, groups, max_tokens=4096)
    generator = torch.Generator().manual_seed(2)
    rewards = list(rewards_with_accuracy(torch.stack(scores), accuracy, generator))
    ranked = [
        fastrank.Group(g.prompt_ids, g.response_ids, r)
        for g, r in zip(groups, rewards, strict=True)
    ]
    return ranked, float(metrics.pairwise_accuracy(scores, rewards))


def make_step(
    mode: str, model: nn.Module, groups: Sequence[fastrank.Group], max_tokens: int
) -> Callable[[], TwoPhaseOutput | None]:
    """A step's packing, forward and backward passes."""
    loss = fastrank.RRHF()
    if mode == "two-phase":
        return lambda: fastrank.two_phase_backward(model, groups, loss=loss, max_tokens=max_tokens)
    # Joint training cannot split a group: its packs are at least one group large.
    largest = max(group.num_tokens_shared for group in groups)

    def joint() -> None:
        if mode == "joint, checkpointed":
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        for pack in fastrank.pack(groups, max_tokens=max(max_tokens, largest)):
            (model(pack=pack, loss=loss, reduction="sum").loss / len(groups)).backward()
        model.gradient_checkpointing_disable()  # type: ignore[operator]

    return joint


def fresh_step(shape: Shape, mode: str, candidates: int) -> Callable[[], Any]:
    """A step with its model and groups, for a process of its own."""
    groups = make_groups(shape, shape["groups"], candidates)
    return make_step(mode, make_model(shape), groups, shape["max_tokens"])


def gradient_error(model: nn.Module, steps: dict[str, Callable[[], object]]) -> float:
    """Largest relative difference of a parameter's gradient from that of joint training.

    Raises:
        RuntimeError: it is more than rounding, so nothing is timed.
    """
    found = []
    for mode in ("joint", "two-phase"):
        model.zero_grad()
        steps[mode]()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    worst = max(float((a - b).norm() / a.norm()) for a, b in zip(*found, strict=True))
    if not worst <= LARGEST_ERROR:
        raise RuntimeError(f"gradients in two phases are wrong by {worst:.1e}: nothing is timed")
    return worst


def measure_memory(shape: Shape, candidates: Sequence[int]) -> list[Row]:
    rows = []
    for mode in MODES:
        for n in candidates:
            peak = fresh_process_peak(
                "bench.two_phase:fresh_step", shape=shape, mode=mode, candidates=n
            )
            rows.append(Row(mode, n, peak_mib=None if peak is None else peak / 2**20))
            show(rows[-1])
    return rows


def measure_time(shape: Shape, args: argparse.Namespace) -> list[Row]:
    rows = []
    model = make_model(shape)
    plain = make_groups(shape, args.time_groups, args.time_candidates)
    for accuracy in args.accuracy:
        groups, found = with_accuracy(model, plain, accuracy)
        steps = {mode: make_step(mode, model, groups, shape["max_tokens"]) for mode in MODES}
        error = gradient_error(model, steps)
        output = steps["two-phase"]()
        assert output is not None
        timings = interleave(steps, torch.device("cpu"), seconds=args.seconds)
        for mode, timing in timings.items():
            row = Row(mode, args.time_candidates, None, timing.median, timing.spread, found)
            row.ratio = timing.median / timings["joint, checkpointed"].median
            if mode == "two-phase":
                for name in ("live_fraction", "tokens_joint", "tokens_scored",
                             "tokens_backpropagated", "work_saved"):  # fmt: skip
                    setattr(row, name, getattr(output, name))
                row.gradient_error = error
            show(row)
            rows.append(row)
    return rows


def show(row: Row) -> None:
    """The figures that a row has, on one line."""
    figures = {name: value for name, value in vars(row).items() if value is not None}
    mode = figures.pop("mode")
    print(f"{mode:20} " + "; ".join(f"{k} {v:,.4g}" for k, v in figures.items()), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    for name, size in SHAPE.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--candidates", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--time_candidates", type=int, default=6, help="of a timed group")
    parser.add_argument("--time_groups", type=int, default=16, help="of a timed step")
    parser.add_argument("--accuracy", type=float, nargs="+", default=[0.85])
    parser.add_argument("--seconds", type=float, default=60.0, help="of interleaved timing")
    parser.add_argument("--only", choices=("memory", "time"))
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore", FutureWarning)  # of transformers, on checkpointing's name
    shape = {name: getattr(args, name) for name in SHAPE}
    rows = [] if args.only == "time" else measure_memory(shape, args.candidates)
    rows += [] if args.only == "memory" else measure_time(shape, args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_csv(rows, args.output, {**shape, **provenance(torch.device("cpu"))})
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
