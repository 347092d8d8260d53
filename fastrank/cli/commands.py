"""Every command: its options, what it runs, and what it prints.

The functions import what they need when they are called, so that the table costs nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        options: dataclasses, whose fields are the command's options; the docstring of the first
            describes the command.
        run: called with an instance of each; returns the result, or None on a process that is not
            to print it.
        text: the result for a person; without it ``run`` prints for itself.
        positional: an option that may be given without its name.
        defaults: of the values that were given, defaults in place of the dataclasses' own.
        failed: whether a result ends the command with exit code 1.
    """

    options: tuple[type, ...]
    run: Callable[..., dict[str, Any] | None]
    text: Callable[[dict[str, Any]], str] | None = None
    positional: str | None = None
    defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    failed: Callable[[dict[str, Any]], bool] = lambda result: False

    def __call__(self, argv: Sequence[str], prog: str) -> int:
        """Run with the arguments after the command's name; returns the exit code."""
        from fastrank.cli.parser import parse

        given = parse(
            self.options,
            argv,
            prog=prog,
            positional=self.positional,
            defaults=self.defaults,
        )
        result = self.run(*given)
        if result is None:
            return 0
        if given[0].json:
            print_json(result)
        elif self.text is not None:
            print(self.text(result))
        return int(self.failed(result))


def _train() -> Command:
    """train a model on ranked responses (nothing given: a built-in task)"""
    from fastrank.training.config import RankConfig
    from fastrank.training.run_options import BUILT_IN_DEFAULTS
    from fastrank.workflow.online_options import OnlineTrainOptions

    _silence_transformers()

    def defaults(given: Mapping[str, Any]) -> Mapping[str, Any]:
        return BUILT_IN_DEFAULTS if given.get("model") is None else {}

    def run(options: OnlineTrainOptions, config: RankConfig) -> dict[str, Any] | None:
        from fastrank.training.interrupts import exiting_at_second_signal

        with exiting_at_second_signal():
            if options.online_every is not None:
                from fastrank.workflow.online import train_online

                result = train_online(options, config)
            else:
                from fastrank.training.run import train

                result = train(options, config)
        return result if config.process_index == 0 else None

    return Command((OnlineTrainOptions, RankConfig), run, defaults=defaults)


def _sample() -> Command:
    """draw candidate responses from one or several models"""
    from fastrank.workflow.sample import SampleOptions, sample_file, sample_text

    return Command((SampleOptions,), sample_file, sample_text)


def _reward() -> Command:
    """score responses by a Python function or a reward model"""
    from fastrank.workflow.reward import RewardOptions, reward_file, reward_text

    return Command((RewardOptions,), reward_file, reward_text)


def _iterate() -> Command:
    """rounds of sample, reward and train"""
    from fastrank.training.config import RankConfig
    from fastrank.workflow.iterate import IterateOptions, iterate

    _silence_transformers()

    def run(options: IterateOptions, config: RankConfig) -> dict[str, Any]:
        from fastrank.training.interrupts import exiting_at_second_signal

        with exiting_at_second_signal():
            return iterate(options, config)

    return Command((IterateOptions, RankConfig), run, lambda result: f"model in {result['model']}")


def _evaluate() -> Command:
    """reward, perplexity and accuracy of a trained model"""
    from fastrank.workflow.evaluate import EvaluateOptions, evaluate, evaluation_text

    return Command((EvaluateOptions,), evaluate, evaluation_text)


def _score() -> Command:
    """score a record file's responses with a model"""
    from fastrank.workflow.scoring import ScoreOptions, score_file

    return Command((ScoreOptions,), score_file)


def _inspect() -> Command:
    """what is in a record file, what is dropped and why"""
    from fastrank.cli.inspect import InspectOptions, inspect

    return Command((InspectOptions,), inspect, positional="data")


def _view() -> Command:
    """a page of a run or of a data file, to look at"""
    from fastrank.cli.view import ViewOptions, view

    return Command((ViewOptions,), view, lambda result: result["page"], positional="source")


def _bench() -> Command:
    """microbenchmarks beside every serious peer"""
    from fastrank.cli.bench import BenchOptions, SizeOptions, bench, own_failed

    return Command((BenchOptions, SizeOptions), bench, failed=own_failed)


def _doctor() -> Command:
    """versions, devices, and what would be chosen here and why"""
    from fastrank.cli.doctor import DoctorOptions, doctor_text, examine

    return Command((DoctorOptions,), examine, doctor_text)


_ALL = (_train, _sample, _reward, _iterate, _evaluate, _score, _inspect, _view, _bench, _doctor)

#: In the order of ``fastrank --help``; a function's docstring is its command's line there.
COMMANDS = {made.__name__.removeprefix("_"): made for made in _ALL}


def _silence_transformers() -> None:
    """Keep transformers' messages and bars out of a training run: fastrank's say what matters."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def print_json(result: Mapping[str, Any]) -> None:
    """Print one JSON object as the last line on stdout; NaN and infinity, which JSON lacks, as
    null."""
    print(json.dumps(_finite(result), ensure_ascii=False))


def _finite(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
