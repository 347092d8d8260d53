"""``make compare``: the effect of each loss on the same candidates, as in the papers' tables.

One base model, one reward (`bench/happy_reward.py`), one set of prompts. For each seed the base
model's samples are scored, and every method starts from the base model and sees the same
candidates. The figures are of fresh samples for prompts that no method has seen: their mean reward,
their perplexity under the base model (how much of the language is left), and how well the trained
model's own scores order held-out candidates of the base model.

    python -m bench.compare             # every loss, on stored candidates
    python -m bench.compare --online    # RRHF, stored or drawn during training

from the repository's root; ``--help`` lists the sizes, and `bench.tables` puts the results into the
README. With ``--online`` the offline methods train on the base model's candidates; the online ones
see as many prompts in as many steps, but draw the candidates from the model in training, every 8
steps (10 rounds in 80 steps). Online training takes a lower learning rate and a heavier SFT term:
nothing in its candidates holds it near the base model. The offline method is therefore shown at
both settings. The curves of the first seed's online runs are copied to the output folder.

Every step is a command of the library, called in process.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import math
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context
from operator import ge, gt, le
from pathlib import Path
from typing import Any

from bench.story_task import openings, story_model, write_prompts
from fastrank.benchmarks.results import markdown_table, read_csv, write_csv
from fastrank.console import Bar

REWARD = f"{Path(__file__).resolve().parent / 'happy_reward.py'}:reward"
BASE = "base model"
EVERY = 8  # steps between online rounds

_GENTLE = {"learning_rate": 3e-4, "loss_kwargs": {"sft_weight": 3.0}}
# With DPO's own β and scores.
_OVER_REFERENCE = {"beta": 0.1, "uses_reference": True, "normalize": "sum"}
METHODS: dict[str, dict[str, Any]] = {
    # With a margin so far below 0 no pair counts: only RRHF's SFT term is left.
    "SFT on the best": {"loss_kwargs": {"margin": -1e9}},
    "RRHF": {},
    "RRHF without SFT": {"loss_kwargs": {"sft_weight": 0.0}},
    "PRO": {"loss": "pro"},
    "DPO, best and worst": {"loss": "dpo", "loss_kwargs": {"pairs": "best_worst"}},
    "ListMLE": {"loss": "listmle"},
    "RRHF, rank margins": {"loss_kwargs": {"margin": 0.1, "margin_by": "rank"}},
    "Plackett-Luce DPO": {"loss": "listmle", "loss_kwargs": _OVER_REFERENCE},
    "InfoNCA": {"loss": "listnet", "loss_kwargs": _OVER_REFERENCE},
    "NCA": {"loss": "nca", "loss_kwargs": {"beta": 0.1}},
    "LIRE": {"loss": "lire"},
    "offline RRHF": {},
    "offline RRHF, online settings": _GENTLE,
    "online RRHF": {**_GENTLE, "kl_weight": 0.0},
    "online RRHF with penalty": {**_GENTLE, "kl_weight": 10.0},
}
"""Options of ``fastrank train`` (RRHF unless they say otherwise); an online method has a weight of
its penalty, ``kl_weight``."""
OFFLINE = list(METHODS)[:11]
ONLINE = list(METHODS)[11:]


@dataclass(frozen=True)
class Plan:
    """Sizes of a comparison."""

    model: str
    work: Path
    prompts: int = 320
    heldout: int = 80
    samples: int = 6
    tokens: int = 60
    epochs: float = 2.0
    learning_rate: float = 1e-3
    batch_size: int = 8

    def folder(self, seed: int) -> Path:
        return self.work / f"seed{seed}"

    def output_dir(self, seed: int, method: str) -> Path:
        return self.folder(seed) / method.replace(" ", "-")


SIZES = [field for field in dataclasses.fields(Plan) if field.name not in ("model", "work")]


@dataclass(frozen=True)
class Outcome:
    """One method with one seed, on held-out prompts.

    Attributes:
        method, seed: what was run.
        reward: mean reward of fresh samples; ``standard_error`` over the prompts.
        perplexity: of the fresh samples under the base model.
        accuracy: pairwise ranking accuracy on held-out candidates of the base model.
    """

    method: str
    seed: int
    reward: float
    standard_error: float
    perplexity: float
    accuracy: float


# ---- running -------------------------------------------------------------------------------------


def run_command(command: str, **options: Any) -> dict[str, Any]:
    """Run a command of the library in this process, with one thread; its result.

    Raises:
        RuntimeError: it failed; the reason is on stderr.
    """
    import torch

    from fastrank.cli.main import main

    torch.set_num_threads(1)
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    with redirect_stdout(io.StringIO()) as said:
        code = main([command, *arguments, "--json"])
    if code != 0:
        raise RuntimeError(f"fastrank {command} ended with code {code}: {arguments}")
    result: dict[str, Any] = json.loads(said.getvalue().splitlines()[-1])
    return result


def prepare(plan: Plan, seed: int) -> None:
    """Write the seed's ranked candidates, for training and held out: sample, then reward."""
    folder = plan.folder(seed)
    folder.mkdir(parents=True, exist_ok=True)
    found = openings(plan.prompts + plan.heldout)
    splits = {"train": found[: plan.prompts], "heldout": found[plan.prompts :]}
    for name, prompts in splits.items():
        write_prompts(prompts, folder / f"{name}-prompts.jsonl")
        samples = folder / f"{name}-samples.jsonl"
        run_command(
            "sample", model=plan.model, prompts=folder / f"{name}-prompts.jsonl", output=samples,
            partial="discard", **_decoding(plan, seed),
        )  # fmt: skip
        run_command(
            "reward", data=samples, output=folder / f"{name}.jsonl", reward=REWARD,
            partial="discard", device="cpu",
        )  # fmt: skip


