"""Rewards for the responses of a record file: by a Python function, or by a model.

Every record's rewards go into a journal as they are made, so that neither a kill nor a reward that
fails in the middle loses what was paid for. After a failure the journal is kept: the message names
the record, the output is not written, and the same command goes on at that record.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

from fastrank.data.write import atomic_path, check_output
from fastrank.errors import InputError
from fastrank.workflow.items import Item, as_line, check_distinct, file_identity, read_items
from fastrank.workflow.journal import Journal
from fastrank.workflow.options import ModelOptions
from fastrank.workflow.reward_function import RewardFunction, is_function

#: Rewards of the responses of each of some items; None for a response that cannot be scored.
Scorer = Callable[[Sequence[Item]], list[list[float | None]]]


@dataclass
class RewardOptions:
    """Options of ``fastrank reward`` beyond how a model is loaded."""

    data: str = field(metadata={"help": "Records with responses, as fastrank sample writes them."})
    output: str = field(metadata={"help": "JSONL file to write: the records with scores."})
    reward: str = field(
        metadata={
            "help": "FILE.py:function, called as function(prompt, response) and returning a "
            "number; or a model folder or Hub name."
        }
    )
    reward_kind: Literal["auto", "classifier", "logprob"] = field(
        default="auto",
        metadata={
            "help": "What a model gives: the one label of a sequence classifier, or a causal "
            "model's own mean log-probability (auto: by its architecture)."
        },
    )
    format: str | None = field(
        default=None, metadata={"help": "Format of the records, if not to be recognised."}
    )
    batch_size: int = field(
        default=32, metadata={"help": "Responses at once in a sequence classifier."}
    )
    as_chat: bool = field(
        default=False,
        metadata={"help": "Treat a text prompt as one user message of the chat template."},
    )
    partial: Literal["resume", "keep", "discard"] = field(
        default="resume",
        metadata={
            "help": "What to do with the rewards of a run that was stopped: resume if nothing "
            "changed, keep them although the reward changed, or discard them."
        },
    )
    json: bool = field(default=False, metadata={"help": "Print one JSON object instead of text."})

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {self.batch_size}")


def reward_file(options: RewardOptions, loading: ModelOptions) -> dict[str, Any]:
    """Score the file's responses, write the output, and return what was done as JSON types.

    Raises:
        InputError: something the user gave cannot be used, or the reward failed on a record; the
            output has not been written.
    """
    from tqdm import tqdm

    from fastrank.modeling.pretrained import model_identity

    target = check_output(options.output, "--output")
    check_distinct(options.data, "--data", options.output)
    function = is_function(options.reward)
    identity = file_identity if function else model_identity
    reward = options.reward.rpartition(":")[0] if function else options.reward
    next(read_items(options.data, format=options.format))  # before a model is loaded
    scorer, kind = load_reward(
        options.reward,
        options.reward_kind,
        loading,
        batch_size=options.batch_size,
        as_chat=options.as_chat,
    )
    plan = {
        "data file": [file_identity(options.data), options.format],
        "reward": [options.reward, identity(reward), kind, options.as_chat, loading.dtype],
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
        bar = tqdm(desc="rewarding", unit=" records", initial=resumed, disable=None)
        try:
            with bar:
                _score_missing(options, scorer, kind, journal, bar)
        except InputError as error:
            if journal.finished:
                done = f"the rewards of {len(journal.finished)} records are kept"
                raise InputError(f"{error}; {done} in {journal.path.name}") from error
            raise
        path = stack.enter_context(atomic_path(target))
        counts = RewardCounts()
        with path.open("w", encoding="utf-8") as file:
            for number, item in enumerate(read_items(options.data, format=options.format)):
                scores = journal.finished[str(number)]
                counts.add(scores)
                file.write(as_line(replace(item, scores=scores).as_row()))
    journal.remove()
    return {
        "output": options.output,
        "reward": options.reward,
        "kind": kind,
        **counts.as_dict(),
        "records_resumed": resumed,
        "seconds": time.perf_counter() - began,
    }


def load_reward(
    reward: str,
    kind: str,
    loading: ModelOptions,
    *,
    batch_size: int,
    as_chat: bool = False,
) -> tuple[Scorer, str]:
    """What scores responses, and its kind: "function", "classifier" or "logprob".

    Args:
        reward: ``FILE.py:function``, a model folder or a Hub name.
        kind: of a model: "classifier", "logprob", or "auto" by its architecture.
        loading: device and type of a model's weights.
        batch_size: responses at once in a classifier.
        as_chat: a text prompt is one user message.

    Raises:
        InputError: it is not there, or not of its kind.
    """
    if is_function(reward):
        return _function_scorer(RewardFunction(reward)), "function"
    from fastrank.workflow.reward_model import ClassifierReward, LogprobReward, reward_kind

    if kind == "auto":
        kind = reward_kind(reward, loading)
    model = ClassifierReward if kind == "classifier" else LogprobReward
    return model(reward, loading, batch_size=batch_size, as_chat=as_chat), kind


def check_reward(reward: str, kind: str, loading: ModelOptions) -> None:
    """Raise `InputError` for a reward that is not there, without loading a model's weights."""
    if is_function(reward):
        RewardFunction(reward)
        return
    from fastrank.modeling.pretrained import check_model_path
    from fastrank.workflow.reward_model import reward_kind

    check_model_path(reward, needed="tokenizer_config.json")
    if kind == "auto":
        reward_kind(reward, loading)


