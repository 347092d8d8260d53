"""``fastrank iterate``: rounds of sample, reward and train."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fastrank.cli.options import print_json
from fastrank.cli.parser import parse


def run(argv: Sequence[str]) -> int:
    """Run the command; raises `InputError` for anything the user got wrong."""
    from transformers.utils import logging

    from fastrank.errors import TrainingStopped
    from fastrank.training.config import RankConfig
    from fastrank.workflow.iterate import IterateOptions, iterate

    logging.set_verbosity_error()  # fastrank's own lines say what matters
    prog = "fastrank iterate"
    options, config = parse(
        (IterateOptions, RankConfig),
        argv,
        prog=prog,
        description="Rounds of sampling from a model, rewarding the samples and training on them. "
        "A run that was stopped goes on where it was when the same command is given again.",
    )
    try:
        result = iterate(options, config)
    except TrainingStopped as error:
        print(f"{prog}: stopped: {error}", file=sys.stderr)
        return 1
    if options.json:
        print_json(result)
    else:
        print(f"model in {result['model']}")
    return 0
