"""A file as groups ready for packing: reading and tokenising in one call.

Small files are tokenised at every start and held in memory. From `CACHE_FROM` on, about ten seconds
of work, they go through the cache (`fastrank.data.cache`), and only what a step needs is in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fastrank.data.cache import cached_groups, default_num_proc
from fastrank.data.files import open_source
from fastrank.data.records import NormalizeRewards, Reading, open_records, require_records
from fastrank.data.report import Report
from fastrank.data.tokenize import TokenizeOptions, as_group, encode_rows
from fastrank.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastrank.data.group import Group

#: Bytes of a file, or of a data set's table, from which on groups are cached.
CACHE_FROM = 8 << 20


def load_groups(
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int | None = None,
    options: TokenizeOptions | None = None,
    format: str | None = None,
    score_key: str | Mapping[str, float] | None = None,
    max_candidates: int | None = None,
    normalize_rewards: NormalizeRewards = "none",
    min_candidates: int = 2,
    columns: str | Mapping[str, str] | None = None,
    cache: bool | None = None,
    cache_dir: str | Path | None = None,
    num_proc: int | None = None,
) -> tuple[Sequence[Group], Report]:
    """All usable groups of a file or data set, in order, and the report of all records.

    For ``format``, ``score_key``, ``max_candidates``, ``normalize_rewards``, ``min_candidates`` and
    ``columns`` see `fastrank.data.records.read_records`.

    Args:
        source: a path, a pattern of paths, a folder or a Hub name; a `datasets.Dataset`, or any
            iterable of dictionaries.
        tokenizer: a transformers tokenizer.
        context_length: the model's context in tokens. Longer input is truncated to it unless
            ``options`` sets its own limits.
        options: limits in tokens.
        cache: keep the tokens in a file for later starts, or do not; by default from `CACHE_FROM`
            bytes on, and for any size if ``cache_dir`` is given. An iterable of dictionaries is
            never cached.
        cache_dir: see `fastrank.data.cache.default_cache_dir` for the default.
        num_proc: processes that tokenise; by default, for what would be cached, one per core.

    Returns:
        A list of groups, or a view of the cached file, which makes a group when it is asked for.

    Raises:
        InputError: the file cannot be used or leaves nothing, or limits exceed the context.

    >>> from transformers import AutoTokenizer
    >>> tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B")  # doctest: +SKIP
    >>> rows = [{"prompt": "2 + 2 =", "responses": [" 4", " 5"], "scores": [1.0, 0.0]}]
    >>> groups, report = load_groups(rows, tokenizer)  # doctest: +SKIP
    >>> groups[0].rewards  # doctest: +SKIP
    tensor([1., 0.])
    """
    if num_proc is not None and num_proc < 1:
        raise InputError(f"num_proc must be at least 1, got {num_proc}")
    if cache is False and cache_dir is not None:
        raise InputError("cache_dir has no use without a cache")
    options = fit_context(options or TokenizeOptions(), context_length)
    reading = Reading(format, score_key, max_candidates, normalize_rewards, min_candidates, columns)
    opened = open_source(source)
    large = opened.num_bytes >= CACHE_FROM
    if num_proc is None:
        num_proc = default_num_proc() if large else 1
    if opened.kind == "stream":
        cache, num_proc = cache or False, 1
    elif cache is None:
        cache = large or cache_dir is not None
    if cache or num_proc > 1:
        with nullcontext(cache_dir) if cache else TemporaryDirectory() as folder:
            groups, report = cached_groups(
                opened, reading, tokenizer, options, cache_dir=folder, num_proc=num_proc
            )
            return (groups if cache else list(groups)), report
    report = Report(name=opened.name)
    pieces, reader = open_records(opened, reading, report)
    rows = encode_rows(chain.from_iterable(pieces), reader, tokenizer, options, report)
    listed = [as_group(record, encoded, opened.name) for record, encoded in rows]
    require_records(report)
    return listed, report


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
