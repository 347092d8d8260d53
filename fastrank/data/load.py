"""A file as groups ready for packing: reading and tokenising in one call.

Groups of the whole file are held in memory (int64 token ids); `read_records` and `tokenize_record`
are there for whoever wants to stream.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fastrank.data.records import read_records, require_records
from fastrank.data.report import Report
from fastrank.data.tokenize import TokenizeOptions, tokenize_record
from fastrank.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastrank.data.packing import Group


def load_groups(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int | None = None,
    options: TokenizeOptions | None = None,
    format: str | None = None,
    score_key: str | None = None,
    max_candidates: int | None = None,
    normalize_rewards: str = "none",
    min_candidates: int = 2,
) -> tuple[list[Group], Report]:
    """All usable groups of a file, in its order, and the report of what became of every record.

    Args:
        path, format, score_key, max_candidates, normalize_rewards, min_candidates: see
            `fastrank.data.records.read_records`.
        tokenizer: a transformers tokenizer.
        context_length: the model's context in tokens. Longer input is truncated to it unless
            ``options`` sets its own limits.
        options: limits in tokens.

    Raises:
        InputError: the file cannot be used or leaves nothing, or limits exceed the context.
    """
    options = fit_context(options or TokenizeOptions(), context_length)
    report = Report(name=str(path))
    records = read_records(
        path,
        format=format,
        score_key=score_key,
        max_candidates=max_candidates,
        normalize_rewards=normalize_rewards,
        min_candidates=min_candidates,
        report=report,
    )
    found = (tokenize_record(record, tokenizer, options, report) for record in records)
    groups = [group for group in found if group is not None]
    require_records(report)
    return groups, report


def fit_context(options: TokenizeOptions, context_length: int | None) -> TokenizeOptions:
    """``options`` with ``max_length`` set to the context where it was open.

    Raises:
        InputError: explicitly asked lengths do not fit the context.
    """
    if context_length is None:
        return options
    prompt, response = options.max_prompt_length, options.max_response_length
    asked = {
        "max_length": options.max_length,
        "max_prompt_length + max_response_length": prompt and response and prompt + response,
        "max_prompt_length": prompt and prompt + 1,
        "max_response_length": response and response + 1,
    }
    for name, needed in asked.items():
        if needed is not None and needed > context_length:
            least = (
                " plus one token" if name in ("max_prompt_length", "max_response_length") else ""
            )
            raise InputError(
                f"{name}{least} must fit the model's context of {context_length} tokens, "
                f"got {needed}"
            )
    if options.max_length is None:
        return replace(options, max_length=context_length)
    return options
