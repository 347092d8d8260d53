"""``fastrank inspect``: the contents of a record file, and their cost for a model.

Reads the file once, record by record; only counts are held, so the file may be large.
"""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING, Any

from fastrank import options as shared
from fastrank.data.formats import column_names
from fastrank.errors import InputError
from fastrank.options.declare import change, check_least, option, options, values_of

if TYPE_CHECKING:
    from fastrank.data.group import Group


@options
class InspectOptions(
    shared.DataOptions,
    shared.ReadOptions,
    shared.TextOptions,
    shared.SameTokensOptions,
    shared.PackOptions,
    shared.TrustOptions,
    shared.JsonOptions,
):
    """Report on a record file: its contents, what is dropped and why; with a tokenizer, lengths
    and what padding, packing and sharing prompts would cost."""

    written = ("plot",)

    data: str = change(
        "Records: JSONL, JSON or Parquet file, folder, or Hub data set.", required=True
    )
    tokenizer: str | None = option(
        "Model folder or Hub name; adds lengths and packs.", default=None
    )
    columns: str | None = change(
        "Names of the file's fields, e.g. prompt=question,system=role; an empty name (context=) "
        f"leaves a field out. Names that the formats know: {', '.join(column_names())}."
    )
    plot: str | None = option("PNG file to write.", default=None)


def inspect(options: InspectOptions) -> dict[str, Any]:
    """The report of the file as JSON types; prints it as text unless ``options.json``."""
    from fastrank.data.group import example_parts, example_text
    from fastrank.data.lengths import Lengths, as_text
    from fastrank.data.load import fit_context
    from fastrank.data.records import read_records, require_records
    from fastrank.data.report import Report
    from fastrank.data.tokenize import TokenizeOptions, as_group, cut_record, encode_record
    from fastrank.data.write import check_output

    check_least(options, "--", max_tokens=2)
    if options.plot is not None:
        if check_output(options.plot, "--plot").suffix.lower() != ".png":
            raise InputError(f"--plot must be a .png file, got {options.plot}")
    cut = TokenizeOptions(**values_of(options, TokenizeOptions))
    tokenizer = None
    if options.tokenizer is not None:
        from fastrank.modeling.pretrained import load_tokenizer, template_values, tokenizer_context

        tokenizer = load_tokenizer(
            options.tokenizer,
            trust_remote_code=options.trust_remote_code,
            **template_values(options),
        )
        cut = fit_context(cut, tokenizer_context(options.tokenizer, tokenizer))
    elif any(
        values_of(options, kind) != values_of(kind(), kind)
        for kind in (shared.TextOptions, shared.SameTokensOptions)
    ):
        raise InputError("limits in tokens and chat templates need --tokenizer")

    report = Report(name=options.data)
    lengths = None if tokenizer is None else Lengths()
    rewards = array("d")
    example: Group | None = None
    for record in read_records(
        options.data, report=report, **values_of(options, shared.ReadOptions)
    ):
        if tokenizer is not None and lengths is not None:
            whole = encode_record(record, tokenizer, report, as_chat=cut.as_chat)
            if whole is None:
                continue
            settled = cut_record(record, whole, tokenizer, cut, report)
            if settled is None:
                continue
            record, short = settled
            example = example or as_group(record, short, options.data)
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
    if example is not None and tokenizer is not None:
        result["example"] = example_parts(example, tokenizer)
        text += "\n" + example_text(example, tokenizer, colour=sys.stdout.isatty())
    if options.plot is not None:
        from fastrank.data.lengths import plot_file

        plot_file(options.plot, report, rewards, lengths)
        result["plot"] = options.plot
        text += f"\n  plot        {options.plot}"
    if not options.json:
        print(text)
    return result
