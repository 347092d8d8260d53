"""A whole training run: checks, data, model, training, evaluation before and after, results.

Everything that can be wrong is looked at before the output folder is made.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from fastrank.data.columns import reward_gap
from fastrank.data.group import Group, example_text
from fastrank.data.load import load_groups
from fastrank.data.locks import locked_folder
from fastrank.data.report import Report
from fastrank.data.tokenize import tokenize_record
from fastrank.errors import InputError
from fastrank.loss import Loss
from fastrank.losses import PRO
from fastrank.modeling.context import context_length
from fastrank.modeling.pretrained import load_model, load_tokenizer, template_values
from fastrank.options import ReadOptions
from fastrank.options.declare import values_of
from fastrank.training.adapters import export_merged, lora_config, quantization, trainable
from fastrank.training.callbacks import METRICS_FILE, MetricsFile, read_metrics
from fastrank.training.checkpoint import find_checkpoints, resolve_resume, wants_resume
from fastrank.training.config import RankConfig
from fastrank.training.early_checks import check_best_metric, uses_evaluation
from fastrank.training.engine import all_processes
from fastrank.training.held_out import keep_scores, spread_of_rewards
from fastrank.training.inputs import length_limits
from fastrank.training.model_card import renew_card
from fastrank.training.plan import changed_names, check_resumed, option_plan
from fastrank.training.references import attach_references, check_reference
from fastrank.training.run_options import TrainOptions
from fastrank.training.run_report import plot_metrics, summary_table
from fastrank.training.splits import choose_groups, shared_prompts, split_by_prompt
from fastrank.training.together import ending_together
from fastrank.training.trainer import RankTrainer
from fastrank.visual.pages import REPORT, SPLIT_TITLES, write_run_report
from fastrank.visual.shown_groups import FILE

HELD_OUT, TRAINING = "eval", "train_split"  # prefixes of the log keys
#: Rewards of PRO are said to be far apart from here on: a score's difference of 1 is then e^10.
LARGE_GAP = 10.0


@dataclass
class Job:
    """Model and data of a run."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: Sequence[Group]
    heldout: Sequence[Group]
    reports: list[Report] = field(default_factory=list)
    source: str = ""
    name: str = ""  # of the model


@ending_together()
def train(
    options: TrainOptions,
    config: RankConfig,
    *,
    job: Job | None = None,
    make_trainer: Callable[..., RankTrainer] = RankTrainer,
) -> dict[str, Any]:
    """Train; returns the result as a dictionary that JSON can hold.

    Args:
        options, config: of the run.
        job: model and data, if not those that ``options`` name. Without a training set
            ``make_trainer`` brings its own, which is not evaluated.
        make_trainer: called as `RankTrainer` is.

    Raises:
        InputError: something the user gave cannot be used; nothing has been written.
        TrainingStopped: training cannot go on.
    """
    with output_folder(config) as output_dir:
        return _train(output_dir, options, config, job, make_trainer)