def _function_scorer(function: RewardFunction) -> Scorer:
    def score(items: Sequence[Item]) -> list[list[float | None]]:
        return [
            [
                function(item.prompt, response, f"{item.place}: response {number}")
                for number, response in enumerate(item.responses, start=1)
            ]
            for item in items
        ]

    return score


def _score_missing(
    options: RewardOptions, scorer: Scorer, kind: str, journal: Journal, bar: Any
) -> None:
    """Score the records that the journal does not have, a function's one by one."""
    size = 1 if kind == "function" else options.batch_size
    items = enumerate(read_items(options.data, format=options.format))
    missing = ((n, item) for n, item in items if str(n) not in journal.finished)
    for chunk in _chunks(missing, size):
        found = scorer([item for _, item in chunk])
        for (number, item), scores in zip(chunk, found, strict=True):
            check_finite(item, scores, options.reward)
            journal.append(str(number), scores)
        bar.update(len(chunk))


def check_finite(item: Item, scores: Sequence[float | None], name: str) -> None:
    """Raise `InputError` for a reward that is NaN or infinite, naming record and response."""
    for number, value in enumerate(scores, start=1):
        if value is not None and not math.isfinite(value):
            raise InputError(
                f"{item.place}: response {number}: {name} gave {value}, expected a finite number"
            )


def _chunks(items: Iterator[tuple[int, Item]], size: int) -> Iterator[list[tuple[int, Item]]]:
    while chunk := list(islice(items, size)):
        yield chunk


@dataclass
class RewardCounts:
    """Sums over the rewards of a file."""

    records: int = 0
    responses: int = 0
    unscored: int = 0
    ordered: int = 0
    total: float = 0.0
    best: float = 0.0
    worst: float = 0.0
    nonempty: int = 0
    lowest: float = math.inf
    highest: float = -math.inf

    def add(self, scores: Sequence[float | None]) -> None:
        """Count one record's rewards."""
        known = [score for score in scores if score is not None]
        self.records += 1
        self.responses += len(scores)
        self.unscored += len(scores) - len(known)
        if not known:
            return
        low, high = min(known), max(known)
        self.nonempty += 1
        self.ordered += low < high
        self.total += sum(known)
        self.best += high
        self.worst += low
        self.lowest = min(self.lowest, low)
        self.highest = max(self.highest, high)

    def as_dict(self) -> dict[str, Any]:
        """Counts and means; means are None where nothing was scored."""
        scored = self.responses - self.unscored
        return {
            "records": self.records,
            "responses": self.responses,
            "unscored": self.unscored,
            "records_with_an_order": self.ordered,
            "mean": self.total / scored if scored else None,
            "mean_of_best": self.best / self.nonempty if self.nonempty else None,
            "mean_of_worst": self.worst / self.nonempty if self.nonempty else None,
            "range": [self.lowest, self.highest] if scored else None,
        }


def summary_text(result: dict[str, Any]) -> str:
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
    if result["unscored"]:
        lines.append(f"  no reward   {result['unscored']} responses that the model cannot be shown")
    return "\n".join(lines)
