"""``make compare``: what each loss makes of the same candidates, as in the papers' tables.

One base model, one reward (`bench/happy_reward.py`), one set of prompts. For each seed the base
model's samples are scored, and every method starts from the base model and sees the same
candidates. What is reported is measured on fresh samples for prompts that no method has seen: their
mean reward, their perplexity under the base model (how much of the language is left), and how well
the trained model's own scores order held-out candidates of the base model.

Run from the repository's root: ``python -m bench.compare``; ``--help`` lists the sizes. Every step
before training is the library's own command (`fastrank sample`, `fastrank reward`), called in
process.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench.compare_report import (
    Row,
    claims,
    fill,
    markdown_table,
    plot,
    provenance,
    write_csv,
)
from bench.story_task import openings, story_model, write_prompts

REWARD = f"{Path(__file__).resolve().parent / 'happy_reward.py'}:reward"

#: name: (loss, its options, what it is trained on: "best" response alone, or "all" candidates)
METHODS: dict[str, tuple[str, dict[str, Any], str]] = {
    "SFT on the best": ("rrhf", {}, "best"),
    "RRHF": ("rrhf", {}, "all"),
    "RRHF without SFT": ("rrhf", {"sft_weight": 0.0}, "all"),
    "PRO": ("pro", {}, "all"),
    "DPO, best and worst": ("dpo", {"pairs": "best_worst"}, "all"),
    "ListMLE": ("listmle", {}, "all"),
}
BASE = "base model"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of a comparison."""

    model: str
    work: str
    prompts: int = 320
    heldout: int = 80
    samples: int = 6
    tokens: int = 60
    epochs: float = 2.0
    learning_rate: float = 1e-3
    batch_size: int = 8
    threads: int = 1

    def folder(self, seed: int) -> Path:
        return Path(self.work) / f"seed{seed}"


def prepare(plan: Plan, seed: int) -> None:
    """Write the seed's ranked candidates, for training and held out: sample, then reward."""
    from fastrank.workflow.options import DecodingOptions, ModelOptions
    from fastrank.workflow.reward import RewardOptions, reward_file
    from fastrank.workflow.sample import SampleOptions, sample_file

    set_threads(plan)
    folder = plan.folder(seed)
    folder.mkdir(parents=True, exist_ok=True)
    found = openings(plan.prompts + plan.heldout)
    splits = {"train": found[: plan.prompts], "heldout": found[plan.prompts :]}
    drawing = DecodingOptions(
        num_responses=plan.samples, max_new_tokens=plan.tokens, batch_size=64, seed=seed
    )
    loading = ModelOptions(device="cpu")
    for name, prompts in splits.items():
        write_prompts(prompts, folder / f"{name}-prompts.jsonl")
        sampling = SampleOptions(
            model=[plan.model],
            prompts=str(folder / f"{name}-prompts.jsonl"),
            output=str(folder / f"{name}-samples.jsonl"),
            partial="discard",
        )
        sample_file(sampling, drawing, loading)
        rewarding = RewardOptions(
            data=sampling.output,
            output=str(folder / f"{name}.jsonl"),
            reward=REWARD,
            partial="discard",
        )
        reward_file(rewarding, loading)


def run_method(
    plan: Plan, seed: int, method: str, loss_kwargs: dict[str, Any] | None = None
) -> Row:
    """Train one method (with other options of its loss, if given) and measure it."""
    from fastrank.data.load import load_groups
    from fastrank.data.tokenize import TokenizeOptions
    from fastrank.workflow.options import ModelOptions
    from fastrank.workflow.policy import load_policy

    set_threads(plan)
    model, tokenizer = load_policy(plan.model, ModelOptions(device="cpu"))
    seconds = 0.0
    if method != BASE:
        # A response that was cut at the limit has no end; this keeps it from being taught one.
        limits = TokenizeOptions(max_response_length=plan.tokens)
        groups, _ = load_groups(plan.folder(seed) / "train.jsonl", tokenizer, options=limits)
        began = time.perf_counter()
        _train(plan, seed, method, model, groups, loss_kwargs)
        seconds = time.perf_counter() - began
    return measure(plan, seed, method, model, seconds)


def measure(plan: Plan, seed: int, method: str, model: Any, seconds: float) -> Row:
    """Fresh samples of a model for the held-out prompts: their reward, what the base model thinks
    of them; and how the model orders the base model's candidates."""
    from fastrank.data.load import load_groups
    from fastrank.data.tokenize import TokenizeOptions
    from fastrank.workflow.evaluation import (
        mean_reward,
        perplexity,
        ranking_accuracy,
        sample_items,
    )
    from fastrank.workflow.items import read_items
    from fastrank.workflow.options import DecodingOptions, ModelOptions
    from fastrank.workflow.policy import load_policy
    from fastrank.workflow.reward import load_reward

    loading = ModelOptions(device="cpu")
    base, tokenizer = load_policy(plan.model, loading)
    limits = TokenizeOptions(max_response_length=plan.tokens)
    heldout, _ = load_groups(plan.folder(seed) / "heldout.jsonl", tokenizer, options=limits)
    drawing = DecodingOptions(
        num_responses=plan.samples, max_new_tokens=plan.tokens, batch_size=64, seed=1000 + seed
    )
    items = list(read_items(plan.folder(seed) / "heldout-prompts.jsonl"))
    fresh = sample_items(model.eval(), tokenizer, items, drawing, source=method)
    scorer, _ = load_reward(REWARD, "auto", loading, batch_size=1)
    found = mean_reward(scorer(fresh.items))
    return Row(
        method=method,
        seed=seed,
        reward=found.mean,
        standard_error=found.standard_error,
        perplexity=perplexity(base, tokenizer, fresh),
        accuracy=ranking_accuracy(model, heldout)["pairwise_accuracy"],
        train_seconds=seconds,
    )


