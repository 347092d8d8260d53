"""Rewards for the responses of a record file: by a Python function, or by a model.

Every record's rewards go into a journal as they are made, so that neither a kill nor a reward that
fails in the middle loses what was paid for. After a failure the journal is kept: the message names
the record, the output is not written, and the same command goes on at that record.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from statistics import fmean
from typing import Any

from fastrank import options as shared
from fastrank.console import Bar
from fastrank.data.fields import LARGEST_REWARD
from fastrank.data.user_functions import RewardFunction, is_function
from fastrank.data.write import atomic_path, check_output
from fastrank.errors import InputError
from fastrank.options.declare import change, options
from fastrank.workflow.items import (
    PromptItem,
    Scores,
    as_line,
    check_distinct,
    file_identity,
    read_items,
    template_identity,
)
from fastrank.workflow.journal import Journal, journal_path

#: Rewards of the responses of every item; None for a response that cannot be scored.
Scorer = Callable[[Sequence[PromptItem]], list[Scores]]


@options
class RewardOptions(
    shared.DataOptions,
    shared.RewardSourceOptions,
    shared.BatchOptions,
    shared.TemplateOptions,
    shared.ResumableOptions,
):
    """Score every response of a record file by a Python function or a model. A run that was
    stopped goes on where it was when the same command is given again."""

    data: str = change("Records with responses, as fastrank sample writes them.", required=True)
    output: str = change("JSONL file to write: the records with scores.")
    reward: str = change(required=True)
    batch_size: int = change("Responses at once in a sequence classifier.", default=32)


def reward_file(options: RewardOptions) -> dict[str, Any]:
    """Score the file's responses, write the output, and return what was done as JSON types.

    Raises:
        InputError: something the user gave cannot be used, or the reward failed on a record; the
            output has not been written.
    """
    from fastrank.modeling.pretrained import model_identity

    target = check_output(options.output, "--output")
    check_distinct(options.data, "--data", options.output)
    if not journal_path(target).exists():  # of this output's own run
        check_output(target, "--output", replace=options.overwrite)
    function = is_function(options.reward)
    identity = file_identity if function else model_identity
    reward = options.reward.rpartition(":")[0] if function else options.reward
    next(
        read_items(options.data, format=options.format, columns=options.columns)
    )  # before a model is loaded
    scorer, kind = load_reward(
        options.reward,
        options.reward_kind,
        options,
        batch_size=options.batch_size,
        template=options,
    )
    plan = {
        "data file": [file_identity(options.data), options.format, options.columns],
        "reward": [
            options.reward,
            identity(reward),
            kind,
            template_identity(options),
            options.dtype,
        ],
    }
    began = time.perf_counter()
    with ExitStack() as stack:
        journal = stack.enter_context(
            Journal(
                target,
                plan,
                discard=options.partial == "discard",
                lenient=("reward",) if options.partial == "keep" else (),
            )
        )
        resumed = journal.num_resumed
        bar = Bar(desc="rewarding", unit="records", initial=resumed)
        try:
            with bar:
                _score_missing(options, scorer, kind, journal, bar)
        except InputError as error:
            if journal.finished:
                done = f"the rewards of {len(journal.finished)} records are kept"
                raise InputError(f"{error}; {done} in {journal.path.name}") from error
            raise
        path = stack.enter_context(atomic_path(target))
        rows: list[Scores] = []
        with path.open("w", encoding="utf-8") as file:
            for number, item in enumerate(
                read_items(options.data, format=options.format, columns=options.columns)
            ):
                rows.append(journal.finished[str(number)])
                file.write(as_line(replace(item, scores=rows[-1]).as_row()))
    return {
        "output": options.output,
        "reward": options.reward,
        "kind": kind,
        **reward_counts(rows),
        "read_as": read_as(scorer),
        "records_resumed": resumed,
        "seconds": time.perf_counter() - began,
    }


def load_reward(
    reward: str,
    kind: str,
    loading: shared.LoadOptions,
    *,
    batch_size: int,
    template: shared.TemplateOptions | None = None,
) -> tuple[Scorer, str]:
    """Load a reward; returns its scorer and its kind: "function", "classifier" or "logprob".

    Args:
        reward: ``FILE.py:function``, a model folder or a Hub name.
        kind: of a model: "classifier", "logprob", or "auto" by its architecture.
        loading: device and type of a model's weights.
        batch_size: responses at once in a classifier.
        template: the chat template of a model, and whether a text prompt is a user message; the
            model's own and no, by default.

    Raises:
        InputError: it is not there, or not of its kind; a template for a function.
    """
    template = template or shared.TemplateOptions()
    if is_function(reward):
        if template.chat_template or template.chat_template_kwargs:
            raise InputError("--chat_template is of reward models, got a function")
        return _function_scorer(RewardFunction(reward)), "function"
    from fastrank.workflow.reward_model import ClassifierReward, LogprobReward, reward_kind

    if kind == "auto":
        kind = reward_kind(reward, loading)
    model = ClassifierReward if kind == "classifier" else LogprobReward
    return model(reward, loading, batch_size=batch_size, template=template), kind


def read_as(scorer: Scorer) -> dict[str, int]:
    """What is to be said of the texts that a reward model was given, with counts of records: what
    was invented (``User: …``) or changed on the way. Nothing for a function, which gets the prompt
    as it is."""
    report = getattr(scorer, "report", None)
    return {} if report is None else {note: len(lines) for note, lines in report.notes.items()}


def check_reward(reward: str, kind: str, loading: shared.LoadOptions) -> None:
    """Raise `InputError` for a reward that is not there, without loading a model's weights."""
    if is_function(reward):
        RewardFunction(reward)
        return
    from fastrank.modeling.pretrained import check_model_path
    from fastrank.workflow.reward_model import reward_kind

    check_model_path(reward, needed="tokenizer_config.json")
    if kind == "auto":
        reward_kind(reward, loading)


