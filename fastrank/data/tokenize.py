"""A record as token ids: where the prompt ends, how a response ends, what is cut.

Prompt and responses are tokenised as one text, as the model will meet them, and the prompt is the
common beginning of its own tokens and of all the joint ones: a token that spans the boundary
belongs to the response. The alternative, tokenising the two apart, is simpler but scores token
sequences that the tokenizer never produces; it remains only where the rule leaves no prompt at all.

Chat messages go through the tokenizer's chat template (`fastrank.data.render`), whose own end of
turn then ends the response. Every other response ends with the tokenizer's EOS. Special tokens are
placed here and not by the tokenizer's post-processor, so that a template's BOS is never doubled.

Of a candidate of several turns (`fastrank.data.turns`) a token is ranked that has a character of
one of the assistant's. From here to the files of the cache, the others are written as ``~id``.
"""

from __future__ import annotations

import os
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fastrank.data.fields import Prompt, as_messages
from fastrank.data.records import Record, RecordReader, Unread, narrowed
from fastrank.data.render import (
    TEMPLATE_REFUSED,
    Refused,
    Rendered,
    TemplateError,
    render_prompt,
    render_record,
    with_ends,
)
from fastrank.data.report import (
    AS_ANOTHER,
    CUT_EQUAL,
    FEW_CANDIDATES,
    NO_RANKED,
    SAME_PAIRS,
    Report,
)
from fastrank.data.rows import Place
from fastrank.data.turns import NEEDS_PLACES, marked, ranked_tokens, render_turns
from fastrank.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastrank.data.group import Group

SameTokens = Literal["keep", "merge", "drop"]

#: Prompt ids, and one list of ids per response; in it `marked` ids of what is not ranked.
Encoded = tuple[list[int], list[list[int]]]

#: A portion ends after so many rows, or so many bytes of them.
PORTION_ROWS = 128
PORTION_BYTES = 1 << 20

EMPTY_PROMPT = "prompt without a token"

#: Token ids that each tokenizer puts before a text by itself (BOS, for most that put any).
_prefixes: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class TokenizeOptions:
    """Limits in tokens; None is no limit.

    Attributes:
        max_prompt_length: longer prompts lose tokens on the left (a leading BOS stays).
        max_response_length: longer responses lose tokens on the right, their end of turn included.
        max_length: limit of a prompt with any one response, normally the model's context. The
            prompt gives way first, down to half of it, then the responses.
        as_chat: treat a text prompt as a single user message.
        same_tokens: candidates of one prompt that have the same tokens and different rewards are
            all kept ("keep"), become one with the mean of their rewards ("merge"), or are all left
            out ("drop").
    """

    max_prompt_length: int | None = None
    max_response_length: int | None = None
    max_length: int | None = None
    as_chat: bool = False
    same_tokens: SameTokens = "keep"

    def __post_init__(self) -> None:
        for name, least in (
            ("max_prompt_length", 1),
            ("max_response_length", 1),
            ("max_length", 2),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} must be at least {least}, got {value}")
        if self.same_tokens not in get_args(SameTokens):
            allowed = ", ".join(get_args(SameTokens))
            raise InputError(f"same_tokens must be one of {allowed}, got '{self.same_tokens}'")


def tokenize_record(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    options: TokenizeOptions,
    report: Report,
) -> Group | None:
    """The record as a `Group`, or None if it has to be left out (counted in ``report``).

    Left out are records whose prompt has no token (an empty text with a tokenizer that has no BOS),
    those that `fastrank.data.render` refuses, and those of which ``options.same_tokens`` leaves
    fewer than two candidates. The group is named ``file:line``.

    Raises:
        InputError: the tokenizer has no EOS token to end a response with.
    """
    encoded = encode_record(record, tokenizer, report, as_chat=options.as_chat)
    if encoded is None:
        return None
    cut = cut_record(record, encoded, tokenizer, options, report)
    return None if cut is None else as_group(*cut, report.name)


