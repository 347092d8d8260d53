"""``fastrank sample``: candidates for ranking from one or several models."""

from __future__ import annotations

from collections.abc import Sequence

from fastrank.cli.options import print_json
from fastrank.cli.parser import parse
from fastrank.workflow.options import DecodingOptions, ModelOptions
from fastrank.workflow.sample import SampleOptions, sample_file, summary_text


def run(argv: Sequence[str]) -> int:
    """Run the command; raises `InputError` for anything the user got wrong."""
    options, drawing, loading = parse(
        (SampleOptions, DecodingOptions, ModelOptions),
        argv,
        prog="fastrank sample",
        description="Draw responses to every prompt of a file. A run that was stopped goes on "
        "where it was when the same command is given again.",
    )
    result = sample_file(options, drawing, loading)
    if options.json:
        print_json(result)
    else:
        print(summary_text(result))
    return 0
