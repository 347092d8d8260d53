"""Online against offline RRHF on the task of `bench.compare`, with and without a penalty.

Offline methods train on the base model's candidates; online ones see as many prompts in as many
steps, but draw the candidates from the model in training, every 8 steps (10 rounds in 80 steps).
What is measured is the same. Online training takes a lower learning rate and a heavier SFT term:
nothing in its candidates holds it near the base model. The offline method is therefore shown at
both settings.

Run from the repository's root: ``python -m bench.compare_online``. The curves of reward, perplexity
and live fraction over the steps of each online run are in ``runs/compare_online/``; those of the
first seed are copied to the output folder.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import compare
from bench.compare_report import Row, by_method, mean_of

GENTLE = {"learning_rate": 3e-4, "loss_kwargs": {"sft_weight": 3.0}}

#: name: options of training; an online method has a weight of its penalty.
METHODS: dict[str, dict[str, Any]] = {
    "offline RRHF": {},
    "offline RRHF, online settings": GENTLE,
    "online RRHF": {**GENTLE, "kl_weight": 0.0},
    "online RRHF with penalty": {**GENTLE, "kl_weight": 10.0},
}
EVERY = 8


def run_method(plan: compare.Plan, seed: int, method: str) -> Row:
    """Train one method from the base model and measure it."""
    options = METHODS.get(method, {})
    if method == compare.BASE or "kl_weight" not in options:
        gentle = dataclasses.replace(
            plan, learning_rate=options.get("learning_rate", plan.learning_rate)
        )
        name = method if method == compare.BASE else "RRHF"
        row = compare.run_method(gentle, seed, name, options.get("loss_kwargs"))
        return dataclasses.replace(row, method=method)
    compare.set_threads(plan)
    folder = plan.folder(seed) / method.replace(" ", "-")
    began = time.perf_counter()
    train_online(plan, seed, folder, options)
    seconds = time.perf_counter() - began
    return measure_folder(plan, seed, method, folder, seconds)


def train_online(plan: compare.Plan, seed: int, folder: Path, options: dict[str, Any]) -> None:
    """``fastrank train --online_every`` as a user would call it."""
    from fastrank.cli.main import main as fastrank

    arguments = {
        "model": plan.model,
        "online_every": EVERY,
        "online_prompts": plan.folder(seed) / "train-prompts.jsonl",
        "reward": compare.REWARD,
        "online_responses": plan.samples,
        "online_max_new_tokens": plan.tokens,
        "online_batch_size": 64,
        "kl_weight": options["kl_weight"],
        "loss": "rrhf",
        "loss_kwargs": json.dumps(options["loss_kwargs"]),
        "learning_rate": options["learning_rate"],
        "num_train_epochs": plan.epochs,
        "per_device_train_batch_size": plan.batch_size,
        "logging_steps": EVERY,
        "save_strategy": "no",
        "overwrite_output_dir": "true",
        "use_cpu": "true",
        "seed": seed,
        "output_dir": folder,
    }
    line = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    if fastrank(["train", *line, "--disable_tqdm", "true"]) != 0:
        raise RuntimeError(f"{folder}: online training failed")


def measure_folder(plan: compare.Plan, seed: int, method: str, folder: Path, seconds: float) -> Row:
    from fastrank.workflow.options import ModelOptions
    from fastrank.workflow.policy import load_policy

    model, _ = load_policy(folder, ModelOptions(device="cpu"))
    return compare.measure(plan, seed, method, model, seconds)


def claims(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """What the comparison is meant to show, and whether these rows do."""
    found = by_method(rows)
    reward = {method: mean_of(own, "reward") for method, own in found.items()}
    perplexity = {method: mean_of(own, "perplexity") for method, own in found.items()}
    offline, free, held = "offline RRHF", "online RRHF", "online RRHF with penalty"
    if not {offline, free, held} <= set(found):
        return []
    return [
        (
            "online RRHF with the penalty reaches offline RRHF's reward",
            reward[held] >= reward[offline],
        ),
        ("at no higher perplexity", perplexity[held] <= perplexity[offline]),
        (
            "without the penalty it drifts further from the base model",
            perplexity[free] > perplexity[held],
        ),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = compare.parser("compare_online", __doc__)
    arguments.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options = arguments.parse_args(argv)
    plan = compare.plan_of(options)
    methods = [compare.BASE, *options.methods]
    rows = compare.run_all(plan, options.seeds, methods, options.jobs, run_method)
    compare.finish("compare_online", "online", rows, plan, options, claims(rows))
    for method in options.methods:
        curves = plan.folder(0) / method.replace(" ", "-") / "online.png"
        if curves.is_file():
            target = options.output / f"{method.replace(' ', '_')}.png"
            shutil.copyfile(curves, target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