def encode_record(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    report: Report,
    *,
    as_chat: bool = False,
) -> Encoded | None:
    """A record's token ids at full length; None as for `tokenize_record`."""
    return encode_records([record], tokenizer, report, as_chat=as_chat)[0]


def encode_records(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    report: Report,
    *,
    as_chat: bool = False,
) -> list[Encoded | None]:
    """`encode_record` of each, with a single call of the tokenizer for all their texts."""
    rendered = [_render(record, tokenizer, as_chat, report) for record in records]
    texts = [text for item in rendered if item is not None for text in (item.own, *item.joint)]
    ids = iter(_encode(tokenizer, texts))
    out: list[Encoded | None] = []
    for record, item in zip(records, rendered, strict=True):
        if item is None:
            out.append(None)
            continue
        prompt, whole = next(ids), [next(ids) for _ in item.joint]
        try:
            split = _split(item, prompt, whole, tokenizer, report, record.line)
        except Refused as refused:
            report.drop_kept(str(refused), record.line, record.scores)
            split = None
        else:
            for note in item.notes:
                report.note(note, record.line)
        out.append(split)
    return out


def _render(
    record: Record, tokenizer: PreTrainedTokenizerBase, as_chat: bool, report: Report
) -> Rendered | None:
    try:
        if record.is_masked:
            rendered = render_turns(record, tokenizer)
        else:
            rendered = render_record(record, tokenizer, as_chat)
        return with_ends(rendered, record.ended)
    except (Refused, TemplateError) as refused:
        reason = str(refused) if isinstance(refused, Refused) else TEMPLATE_REFUSED
        report.drop_kept(reason, record.line, record.scores)
        return None


def encode_rows(
    rows: Iterable[tuple[Place, Unread]],
    reader: RecordReader,
    tokenizer: PreTrainedTokenizerBase,
    options: TokenizeOptions,
    report: Report,
) -> Iterator[tuple[Record, Encoded]]:
    """Read, tokenise and truncate rows, a portion at a time; yield what is usable, in order.

    Raises:
        InputError: a malformed row, or a tokenizer without an EOS token.
    """
    for portion in _portions(rows):
        found = (reader.read(place, unread, report) for place, unread in portion)
        records = [record for record in found if record is not None]
        whole = encode_records(records, tokenizer, report, as_chat=options.as_chat)
        for record, encoded in zip(records, whole, strict=True):
            cut = encoded and cut_record(record, encoded, tokenizer, options, report)
            if cut is not None:
                yield cut


def _portions(rows: Iterable[tuple[Place, Unread]]) -> Iterator[list[tuple[Place, Unread]]]:
    """Rows in lists that are worth a call of the tokenizer."""
    portion: list[tuple[Place, Unread]] = []
    size = 0
    for place, unread in rows:
        portion.append((place, unread))
        size += len(unread) if isinstance(unread, bytes) else 0
        if len(portion) >= PORTION_ROWS or size >= PORTION_BYTES:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def joined(texts: Iterable[Sequence[int]]) -> NDArray[np.int64]:
    """The ids of all texts in a row."""
    # An array takes a list's numbers several times as fast as NumPy or torch.
    return np.frombuffer(array("q", [*chain.from_iterable(texts)]), dtype=np.int64)


def as_group(record: Record, encoded: Encoded, file: str) -> Group:
    """A tokenised record as a `Group` named ``file:line``."""
    import torch

    from fastrank.data.group import Group

    prompt, responses = encoded
    texts = [prompt, *responses]
    own, *rest = torch.from_numpy(joined(texts)).split([len(text) for text in texts])
    rewards = torch.from_numpy(np.array(narrowed(record.scores), dtype=np.float32))
    name = f"{file}:{record.line}"
    if record.is_masked:
        return Group.of_marked(own, rest, rewards, name)
    return Group(own, tuple(rest), rewards, name=name)


