"""``fastrank train``: train a causal language model to rank."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from fastrank.cli.parser import parse


def run(argv: Sequence[str]) -> int:
    from transformers.utils import logging

    from fastrank.training.config import RankConfig
    from fastrank.training.failures import TrainingStopped
    from fastrank.training.options import BuiltInConfig, TrainOptions

    logging.set_verbosity_error()  # fastrank's own lines say what matters
    logging.disable_progress_bar()
    prog, description = "fastrank train", "Train a causal language model to rank responses."
    options, config = parse((TrainOptions, RankConfig), argv, prog=prog, description=description)
    if options.built_in:
        options, config = parse(
            (TrainOptions, BuiltInConfig), argv, prog=prog, description=description
        )
    from fastrank.training.run import train

    try:
        result = train(options, config)
    except TrainingStopped as error:
        print(f"{prog}: stopped: {error}", file=sys.stderr)
        return 1
    if options.json and config.process_index == 0:
        print(json.dumps(result))
    return 0
