"""Which groups share a pack: best fit over decreasing sizes, and rows of similar length.

Open packs are kept by their free space in a two-level bit set, so that placing a group does not
depend on how many packs there are. First fit without the sort would keep the given order, at a
visibly lower fill.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of at most ``capacity``, each a rising list of indices into ``sizes`` (all <= capacity).

    Items are taken by falling size, equal ones by index; each goes into the bin that it fills best,
    the one opened last among equals. Time is linear in the number of items after the sort.
    """
    order = np.argsort(-np.asarray(sizes, dtype=np.int64), kind="stable").tolist()
    bins: list[list[int]] = []
    open_bins = _FreeSpace(capacity)
    for item in order:
        size = sizes[item]
        found = open_bins.take(size)
        if found is None:
            bins.append([item])
            open_bins.put(capacity - size, len(bins) - 1)
        else:
            space, index = found
            bins[index].append(item)
            open_bins.put(space - size, index)
    return [sorted(chosen) for chosen in bins]


class _FreeSpace:
    """Bins by free space, with "the smallest space that is at least s" in constant time.

    Two levels of bits, as in a van Emde Boas tree cut off at depth two: a word says which spaces of
    a block have a bin, the summary which blocks have a word.
    """

    _WIDTH = 512

    def __init__(self, capacity: int) -> None:
        self._bins: dict[int, list[int]] = {}
        self._words = [0] * (capacity // self._WIDTH + 1)
        self._summary = 0

    def put(self, space: int, index: int) -> None:
        if space == 0:
            return
        self._bins.setdefault(space, []).append(index)
        block, bit = divmod(space, self._WIDTH)
        self._words[block] |= 1 << bit
        self._summary |= 1 << block

    def take(self, size: int) -> tuple[int, int] | None:
        """Remove and return ``(space, index)`` of the best-fitting bin; None if there is none."""
        block, bit = divmod(size, self._WIDTH)
        word = self._words[block] >> bit << bit
        if not word:
            later = self._summary >> (block + 1) << (block + 1)
            if not later:
                return None
            block = _lowest_bit(later)
            word = self._words[block]
        space = block * self._WIDTH + _lowest_bit(word)
        waiting = self._bins[space]
        index = waiting.pop()
        if not waiting:
            self._words[block] &= ~(1 << space % self._WIDTH)
            if not self._words[block]:
                self._summary &= ~(1 << block)
        return space, index


def _lowest_bit(word: int) -> int:
    return (word & -word).bit_length() - 1


def fill_padded(shapes: Sequence[tuple[int, int]], max_tokens: int) -> list[list[int]]:
    """Packs of (candidates, longest sequence) groups whose padded rows fit ``max_tokens``.

    Groups of similar length stand together: by falling length, a pack's first group fixes the
    length of its rows, so what is left to fill is a number of rows.
    """
    order = sorted(range(len(shapes)), key=lambda i: (-shapes[i][1], i))
    packs: list[list[int]] = []
    rows_left = 0
    for index in order:
        candidates, length = shapes[index]
        if candidates > rows_left:
            packs.append([])
            rows_left = max_tokens // length
        packs[-1].append(index)
        rows_left -= candidates
    return [sorted(chosen) for chosen in packs]