def _train(
    plan: Plan,
    seed: int,
    method: str,
    model: Any,
    groups: Sequence[Any],
    loss_kwargs: dict[str, Any] | None,
) -> None:
    from fastrank import Group, RankConfig, RankTrainer, loss_from_name
    from fastrank.modeling.reference_scores import with_reference_scores

    name, options, candidates = METHODS[method]
    options = options if loss_kwargs is None else loss_kwargs
    if candidates == "best":
        # One candidate leaves no pair to rank, and of RRHF its supervised term alone.
        best = [int(group.rewards.argmax()) for group in groups]
        groups = [
            Group(g.prompt_ids, (g.response_ids[i],), g.rewards[i : i + 1])
            for g, i in zip(groups, best, strict=True)
        ]
    loss = loss_from_name(name, **options)
    if loss.uses_reference:
        groups = with_reference_scores(groups, plan.model, normalize=loss.normalize)
    arguments = RankConfig(
        output_dir=str(plan.folder(seed) / "trainer"),
        loss=name,
        loss_kwargs=options,
        learning_rate=plan.learning_rate,
        num_train_epochs=plan.epochs,
        per_device_train_batch_size=plan.batch_size,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
    )
    RankTrainer(model, arguments, train_dataset=groups).train()


def set_threads(plan: Plan) -> None:
    """What each process computes with."""
    import torch

    torch.set_num_threads(plan.threads)


def run_all(
    plan: Plan, seeds: int, methods: Sequence[str], jobs: int, run: Callable[..., Row]
) -> list[Row]:
    """Every method with every seed; ``jobs`` processes at once (1: in this process)."""
    from tqdm import tqdm

    tasks = [(plan, seed, method) for seed in range(seeds) for method in methods]
    rows: list[Row] = []
    with tqdm(total=len(tasks) + seeds, desc="comparing", unit=" runs", disable=None) as bar:
        for _ in _each(prepare, [(plan, seed) for seed in range(seeds)], jobs):
            bar.update()
        for row in _each(run, tasks, jobs):
            rows.append(row)
            bar.update()
            bar.set_postfix_str(f"{row.method} {row.reward:.2f}")
    order = {name: i for i, name in enumerate(methods)}
    return sorted(rows, key=lambda row: (order[row.method], row.seed))


def _each(function: Any, tasks: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[Any]:
    """Results of the tasks, as they come."""
    if jobs == 1:
        for task in tasks:
            yield function(*task)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(function, *task) for task in tasks]):
            yield future.result()


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The options of a comparison."""
    found = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description)
    defaults = {field.name: field.default for field in dataclasses.fields(Plan)}
    for option in ("prompts", "heldout", "samples", "tokens", "batch_size"):
        found.add_argument(f"--{option}", type=int, default=defaults[option])
    for option in ("epochs", "learning_rate"):
        found.add_argument(f"--{option}", type=float, default=defaults[option])
    found.add_argument("--model", help="base model (default: the story model)")
    found.add_argument("--seeds", type=int, default=3)
    found.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    found.add_argument("--output", type=Path, default=Path("bench/results"))
    found.add_argument("--work", type=Path, default=Path("runs") / name)
    found.add_argument("--readme", type=Path, help="file whose marked table is to be renewed")
    return found


def plan_of(options: argparse.Namespace) -> Plan:
    """The plan that the options ask for; the base model is trained here if there is none."""
    options.work.mkdir(parents=True, exist_ok=True)
    options.output.mkdir(parents=True, exist_ok=True)
    model = options.model or str(story_model(options.work / "story-model"))
    names = ("prompts", "heldout", "samples", "tokens", "epochs", "learning_rate", "batch_size")
    return Plan(model, str(options.work), **{name: getattr(options, name) for name in names})


def finish(
    name: str,
    marker: str,
    rows: Sequence[Row],
    plan: Plan,
    options: argparse.Namespace,
    found: Sequence[tuple[str, bool]],
) -> None:
    """CSV, table and plot in the output folder; what was to be shown, on the terminal.

    ``marker`` is where the table stands in the README, see `bench.compare_report.fill`.
    """
    import torch

    from fastrank.benchmarks.environment import describe

    set_threads(plan)  # of each of the processes, which is what is described
    about = describe(torch.device("cpu"))
    sizes = {k: v for k, v in dataclasses.asdict(plan).items() if k not in ("model", "work")}
    path = options.output / f"{name}.csv"
    write_csv(rows, path, {**about, "model": Path(plan.model).name, **sizes})
    table = f"{markdown_table(rows)}\n{provenance(path)}\n"
    path.with_suffix(".md").write_text(table, encoding="utf-8")
    plot(rows, path.with_suffix(".png"))
    if options.readme is not None:
        text = options.readme.read_text(encoding="utf-8")
        options.readme.write_text(fill(text, marker, table), encoding="utf-8")
    print(table)
    for claim, holds in found:
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser("compare", __doc__)
    arguments.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options = arguments.parse_args(argv)
    plan = plan_of(options)
    rows = run_all(plan, options.seeds, [BASE, *options.methods], options.jobs, run_method)
    finish("compare", "comparison", rows, plan, options, claims(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