def _decoding(plan: Plan, seed: int) -> dict[str, Any]:
    return {
        "num_responses": plan.samples,
        "max_new_tokens": plan.tokens,
        "batch_size": 64,
        "seed": seed,
        "device": "cpu",
    }


def run_method(plan: Plan, seed: int, method: str) -> Outcome:
    """Train one method from the base model and measure it."""
    if method == BASE:
        return measure(plan, seed, method, plan.model)
    options = {"loss": "rrhf", "learning_rate": plan.learning_rate, **METHODS[method]}
    options["loss_kwargs"] = json.dumps(options.get("loss_kwargs", {}))
    if "kl_weight" in options:
        options |= {
            "online_every": EVERY,
            "online_prompts": plan.folder(seed) / "train-prompts.jsonl",
            "reward": REWARD,
            "online_responses": plan.samples,
            "online_max_new_tokens": plan.tokens,
            "online_batch_size": 64,
        }
    else:
        options |= {
            "data": plan.folder(seed) / "train.jsonl",
            "eval_fraction": 0,
            "eval_groups": 1,
            # A response that was cut at the limit has no end; this keeps it from being taught one.
            "max_response_length": plan.tokens,
        }
    folder = plan.output_dir(seed, method)
    run_command(
        "train",
        model=plan.model,
        num_train_epochs=plan.epochs,
        per_device_train_batch_size=plan.batch_size,
        logging_steps=EVERY,
        save_strategy="no",
        overwrite_output_dir="true",
        disable_tqdm="true",
        use_cpu="true",
        seed=seed,
        output_dir=folder,
        **options,
    )
    return measure(plan, seed, method, folder)


def measure(plan: Plan, seed: int, method: str, model: Path | str) -> Outcome:
    """Fresh samples of a model for the held-out prompts: their reward and their perplexity under
    the base model; and how the model orders the base model's candidates."""
    folder = plan.folder(seed)
    fresh = run_command(
        "evaluate", model=model, prompts=folder / "heldout-prompts.jsonl", reward=REWARD,
        perplexity_model=plan.model, **_decoding(plan, 1000 + seed),
    )  # fmt: skip
    scored = run_command(
        "score", model=model, data=folder / "heldout.jsonl", max_response_length=plan.tokens,
        device="cpu",
    )  # fmt: skip
    return Outcome(
        method=method,
        seed=seed,
        reward=fresh["reward"]["mean"],
        standard_error=fresh["reward"]["standard_error"],
        perplexity=fresh["perplexity"],
        accuracy=(scored["metrics"] or {}).get("pairwise_accuracy", math.nan),
    )


def run_all(plan: Plan, seeds: int, methods: Sequence[str], jobs: int) -> list[Outcome]:
    """Every method with every seed; ``jobs`` processes at once (1: in this process)."""
    tasks = [(plan, seed, method) for seed in range(seeds) for method in methods]
    rows: list[Outcome] = []
    with Bar(total=len(tasks) + seeds, desc="comparing", unit="runs") as bar:
        for _ in _each(prepare, [(plan, seed) for seed in range(seeds)], jobs):
            bar.update()
        for row in _each(run_method, tasks, jobs):
            rows.append(row)
            bar.update()
            bar.describe(f"{row.method} {row.reward:.2f}")
    order = {name: i for i, name in enumerate(methods)}
    return sorted(rows, key=lambda row: (order[row.method], row.seed))


def _each(
    function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], jobs: int
) -> Iterator[Any]:
    """Results of the tasks, as they come."""
    if jobs == 1:
        for task in tasks:
            yield function(*task)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(function, *task) for task in tasks]):
            yield future.result()


# ---- results -------------------------------------------------------------------------------------