def _train(
    output_dir: Path,
    options: TrainOptions,
    config: RankConfig,
    job: Job | None,
    make_trainer: Callable[..., RankTrainer],
) -> dict[str, Any]:
    """`train`, in a folder that no other run writes."""
    _check_earlier_run(output_dir, config, options.overwrite_output_dir)
    _check_resume(config, output_dir)
    check_best_metric(config)
    if job is None and not options.built_in and not options.eval_data and not options.eval_fraction:
        deciding = uses_evaluation(config)
        if deciding is not None:
            raise InputError(f"{deciding} needs evaluations, got eval_fraction=0 and no eval_data")
    adapter = lora_config(options)
    if job is None:
        job = _load(options, config)
    say: Any = print if config.process_index == 0 else lambda line: None
    for report in job.reports:
        say(report.as_text())
    splits: dict[str, Sequence[Group]] = {}
    if len(job.train):
        splits = {TRAINING: choose_groups(job.train, options.eval_groups, seed=config.seed)}
    if len(job.heldout):
        splits = {HELD_OUT: job.heldout, **splits}
    before = StartEvaluation(splits, job.tokenizer)
    trainer = make_trainer(
        job.model,
        config,
        train_dataset=job.train,
        eval_dataset=job.heldout if len(job.heldout) else None,
        processing_class=job.tokenizer,
        callbacks=[MetricsFile(output_dir), before],
        peft_config=adapter,
    )
    before.trainer = trainer
    trainer.reports = job.reports
    trained: Any = trainer.train_dataset
    for line in describe(job, trainer, options, splits):
        say(line)
    resume = config.resume_from_checkpoint if wants_resume(config.resume_from_checkpoint) else None
    if options.overwrite_output_dir and resume is None and config.should_save:
        _remove_earlier_run(output_dir)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume)
    seconds = time.perf_counter() - started
    trainer.save_model()  # before the evaluation, which may be interrupted
    step = trainer.model_step
    after = {name: _evaluated_at(step, trainer, groups, name) for name, groups in splits.items()}
    result = {
        "output_dir": str(output_dir),
        "loss": config.loss,
        "steps": trainer.state.global_step,
        "train_prompts": len(trained),
        "heldout_prompts": len(job.heldout),
        "seconds": round(seconds, 2),
    }
    if config.should_save:
        about = {
            "run": f"{config.loss} on {job.source}",
            "model": job.name or type(trainer.lm).__name__,
            "loss": str(trainer.loss),
            "steps": f"{result['steps']} in {seconds:.1f} s",
            "prompts": f"{len(trained)} to train on, {len(job.heldout)} held out",
        }
        result |= _finish(output_dir, job, splits, after, trainer, step, about)
        if options.merge_adapter:
            trust = options.trust_remote_code
            merged = export_merged(output_dir, config, job.tokenizer, trust_remote_code=trust)
            result["merged"] = str(merged)
        table = result.pop("table")
        if splits:
            say(f"\n{table}")
        say(
            f"{trainer.state.global_step} steps in {seconds:.1f} s; "
            f"model{f' of step {step}, the best,' if step < trainer.state.global_step else ''} "
            f"in {output_dir}, report in {result['report']}"
            + (f", merged model in {result['merged']}" if options.merge_adapter else "")
        )
    return result


def _load(options: TrainOptions, config: RankConfig) -> Job:
    """The built-in task or the user's files, with reference scores where the loss wants them."""
    check_reference(options, config)
    job = built_in_job(config) if options.built_in else load_job(options, config)
    job.train, job.heldout = attach_references(
        (job.train, job.heldout), options, config, job.model, job.tokenizer
    )
    return job


@contextmanager
def output_folder(config: RankConfig) -> Iterator[Path]:
    """The folder of a run, which no other run writes meanwhile.

    Raises:
        InputError: it cannot be written, or another run has it, which is named.
    """
    output_dir = Path(config.output_dir or "")
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"output_dir {output_dir} must be a folder, got a file")
    parent = output_dir.absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(
            f"output_dir {output_dir} cannot be written: no right to write in {parent}"
        )
    lock = locked_folder(output_dir, "output_dir") if config.should_save else nullcontext()
    with lock:
        yield output_dir


def _check_earlier_run(output_dir: Path, config: RankConfig, overwrite: bool) -> None:
    """Refuse a folder that holds another run's checkpoints."""
    resuming = wants_resume(config.resume_from_checkpoint)
    if find_checkpoints(output_dir) and not resuming and not overwrite:
        raise InputError(
            f"output_dir {output_dir} holds the checkpoints of an earlier run: pass "
            "--resume_from_checkpoint true to go on, --overwrite_output_dir to begin anew, "
            "or another --output_dir"
        )


def _check_resume(config: RankConfig, output_dir: Path) -> None:
    """Raise `InputError` for a checkpoint that is not there or that other options wrote, before
    data and model are loaded to compare the rest."""
    found = resolve_resume(
        config.resume_from_checkpoint, output_dir, checksums=False, gather=all_processes().gather
    )
    if found is not None:
        check_resumed(found, option_plan(config), changed_names(config.resume_changed))
    elif config.resume_changed and not wants_resume(config.resume_from_checkpoint):
        raise InputError("--resume_changed needs --resume_from_checkpoint, got none")