def encode_prompt(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    *,
    as_chat: bool = False,
    tools: Sequence[Any] | None = None,
) -> list[int]:
    """Token ids of a prompt alone, as a model is given it to go on from; empty for no token.

    Raises:
        InputError: the chat template refuses the conversation, or is needed and absent.
    """
    asked = as_messages(prompt) if as_chat else prompt
    own, is_chat = render_prompt(asked, tokenizer, tools)
    ids = _encode(tokenizer, [own])[0] if own else []
    if is_chat:
        return ids
    prefix = _prefix(tokenizer)
    if prefix and ids[: len(prefix)] == prefix:
        prefix = []  # the text begins with its own BOS
    ids = [*prefix, *ids]
    if not ids and tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id]
    return ids


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text, told from one short text."""
    if tokenizer not in _prefixes:
        plain = _encode(tokenizer, ["a"])[0]
        full = list(tokenizer(["a"], verbose=False)["input_ids"][0])
        at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
        _prefixes[tokenizer] = full[:at]
    return _prefixes[tokenizer]


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        verbose=False,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    return list(encoded["input_ids"])


def _split(
    item: Rendered,
    prompt: list[int],
    whole: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    report: Report,
    line: int,
) -> Encoded:
    own, joint, ended, cut = item.own, item.joint, bool(item.end), item.cut
    prefix = [] if item.is_chat else _prefix(tokenizer)  # a template writes its own BOS
    if prefix and prompt[: len(prefix)] == prefix:
        prefix = []  # the text begins with its own BOS
    if not ended:
        eos = tokenizer.eos_token_id
        if eos is None:
            raise InputError("the tokenizer has no EOS token, so the end of a response is unknown")
        for i, ids in enumerate(whole):  # in place: the tokenizer made them for this record
            if i not in cut and ids[-1:] != [eos]:
                ids.append(eos)
    shared = len(os.path.commonprefix([prompt, *whole]))  # works on any sequences
    # A response keeps at least one token, also when it adds nothing to the prompt's.
    shared = max(0, min(shared, *(len(ids) - 1 for ids in whole)))
    if item.ranked:
        whole = _marked(item, whole, tokenizer)
    if prefix or shared:
        return [*prefix, *prompt[:shared]], [ids[shared:] for ids in whole]
    if not prompt:
        start = tokenizer.bos_token_id
        if start is None:
            raise Refused(EMPTY_PROMPT)
        return [start], whole
    # The first token spans the boundary in some response: tokenise the two apart.
    report.forced_boundaries.append(line)
    apart = _encode(tokenizer, [text.removeprefix(own) for text in joint])
    tail = [] if ended else [tokenizer.eos_token_id]
    apart = [ids if i in cut or ids[-1:] == tail else ids + tail for i, ids in enumerate(apart)]
    return prompt, _marked(item, apart, tokenizer, len(own)) if item.ranked else apart


def _marked(
    item: Rendered, responses: list[list[int]], tokenizer: PreTrainedTokenizerBase, start: int = 0
) -> list[list[int]]:
    """`marked` ids of the joint texts from a character on, which an EOS may follow."""
    out = []
    for text, spans, ids in zip(item.joint, item.ranked, responses, strict=True):
        ranked = ranked_tokens(tokenizer, text, spans, start)
        if ranked is None:
            raise Refused(NEEDS_PLACES)
        out.append(marked(ids, ranked + [True] * (len(ids) - len(ranked))))
    return out


def cut_record(
    record: Record,
    encoded: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    options: TokenizeOptions,
    report: Report,
) -> tuple[Record, Encoded] | None:
    """A record and its token ids as training sees them: cut to the limits, every trouble counted.

    None, counted, if ``options.same_tokens`` leaves fewer than two candidates.
    """
    cut = truncate(encoded, tokenizer, options, report, record.line)
    if record.is_masked:
        kept = [i for i, ids in enumerate(cut[1]) if max(ids) >= 0]
        if len(kept) < len(cut[1]):
            settled = _only(record, cut, kept, record.scores, NO_RANKED, report)
            if settled is None:
                return None
            record, cut = settled
            encoded = encoded[0], [encoded[1][i] for i in kept]
    same = _same_tokens(cut[1], record.scores)
    if not same:
        return record, cut
    whole = encoded[1]
    made_equal = sum(whole[i] != whole[j] for i, j in same)
    report.count(SAME_PAIRS, record.line, len(same) - made_equal)
    report.count(CUT_EQUAL, record.line, made_equal)
    if options.same_tokens == "keep":
        return record, cut
    return _settled(record, cut, same, options.same_tokens == "merge", report)


def _same_tokens(responses: Sequence[list[int]], scores: Sequence[float]) -> list[tuple[int, int]]:
    """Pairs of responses with different scores and the same tokens."""
    return [
        (j, i)
        for i in range(len(responses))
        for j in range(i)
        if scores[i] != scores[j] and responses[i] == responses[j]
    ]


def _settled(
    record: Record,
    encoded: Encoded,
    same: Sequence[tuple[int, int]],
    merge: bool,
    report: Report,
) -> tuple[Record, Encoded] | None:
    """A record without candidates that have the same tokens and different scores."""
    prompt, responses = encoded
    at_odds = {i for pair in same for i in pair}
    scores = list(record.scores)
    kept = [i for i in range(len(scores)) if i not in at_odds]
    for i in at_odds if merge else ():
        equal = [j for j in at_odds if responses[j] == responses[i]]
        if i == min(equal):
            scores[i] = fmean(record.scores[j] for j in equal)
            kept.append(i)
    kept.sort()
    return _only(record, encoded, kept, scores, AS_ANOTHER, report)


def _only(
    record: Record,
    encoded: Encoded,
    kept: Sequence[int],
    scores: Sequence[float],
    reason: str,
    report: Report,
) -> tuple[Record, Encoded] | None:
    """A record with the candidates at the positions ``kept`` alone, with these of the scores; None,
    counted, for fewer than two."""
    prompt, responses = encoded
    left = [scores[i] for i in kept]
    report.drop_candidate(reason, record.line, len(responses) - len(kept))
    if len(kept) < 2:
        report.drop_kept(FEW_CANDIDATES.format(minimum=2), record.line, record.scores, len(kept))
        return None
    report.rescore(record.scores, left)
    settled = replace(
        record,
        responses=[record.responses[i] for i in kept],
        scores=left,
        positions=tuple(record.positions[i] for i in kept) if record.positions else (),
        turns=tuple(record.turns[i] for i in kept) if record.turns else (),
        ended=tuple(record.ended[i] for i in kept) if record.ended else (),
    )
    return settled, (prompt, [responses[i] for i in kept])


def truncate(
    encoded: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    options: TokenizeOptions,
    report: Report,
    line: int,
) -> Encoded:
    """Token ids cut to the limits of ``options``, every cut counted."""
    prompt, responses = encoded
    prompt_limit = _smaller(len(prompt), options.max_prompt_length)
    longest = _smaller(max(map(len, responses)), options.max_response_length)
    response_limit = longest
    if options.max_length is not None and prompt_limit + longest > options.max_length:
        half = options.max_length // 2
        prompt_limit = min(prompt_limit, max(half, options.max_length - longest))
        response_limit = options.max_length - prompt_limit
    if len(prompt) > prompt_limit:
        report.truncate("prompt", line)
        bos = tokenizer.bos_token_id
        if bos is not None and prompt[0] == bos and prompt_limit > 1:
            prompt = [bos, *prompt[len(prompt) - prompt_limit + 1 :]]
        else:
            prompt = prompt[len(prompt) - prompt_limit :]
    cut = []
    for ids in responses:
        if len(ids) > response_limit:
            report.truncate("response", line)
            ids = ids[:response_limit]
        cut.append(ids)
    return prompt, cut


def _smaller(length: int, limit: int | None) -> int:
    return length if limit is None else min(length, limit)
