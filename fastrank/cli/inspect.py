"""``fastrank inspect``: what is in a record file, and what a model would make of it.

Reads the file once, record by record; only counts are held, so the file may be large.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastrank.cli.options import LengthOptions, ReadOptions, print_json
from fastrank.cli.parser import parse
from fastrank.errors import InputError


@dataclass
class InspectOptions:
    """Options of ``fastrank inspect`` beyond how the file is read."""

    data: str = field(metadata={"help": "JSONL, JSON or Parquet file, folder, or Hub data set."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Model folder or Hub name; adds lengths and packs."}
    )
    max_tokens: int = field(default=16384, metadata={"help": "Most tokens of a pack."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the tokenizer."}
    )
    plot: str | None = field(default=None, metadata={"help": "PNG file to write."})
    json: bool = field(default=False, metadata={"help": "Print one JSON object instead of text."})


def run(argv: Sequence[str]) -> int:
    """Run the command; raises `InputError` for anything the user got wrong."""
    options, reading, limits = parse(
        (InspectOptions, ReadOptions, LengthOptions),
        argv,
        prog="fastrank inspect",
        description="What is in a record file, what is dropped and why; with a tokenizer, lengths "
        "and what padding, packing and sharing prompts would cost.",
        positional="data",
    )
    result = inspect(options, reading, limits)
    if options.json:
        print_json(result)
    return 0


def inspect(options: InspectOptions, reading: ReadOptions, limits: LengthOptions) -> dict[str, Any]:
    """The report of the file as JSON types; prints it as text unless ``options.json``."""
    from fastrank.data.lengths import Lengths, as_text
    from fastrank.data.load import fit_context
    from fastrank.data.records import read_records, require_records
    from fastrank.data.report import Report
    from fastrank.data.tokenize import TokenizeOptions, encode_record, truncate
    from fastrank.data.write import check_output

    if options.max_tokens < 2:
        raise InputError(f"--max_tokens must be at least 2, got {options.max_tokens}")
    if options.plot is not None:
        check_output(options.plot, "--plot")
    cut = TokenizeOptions(**limits.as_kwargs())
    tokenizer = None
    if options.tokenizer is not None:
        from fastrank.modeling.pretrained import load_tokenizer, tokenizer_context

        tokenizer = load_tokenizer(options.tokenizer, trust_remote_code=options.trust_remote_code)
        cut = fit_context(cut, tokenizer_context(options.tokenizer, tokenizer))
    elif limits != LengthOptions():
        raise InputError("limits in tokens need --tokenizer")

    report = Report(name=options.data)
    lengths = None if tokenizer is None else Lengths()
    rewards = array("d")
    for record in read_records(options.data, report=report, **reading.as_kwargs()):
        if tokenizer is not None and lengths is not None:
            whole = encode_record(record, tokenizer, report, as_chat=cut.as_chat)
            if whole is None:
                continue
            short = truncate(whole, tokenizer, cut, report, record.line)
            lengths.add(len(whole[0]), [*map(len, whole[1])], len(short[0]), [*map(len, short[1])])
        if options.plot is not None:
            rewards.extend(record.scores)
    require_records(report)

    result = report.as_dict()
    text = report.as_text()
    if lengths is not None:
        summary = lengths.summary(options.max_tokens)
        result |= summary | {"max_length": cut.max_length}
        text += "\n" + as_text(summary)
    if options.plot is not None:
        from fastrank.data.plot import plot_file

        plot_file(options.plot, report, rewards, lengths)
        result["plot"] = options.plot
        text += f"\n  plot        {options.plot}"
    if not options.json:
        print(text)
    return result
