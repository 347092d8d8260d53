"""Training in two phases against joint training: memory over n, tokens and time at 85 % accuracy.

    python bench/two_phase.py                      # both tables, and bench/results/two_phase.csv
    python bench/two_phase.py --only memory --candidates 8 64
    python bench/two_phase.py --only time --accuracy 0.75 0.85 0.95

Memory is what a step needs beyond model and gradients, at its peak, every figure in a process of
its own. Times are medians of steps that take turns in one process, after their gradients have been
compared; the rewards are the model's own scores plus noise, so that the model ranks them with the
accuracy that is asked for.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import fastrank
from fastrank import metrics
from fastrank.benchmarks.environment import describe
from fastrank.benchmarks.measure import interleave
from fastrank.benchmarks.memory import own_peak
from fastrank.training.two_phase import TwoPhaseOutput

# The C library shall give large blocks back at once: freed ones would hide part of a peak.
PROMPT_RETURN = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
LARGEST_ERROR = 1e-4  # of a gradient, relative norm, float32
RESULTS = Path(__file__).parent / "results" / "two_phase.csv"
MODES = ("joint", "joint, checkpointed", "two-phase")
FIELDS = (
    "mode", "candidates", "peak_mib", "ms", "spread", "accuracy", "live_fraction",
    "tokens_joint", "tokens_scored", "tokens_backpropagated", "work_saved",
    "gradient_error",
)  # fmt: skip


def make_model(args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        max_position_embeddings=args.prompt + args.response,
        initializer_range=0.05,
        pad_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return fastrank.prepare_model(model).train()


def make_groups(args: argparse.Namespace, num_groups: int, candidates: int) -> list[fastrank.Group]:
    generator = torch.Generator().manual_seed(1)

    def draw(length: int) -> Tensor:
        return torch.randint(0, args.vocab, (length,), generator=generator)

    return [
        fastrank.Group(
            draw(args.prompt),
            tuple(draw(args.response) for _ in range(candidates)),
            torch.rand(candidates, generator=generator),
        )
        for _ in range(num_groups)
    ]


def with_accuracy(
    model: nn.Module, groups: Sequence[fastrank.Group], accuracy: float
) -> list[fastrank.Group]:
    """The groups with rewards that the model ranks with this pairwise accuracy."""
    scores = fastrank.score(model, groups, max_tokens=4096)
    generator = torch.Generator().manual_seed(2)
    noise = [torch.randn(s.shape, generator=generator) for s in scores]
    low, high = 0.0, 100 * float(torch.cat(scores).std())
    for _ in range(50):
        middle = (low + high) / 2
        rewards = [s + middle * e for s, e in zip(scores, noise, strict=True)]
        if metrics.pairwise_accuracy(scores, rewards) > accuracy:
            low = middle
        else:
            high = middle
    return [
        fastrank.Group(g.prompt_ids, g.response_ids, r)
        for g, r in zip(groups, rewards, strict=True)
    ]


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


def gradient_error(model: nn.Module, steps: dict[str, Callable[[], object]]) -> float:
    """Largest relative difference of a parameter's gradient from that of joint training.

    Raises:
        RuntimeError: it is no rounding, so nothing is timed.
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


def memory_of(args: argparse.Namespace, mode: str, candidates: int) -> float:
    """MiB, in a fresh process."""
    shape = [f"--{name}={getattr(args, name)}" for name in SHAPE]
    command = [sys.executable, __file__, *shape, "--measure", mode, "--candidates", str(candidates)]
    environment = {**os.environ, **PROMPT_RETURN}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise RuntimeError(f"{mode}, n = {candidates}: {done.stderr.strip().splitlines()[-1:]}")
    return float(done.stdout.strip().splitlines()[-1])


def measure_memory(args: argparse.Namespace) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    print(f"peak memory of a step in MiB, packs of {args.max_tokens} tokens")
    for mode in MODES:
        found = [memory_of(args, mode, n) for n in args.candidates]
        for n, peak in zip(args.candidates, found, strict=True):
            rows.append({"mode": mode, "candidates": n, "peak_mib": round(peak, 1)})
        cells = "  ".join(
            f"n={n}: {peak:8.1f}" for n, peak in zip(args.candidates, found, strict=True)
        )
        print(f"  {mode:20}  {cells}  (last / first: {found[-1] / found[0]:.2f})", flush=True)
    return rows


def measure_time(args: argparse.Namespace) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    model = make_model(args)
    plain = make_groups(args, args.time_groups, args.time_candidates)
    for accuracy in args.accuracy:
        groups = with_accuracy(model, plain, accuracy)
        scores = fastrank.score(model, groups, max_tokens=4096)
        found = metrics.pairwise_accuracy(scores, [g.rewards for g in groups])
        steps = {mode: make_step(mode, model, groups, args.max_tokens) for mode in MODES}
        error = gradient_error(model, steps)
        output = steps["two-phase"]()
        assert output is not None
        share = output.tokens_backpropagated / output.tokens_joint
        print(
            f"RRHF, n = {args.time_candidates}, pairwise accuracy {found:.3f}: live_fraction "
            f"{output.live_fraction:.3f}; back-propagated {output.tokens_backpropagated} of "
            f"{output.tokens_joint} tokens ({share:.3f}); work_saved {output.work_saved:.3f}; "
            f"gradients differ from joint ones by {error:.0e}"
        )
        timings = interleave(steps, torch.device("cpu"), seconds=args.seconds)
        base = timings["joint, checkpointed"].median
        for mode, timing in timings.items():
            print(
                f"  {mode:20}  {timing.median:8.0f} ms  ± {timing.spread:4.0%}  "
                f"{timing.median / base:.2f} x checkpointed",
                flush=True,
            )
            row: dict[str, object] = {
                "mode": mode,
                "candidates": args.time_candidates,
                "ms": round(timing.median, 1),
                "spread": round(timing.spread, 3),
                "accuracy": round(float(found), 4),
            }
            if mode == "two-phase":
                row |= {
                    "live_fraction": round(output.live_fraction, 4),
                    "tokens_joint": output.tokens_joint,
                    "tokens_scored": output.tokens_scored,
                    "tokens_backpropagated": output.tokens_backpropagated,
                    "work_saved": round(output.work_saved, 4),
                    "gradient_error": f"{error:.1e}",
                }
            rows.append(row)
    return rows


SHAPE = ("groups", "prompt", "response", "vocab", "hidden", "layers", "max_tokens")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in zip(SHAPE, (2, 64, 32, 4096, 256, 4, 640), strict=True):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--candidates", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--time_candidates", type=int, default=6, help="of a timed group")
    parser.add_argument("--time_groups", type=int, default=16, help="of a timed step")
    parser.add_argument("--accuracy", type=float, nargs="+", default=[0.85])
    parser.add_argument("--seconds", type=float, default=60.0, help="of interleaved timing")
    parser.add_argument("--only", choices=("memory", "time"))
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file")
    parser.add_argument("--measure", choices=MODES, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    warnings.simplefilter("ignore", FutureWarning)  # of transformers, on checkpointing's name
    if args.measure:
        model = make_model(args)
        step = make_step(
            args.measure, model, make_groups(args, args.groups, args.candidates[0]), args.max_tokens
        )
        print(own_peak(step) / 2**20)
        return
    rows = [] if args.only == "time" else measure_memory(args)
    rows += [] if args.only == "memory" else measure_time(args)
    machine = describe(torch.device("cpu"))
    sizes = {name: getattr(args, name) for name in SHAPE}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*sizes, *FIELDS, *machine])
        writer.writeheader()
        for row in rows:
            writer.writerow({**sizes, **row, **machine})
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