def by_method(rows: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Rows by method, in the order of their first row."""
    found: dict[str, list[Outcome]] = {}
    for row in rows:
        found.setdefault(row.method, []).append(row)
    return found


def outcome_table(rows: Sequence[Outcome]) -> str:
    """Means over the seeds, ± the standard deviation between seeds, as Markdown."""
    figures = {"reward": 2, "perplexity": 1, "accuracy": 3}  # digits
    lines = [
        [method, *(_with_spread([getattr(r, n) for r in own], k) for n, k in figures.items())]
        for method, own in by_method(rows).items()
    ]
    return markdown_table(("method", "reward", "perplexity", "ranking accuracy"), lines)


def _with_spread(values: Sequence[float], digits: int) -> str:
    mean = statistics.fmean(values)
    if mean >= 100:
        digits = 0
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    spread = statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def comparison_table(path: Path) -> str:
    """A recorded comparison as Markdown, with a line on where it was measured (as its first row
    says)."""
    with path.open(newline="", encoding="utf-8") as file:
        first = next(csv.DictReader(file))
    return (
        f"{outcome_table(read_csv(path, Outcome))}\n"
        f"Base model {first['model']}; {first['prompts']} prompts with {first['samples']} samples "
        f"of {first['tokens']} tokens, {first['heldout']} prompts held out; mean ± standard "
        f"deviation between seeds; {first['device_name']}; commit {first['commit']}, "
        f"{first['date'][:10]}.\n"
    )


_PENALTY = "online RRHF with penalty"
CLAIMS: list[tuple[str, str, str, Callable[[float, float], bool], float, str]] = [
    ("RRHF at least triples the base model's reward", "reward", "RRHF", ge, 3, BASE),
    ("RRHF beats SFT on the best", "reward", "RRHF", gt, 1, "SFT on the best"),
    ("without its SFT term the perplexity is at least ten times as high", "perplexity",
     "RRHF without SFT", ge, 10, "RRHF"),
    ("online RRHF with the penalty reaches offline RRHF's reward", "reward",
     _PENALTY, ge, 1, "offline RRHF"),
    ("at no higher perplexity", "perplexity", _PENALTY, le, 1, "offline RRHF"),
    ("without the penalty it drifts further from the base model", "perplexity",
     "online RRHF", gt, 1, _PENALTY),
]  # fmt: skip
"""The results that a comparison is meant to show: a method's mean figure, compared with so many
times that of another."""


def claims(rows: Sequence[Outcome]) -> list[tuple[str, bool]]:
    """Every claim, and whether these rows bear it out; those without their methods are left out."""
    found = by_method(rows)

    def mean(method: str, name: str) -> float:
        return statistics.fmean(getattr(row, name) for row in found[method])

    return [
        (claim, compare(mean(method, name), times * mean(other, name)))
        for claim, name, method, compare, times, other in CLAIMS
        if method in found and other in found
    ]


def plot(rows: Sequence[Outcome], path: Path) -> None:
    """Reward over perplexity, one point per seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (method, found) in enumerate(by_method(rows).items()):
        points = [row.perplexity for row in found], [row.reward for row in found]
        marker = "os^"[number // 10 % 3]  # there are ten colours
        axes.scatter(*points, label=method, marker=marker)
    axes.set_xscale("log")
    axes.set_xlabel("perplexity of fresh samples under the base model (log scale)")
    axes.set_ylabel("mean reward of fresh samples")
    axes.legend(fontsize="small")
    axes.set_title("Held-out prompts, one point per seed")
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    for size in SIZES:
        parser.add_argument(f"--{size.name}", type=type(size.default), default=size.default)
    parser.add_argument("--online", action="store_true", help="candidates drawn during training")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="default: all of these")
    parser.add_argument("--model", help="base model (default: the story model)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--output", type=Path, default=Path("bench/results"))
    parser.add_argument("--work", type=Path, help="folder of the runs (default: in runs/)")
    options = parser.parse_args(argv)
    name = "compare_online" if options.online else "compare"
    methods = options.methods or (ONLINE if options.online else OFFLINE)
    work = options.work or Path("runs") / name
    for folder in (work, options.output):
        folder.mkdir(parents=True, exist_ok=True)
    sizes = {size.name: getattr(options, size.name) for size in SIZES}
    plan = Plan(options.model or str(story_model(work / "story-model")), work, **sizes)
    rows = run_all(plan, options.seeds, [BASE, *methods], options.jobs)
    record(rows, options.output / f"{name}.csv", {"model": Path(plan.model).name, **sizes})
    for method in methods:
        curves = plan.output_dir(0, method) / "online.png"
        if curves.is_file():
            shutil.copyfile(curves, options.output / f"{method.replace(' ', '_')}.png")
    return 0


def record(rows: Sequence[Outcome], path: Path, about: dict[str, Any]) -> None:
    """CSV, table and plot; the table and the claims also on the terminal."""
    import torch

    from fastrank.benchmarks.provenance import provenance

    torch.set_num_threads(1)  # as in each of the processes
    write_csv(rows, path, {**provenance(torch.device("cpu")), **about})
    table = comparison_table(path)
    path.with_suffix(".md").write_text(table, encoding="utf-8")
    plot(rows, path.with_suffix(".png"))
    print(table)
    for claim, holds in claims(rows):
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}")


if __name__ == "__main__":
    sys.exit(main())