def _remove_earlier_run(output_dir: Path) -> None:
    for path in find_checkpoints(output_dir):
        shutil.rmtree(path)
    for name in (METRICS_FILE, FILE, REPORT):
        (output_dir / name).unlink(missing_ok=True)


def built_in_job(config: RankConfig) -> Job:
    """The task that needs no file, on one CPU thread whatever the environment says: its tensors are
    too small for a second one, and on a busy machine two that wait for each other are ten times
    slower than one."""
    import torch

    from fastrank.tasks.menu import menu_task

    torch.set_num_threads(1)
    task = menu_task(seed=config.seed)
    options = length_limits(config, task.model)
    report = Report(name="built-in")
    groups = []
    for records in (task.train, task.heldout):
        found = (tokenize_record(record, task.tokenizer, options, report) for record in records)
        groups.append([group for group in found if group is not None])
    return Job(task.model, task.tokenizer, groups[0], groups[1], source="built-in task: menu")


def load_job(options: TrainOptions, config: RankConfig) -> Job:
    """The user's model and records, a share of the prompts held out unless others are given."""
    assert options.model is not None and options.data is not None
    tokenizer = load_tokenizer(
        options.model,
        trust_remote_code=options.trust_remote_code,
        **template_values(options),
    )
    model = load_model(
        options.model,
        config.weights_dtype,
        trust_remote_code=options.trust_remote_code,
        **_placement(options, config),
        **quantization(options, config),
    )
    read: dict[str, Any] = {
        "options": replace(
            length_limits(config, model), as_chat=options.as_chat, same_tokens=options.same_tokens
        ),
        **values_of(options, ReadOptions),
        "cache": False if options.no_cache else None,
        "cache_dir": options.cache_dir,
        "num_proc": options.dataset_num_proc,
    }
    groups, report = load_groups(options.data, tokenizer, **read)
    if options.eval_data is not None:
        heldout, eval_report = load_groups(options.eval_data, tokenizer, **read)
        return Job(
            model, tokenizer, groups, heldout, [report, eval_report], options.data, options.model
        )
    train_groups, heldout = split_by_prompt(groups, options.eval_fraction, seed=config.seed)
    return Job(model, tokenizer, train_groups, heldout, [report], options.data, options.model)


def _placement(options: TrainOptions, config: RankConfig) -> dict[str, Any]:
    """How the model is sharded when it is loaded."""
    if options.tp_size == 1:
        return {}
    from transformers.distributed import DistributedConfig

    copies, rest = divmod(config.world_size, options.tp_size)
    if rest:
        raise InputError(
            f"tp_size must divide the {config.world_size} process(es), got {options.tp_size}"
        )
    return {"distributed_config": DistributedConfig(tp_size=options.tp_size, fsdp_size=copies)}


