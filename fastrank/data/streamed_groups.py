"""Groups of a stream of records, tokenised as they are asked for.

A stream has neither a length nor positions. Here it has both: position i is its i-th usable group,
counted over as many passes as it takes, and the length is what a run asks for. Positions are meant
to be asked for in rising order; an earlier one than those held means reading the stream again, as a
resumed run does to come to where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, count
from typing import TYPE_CHECKING, Any

from fastrank.data import formats
from fastrank.data.columns import GroupView
from fastrank.data.files import open_source, read_rows
from fastrank.data.records import Reading, open_records
from fastrank.data.report import Report
from fastrank.data.tokenize import TokenizeOptions, as_group, encode_rows
from fastrank.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastrank.data.group import Group


class StreamedGroups(GroupView):
    """The groups of an iterable that can be iterated again, such as a `datasets.IterableDataset`.

    Args:
        source: rows of any known format that gives a record per row. Its ``set_epoch``, if it has
            one, is called with the number of each pass.
        tokenizer: of the model.
        options: limits in tokens.
        check: called with every group; raises for one that cannot be trained on.
        length: groups in all; may be set later.
        num_held: how many of the last groups are held; may be set later.

    Raises:
        InputError: rows of the format have to be gathered from a whole file. While reading: a
            malformed row, a pass without a usable group.

    Attributes:
        report: of the last pass, as far as it has been read.
    """

    def __init__(
        self,
        source: Any,
        tokenizer: PreTrainedTokenizerBase,
        options: TokenizeOptions,
        *,
        check: Callable[[Group], None] = lambda group: None,
        length: int = 0,
        num_held: int = 1024,
    ) -> None:
        self.length = length
        self.num_held = num_held
        self.report = Report()
        self._source = source
        self._tokenizer = tokenizer
        self._options = options
        self._check = check
        for place, row in read_rows(source):
            if formats.FORMATS[formats.detect(row, place)].gather is not None:
                raise InputError(
                    f"{place}: groups of this format are gathered from a whole file, which a "
                    "stream is not; give one record per row"
                )
            break
        self._restart()

    def __len__(self) -> int:
        return self.length

    def beginning(self, number: int) -> list[Group]:
        """The first groups, whatever the length is."""
        return [self.group_at(i) for i in range(number)]

    def group_at(self, position: int) -> Group:
        if position < self._next and position not in self._held:
            self._restart()
        while self._next <= position:
            group = next(self._groups)
            self._check(group)
            self._held[self._next] = group
            self._held.pop(self._next - self.num_held, None)
            self._next += 1
        return self._held[position]

    def _restart(self) -> None:
        self._held: dict[int, Group] = {}
        self._next = 0
        self._groups = self._passes()

    def _passes(self) -> Iterator[Group]:
        for number in count():
            if hasattr(self._source, "set_epoch"):
                self._source.set_epoch(number)
            opened = open_source(self._source)
            self.report = Report(name=opened.name)
            pieces, reader = open_records(opened, Reading(), self.report)
            rows = chain.from_iterable(pieces)
            found = encode_rows(rows, reader, self._tokenizer, self._options, self.report)
            usable = 0
            for record, encoded in found:
                usable += 1
                yield as_group(record, encoded, opened.name)
            if not usable:
                again = "" if number == 0 else " when it was read again"
                raise InputError(f"{opened.name}: the stream has no usable record{again}")