_TEXTS_ALONE = (
    "a reward function is given texts alone: leave the record out, give the text, or have a model "
    "reward it (--reward MODEL)"
)


def _function_scorer(function: RewardFunction) -> Scorer:
    def score(items: Sequence[PromptItem]) -> list[Scores]:
        return [
            [
                function(item.prompt, response, f"{item.place}: response {number}")
                for number, response in enumerate(item.texts(_TEXTS_ALONE), start=1)
            ]
            for item in items
        ]

    return score


def _score_missing(
    options: RewardOptions, scorer: Scorer, kind: str, journal: Journal, bar: Any
) -> None:
    """Score the records that the journal does not have, a function's one by one."""
    size = 1 if kind == "function" else options.batch_size
    items = enumerate(read_items(options.data, format=options.format, columns=options.columns))
    missing = ((n, item) for n, item in items if str(n) not in journal.finished)
    while chunk := list(islice(missing, size)):
        found = scorer([item for _, item in chunk])
        for (number, item), scores in zip(chunk, found, strict=True):
            check_finite(item, scores, options.reward)
            journal.append(str(number), scores)
        bar.update(len(chunk))


def check_finite(item: PromptItem, scores: Sequence[float | None], name: str) -> None:
    """Raise `InputError`, naming record and response, for a reward that is NaN, infinite or too
    large for a command to read it again."""
    for number, value in enumerate(scores, start=1):
        if value is not None and not abs(value) <= LARGEST_REWARD:
            raise InputError(
                f"{item.place}: response {number}: {name} gave {value}, expected a finite number "
                f"within ±{LARGEST_REWARD:g}"
            )


def reward_counts(rows: Sequence[Scores]) -> dict[str, Any]:
    """Counts and means over the rewards of every record; means are None where nothing was scored.

    >>> reward_counts([[1.0, 3.0], [2.0, None]])["mean_of_best"]
    2.5
    """
    known = [[score for score in row if score is not None] for row in rows]
    scored = [row for row in known if row]
    every = [score for row in scored for score in row]
    responses = sum(map(len, rows))
    return {
        "records": len(rows),
        "responses": responses,
        "unscored": responses - len(every),
        "records_with_an_order": sum(min(row) < max(row) for row in scored),
        "mean": fmean(every) if every else None,
        "mean_of_best": fmean(map(max, scored)) if every else None,
        "mean_of_worst": fmean(map(min, scored)) if every else None,
        "range": [min(every), max(every)] if every else None,
    }


def reward_text(result: dict[str, Any]) -> str:
    """The result for a person."""
    lines = [
        f"{result['output']}: {result['responses']} responses of {result['records']} records by "
        f"{result['reward']} ({result['kind']}) in {result['seconds']:.1f} s"
    ]
    if result["records_resumed"]:
        lines.append(f"  resumed     {result['records_resumed']} records were done before")
    if result["mean"] is not None:
        low, high = result["range"]
        lines.append(
            f"  rewards     mean {result['mean']:.4g}, from {low:.4g} to {high:.4g}; best of a "
            f"record {result['mean_of_best']:.4g}, worst {result['mean_of_worst']:.4g} on average"
        )
    lines.append(
        f"  order       {result['records_with_an_order']} of {result['records']} records have "
        "responses with different rewards"
    )
    lines += [f"  read as     {count} records: {note}" for note, count in result["read_as"].items()]
    if result["unscored"]:
        lines.append(f"  no reward   {result['unscored']} responses that the model cannot be shown")
    return "\n".join(lines)