def describe(
    job: Job, trainer: RankTrainer, options: TrainOptions, splits: dict[str, Sequence[Group]]
) -> list[str]:
    """Describe the run to come, one line per choice."""
    config = trainer.args
    parameters = sum(p.numel() for p in job.model.parameters())
    groups: Any = trainer.train_dataset
    overlap = shared_prompts(groups, job.heldout)
    held = f"{len(job.heldout)} held out" + (
        f" ({overlap} of them also occur in the training data)" if overlap else ""
    )
    evaluated = len(splits.get(TRAINING, groups))
    if evaluated < len(groups):
        held += f"; training split evaluated on {evaluated} of them"
    dropout = trainer.disabled_dropout
    off = f"{len(dropout)} set to 0: {', '.join(dropout)}" if dropout else "none in the model"
    colour = sys.stdout.isatty()
    steps = -(-len(groups) // trainer.groups_per_step)
    return [
        f"data: {job.source}: {len(groups)} prompts to train on, {held}",
        f"model: {type(job.model).__name__}, {parameters:,} parameters, "
        f"context {context_length(job.model.config)}",
        *([f"adapter: {trainable(trainer.lm)}"] if options.use_peft else []),
        f"loss: {trainer.loss}",
        *warn_of_gaps(trainer.loss, groups),
        f"precision: {config.dtype_reason}",
        f"dropout: {off}" if config.disable_dropout else "dropout: as the model has it",
        *([example_text(job.train[0], job.tokenizer, colour=colour)] if len(job.train) else []),
        f"steps: {steps} per epoch of {trainer.groups_per_step} prompts on {config.world_size} "
        f"process(es), packs of at most {trainer.max_tokens} tokens"
        + (", back-propagated in two phases" if config.two_phase else ""),
    ]


def warn_of_gaps(loss: Loss, groups: Sequence[Group]) -> list[str]:
    """A line where PRO's temperatures, one over a gap of rewards, come near 0."""
    gap = reward_gap(groups) if isinstance(loss, PRO) and loss.stage_scale != "one" else 0.0
    if gap <= LARGE_GAP:
        return []
    return [
        f"rewards: up to {gap:.4g} apart within a prompt; PRO multiplies scores by these gaps, and "
        f"above {LARGE_GAP:g} one candidate takes all: see --normalize_rewards group"
    ]


class StartEvaluation(TrainerCallback):
    """Evaluate every split before the first step; a resumed run has done so already."""

    def __init__(self, splits: dict[str, Sequence[Group]], tokenizer: Any) -> None:
        self.splits = splits
        self.tokenizer = tokenizer
        self.trainer: RankTrainer | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0 and self.trainer is not None:
            for name, groups in self.splits.items():
                self.trainer.evaluate(groups, metric_key_prefix=name)  # type: ignore[arg-type]
                if name == HELD_OUT and args.should_save:
                    scores = self.trainer.scores_at[name][state.global_step]
                    folder = Path(args.output_dir or "")
                    keep_scores(folder, groups, self.tokenizer, scores, "before")


def _finish(
    output_dir: Path,
    job: Job,
    splits: dict[str, Sequence[Group]],
    after: dict[str, dict[str, float]],
    trainer: RankTrainer,
    step: int,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Curves, table, ``summary.json`` and ``report.html`` in the output folder, of the model after
    a step."""
    config = trainer.args
    rows = read_metrics(output_dir / METRICS_FILE)
    plot = plot_metrics(rows, output_dir / "training.png", f"{config.loss} on {job.source}")
    first = {name: _at_start(rows, name) for name in splits}
    last = {name: _bare(values, name) for name, values in after.items()}
    result: dict[str, Any] = {
        "plot": str(plot),
        "model_step": step,
        "before": first,
        "after": last,
        "data": [report.as_dict() for report in job.reports],
    }
    spread = spread_of_rewards({"training": job.train, "held out": job.heldout})
    kept = {**result, "about": about, "rewards": spread}
    text = json.dumps(kept, indent=1) + "\n"
    (output_dir / "summary.json").write_text(text, encoding="utf-8")
    if HELD_OUT in splits:
        scores = trainer.scores_at.get(HELD_OUT, {}).get(step)
        keep_scores(output_dir, splits[HELD_OUT], job.tokenizer, scores, "after")
    result["report"] = str(write_run_report(output_dir, rows))
    table = summary_table({SPLIT_TITLES[name]: (first[name], last[name]) for name in splits})
    # Again: the model was saved before its last evaluation.
    renew_card(output_dir, trainer.model_card(table if splits else None))
    return result | {"table": table}


def _evaluated_at(
    step: int, trainer: RankTrainer, groups: Sequence[Group], prefix: str
) -> dict[str, float]:
    """The evaluation of the weights of a step, which the loop may have made."""
    for row in reversed(trainer.state.log_history):
        if row["step"] == step and f"{prefix}_rank_loss" in row:
            return row
    return trainer.evaluate(groups, metric_key_prefix=prefix)  # type: ignore[arg-type]


def _at_start(rows: Sequence[dict[str, Any]], prefix: str) -> dict[str, float] | None:
    found = [row for row in rows if row.get("step") == 0 and f"{prefix}_loss" in row]
    return _bare(found[0], prefix) if found else None


def _bare(values: dict[str, Any], prefix: str) -> dict[str, float]:
    """The values of one split, without its prefix and without timings."""
    own = {k.removeprefix(f"{prefix}_"): v for k, v in values.items() if k.startswith(f"{prefix}_")}
    timings = ("runtime", "per_second", "compilation_time", "model_preparation_time")
    return {name: value for name, value in own.items() if not name.endswith(timings)}
