"""``fastrank train``: train a causal language model to rank."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastrank.cli.parser import parse

if TYPE_CHECKING:
    from fastrank.training.config import RankConfig
    from fastrank.workflow.online_options import OnlineTrainOptions


def run(argv: Sequence[str]) -> int:
    from transformers.utils import logging

    from fastrank.errors import TrainingStopped
    from fastrank.training.config import RankConfig
    from fastrank.training.options import BuiltInConfig
    from fastrank.workflow.online_options import OnlineTrainOptions

    logging.set_verbosity_error()  # fastrank's own lines say what matters
    logging.disable_progress_bar()
    prog, description = "fastrank train", "Train a causal language model to rank responses."
    kinds = (OnlineTrainOptions, RankConfig)
    options, config = parse(kinds, argv, prog=prog, description=description)
    if options.built_in:
        kinds = (OnlineTrainOptions, BuiltInConfig)
        options, config = parse(kinds, argv, prog=prog, description=description)
    try:
        result = _train(options, config)
    except TrainingStopped as error:
        print(f"{prog}: stopped: {error}", file=sys.stderr)
        return 1
    if options.json and config.process_index == 0:
        print(json.dumps(result))
    return 0


def _train(options: OnlineTrainOptions, config: RankConfig) -> dict[str, Any]:
    if options.online_every is not None:
        from fastrank.workflow.online import train_online

        return train_online(options, config)
    from fastrank.training.run import train

    return train(options, config)
