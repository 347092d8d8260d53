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
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench.compare_report import Row, claims, markdown_table, plot, write_csv
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

    _set_threads(plan)
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


def run_method(plan: Plan, seed: int, method: str) -> Row:
    """Train one method from the base model and measure it."""
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

    _set_threads(plan)
    folder = plan.folder(seed)
    loading = ModelOptions(device="cpu")
    base, tokenizer = load_policy(plan.model, loading)
    # A response that was cut at the limit has no end; this keeps it from being taught one.
    limits = TokenizeOptions(max_response_length=plan.tokens)
    heldout, _ = load_groups(folder / "heldout.jsonl", tokenizer, options=limits)
    model, seconds = base, 0.0
    if method != BASE:
        groups, _ = load_groups(folder / "train.jsonl", tokenizer, options=limits)
        model, _ = load_policy(plan.model, loading)
        began = time.perf_counter()
        _train(plan, seed, method, model, groups)
        seconds = time.perf_counter() - began
    drawing = DecodingOptions(
        num_responses=plan.samples, max_new_tokens=plan.tokens, batch_size=64, seed=1000 + seed
    )
    items = list(read_items(folder / "heldout-prompts.jsonl"))
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


def _train(plan: Plan, seed: int, method: str, model: Any, groups: Sequence[Any]) -> None:
    from fastrank import Group, RankConfig, RankTrainer, loss_from_name
    from fastrank.modeling.reference import with_reference_scores

    name, options, candidates = METHODS[method]
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


def _set_threads(plan: Plan) -> None:
    import torch

    torch.set_num_threads(plan.threads)


def compare(plan: Plan, seeds: int, methods: Sequence[str], jobs: int) -> list[Row]:
    """Every method with every seed; ``jobs`` processes at once (1: in this process)."""
    from tqdm import tqdm

    names = [BASE, *methods]
    tasks = [(plan, seed, method) for seed in range(seeds) for method in names]
    rows: list[Row] = []
    with tqdm(total=len(tasks) + seeds, desc="comparing", unit=" runs", disable=None) as bar:
        for _ in _each(prepare, [(plan, seed) for seed in range(seeds)], jobs):
            bar.update()
        for row in _each(run_method, tasks, jobs):
            rows.append(row)
            bar.update()
            bar.set_postfix_str(f"{row.method} {row.reward:.2f}")
    order = {name: i for i, name in enumerate(names)}
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


def main(argv: Sequence[str] | None = None) -> int:
    import torch

    from fastrank.benchmarks.environment import describe

    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    defaults = {field.name: field.default for field in dataclasses.fields(Plan)}
    for name in ("prompts", "heldout", "samples", "tokens", "batch_size"):
        parser.add_argument(f"--{name}", type=int, default=defaults[name])
    for name in ("epochs", "learning_rate"):
        parser.add_argument(f"--{name}", type=float, default=defaults[name])
    parser.add_argument("--model", help="base model (default: the story model)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--output", type=Path, default=Path("bench/results"))
    parser.add_argument("--work", type=Path, default=Path("runs/compare"))
    options = parser.parse_args(argv)

    options.work.mkdir(parents=True, exist_ok=True)
    options.output.mkdir(parents=True, exist_ok=True)
    model = options.model or str(story_model(options.work / "story-model"))
    names = ("prompts", "heldout", "samples", "tokens", "epochs", "learning_rate", "batch_size")
    sizes = {name: getattr(options, name) for name in names}
    plan = Plan(model=model, work=str(options.work), **sizes)
    began = time.perf_counter()
    rows = compare(plan, options.seeds, options.methods, options.jobs)
    torch.set_num_threads(plan.threads)  # of each of the processes, which is what is described
    about = describe(torch.device("cpu"))
    write_csv(rows, options.output / "compare.csv", {**about, "model": Path(model).name, **sizes})
    table = markdown_table(rows)
    (options.output / "compare.md").write_text(table, encoding="utf-8")
    plot(rows, options.output / "compare.png")
    print(table)
    for claim, holds in claims(rows):
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}")
    print(f"{time.perf_counter() - began:.0f} s; {options.output}/compare.csv, .md, .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
