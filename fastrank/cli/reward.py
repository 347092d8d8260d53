"""``fastrank reward``: scores for the responses of a record file."""

from __future__ import annotations

from collections.abc import Sequence

from fastrank.cli.options import print_json
from fastrank.cli.parser import parse
from fastrank.workflow.options import ModelOptions
from fastrank.workflow.reward import RewardOptions, reward_file, summary_text


def run(argv: Sequence[str]) -> int:
    """Run the command; raises `InputError` for anything the user got wrong."""
    options, loading = parse(
        (RewardOptions, ModelOptions),
        argv,
        prog="fastrank reward",
        description="Score every response of a record file by a Python function or a model. A run "
        "that was stopped goes on where it was when the same command is given again.",
    )
    result = reward_file(options, loading)
    if options.json:
        print_json(result)
    else:
        print(summary_text(result))
    return 0
