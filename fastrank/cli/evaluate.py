"""``fastrank evaluate``: reward, perplexity, ranking accuracy, BLEU and wins of a model."""

from __future__ import annotations

from collections.abc import Sequence

from fastrank.cli.options import print_json
from fastrank.cli.parser import parse
from fastrank.workflow.evaluate import (
    EvaluateOptions,
    FreshDecodingOptions,
    evaluate,
    summary_text,
)
from fastrank.workflow.options import ModelOptions


def run(argv: Sequence[str]) -> int:
    """Run the command; raises `InputError` for anything the user got wrong."""
    options, drawing, loading = parse(
        (EvaluateOptions, FreshDecodingOptions, ModelOptions),
        argv,
        prog="fastrank evaluate",
        description="Draw fresh samples for held-out prompts and report their reward, perplexity "
        "and BLEU, and wins against a second model; with ranked records, the model's accuracy as a "
        "reward model.",
    )
    result = evaluate(options, drawing, loading)
    if options.json:
        print_json(result)
    else:
        print(summary_text(result))
    return 0
