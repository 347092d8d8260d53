"""Which groups share a pack: best fit over decreasing sizes, rows of similar length, even costs.

Open packs are kept by their free space in a two-level bit set, so that placing a group does not
depend on how many packs there are. First fit without the sort would keep the given order, at a
visibly lower fill.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


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


def spread_evenly(
    costs: NDArray[np.float64], num_bins: int, sizes: NDArray[np.int64], capacity: int
) -> list[list[int]] | None:
    """All items in ``num_bins`` bins of at most ``capacity`` in size and of like cost; None if this
    way finds none.

    Largest first into the cheapest bin with room (at most 4/3 of the best maximum: Graham, "Bounds
    on multiprocessing timing anomalies", 1969), then moves and swaps between the costliest bin and
    cheap ones until none helps.

    Example:
        >>> costs = np.array([5.0, 4.0, 3.0, 3.0, 3.0])
        >>> spread_evenly(costs, 2, np.ones(5, dtype=int), 5)
        [[0, 1], [2, 3, 4]]
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    space = [capacity] * num_bins
    cheapest = [(0.0, number) for number in range(num_bins)]
    items = np.argsort(-costs, kind="stable")
    for item, cost, size in zip(
        items.tolist(), costs[items].tolist(), sizes[items].tolist(), strict=True
    ):
        full: list[tuple[float, int]] = []
        while cheapest and len(full) < _PARTNERS and space[cheapest[0][1]] < size:
            full.append(heapq.heappop(cheapest))
        if not cheapest or space[cheapest[0][1]] < size:
            return None
        load, number = cheapest[0]
        heapq.heapreplace(cheapest, (load + cost, number))
        bins[number].append(item)
        space[number] -= size
        for entry in full:
            heapq.heappush(cheapest, entry)
    even_out(bins, costs, sizes, capacity)
    return [sorted(chosen) for chosen in bins]


#: Cheap bins that are looked at for one with room, and for one to take an item of the costliest.
_PARTNERS = 64
#: At most so many moves and swaps: a fraction of a second.
_EXCHANGES = 1024
#: How often, when none of them can, all are looked at.
_WIDE_LOOKS = 64
#: The costliest bin is even enough when it exceeds the mean by this.
_EVEN = 1.002


def even_out(
    bins: list[list[int]], costs: NDArray[np.float64], sizes: NDArray[np.int64], capacity: int
) -> None:
    """Lower the cost of the costliest bin, in place, by moves and swaps of items with cheap ones;
    no bin comes to exceed ``capacity`` in size."""
    loads = np.array([costs[members].sum() for members in bins])
    space = np.array([capacity - sizes[members].sum() for members in bins])
    enough = _EVEN * float(loads.mean())
    wide_looks = _WIDE_LOOKS
    for _ in range(min(2 * len(bins), _EXCHANGES)):
        top = int(loads.argmax())
        if loads[top] <= enough:
            return
        order = np.argsort(loads, kind="stable")
        found = _best_exchange(bins, top, order[:_PARTNERS], loads, space, costs, sizes)
        if found is None and wide_looks:
            wide_looks -= 1
            found = _best_exchange(bins, top, order[_PARTNERS:], loads, space, costs, sizes)
        if found is None:
            return
        given, other, taken = found
        bins[top].remove(given)
        bins[other].append(given)
        if taken is not None:
            bins[other].remove(taken)
            bins[top].append(taken)
        for changed in (top, other):
            loads[changed] = costs[bins[changed]].sum()
            space[changed] = capacity - sizes[bins[changed]].sum()


def _best_exchange(
    bins: list[list[int]],
    top: int,
    partners: NDArray[np.int64],
    loads: NDArray[np.float64],
    space: NDArray[np.int64],
    costs: NDArray[np.float64],
    sizes: NDArray[np.int64],
) -> tuple[int, int, int | None] | None:
    """The item of bin ``top`` to give, the partner, and its item to take or None, so that the
    costlier of the two bins becomes as cheap as it can; None if that is no gain."""
    if not len(partners):
        return None
    given = np.array(bins[top])
    owner = np.repeat(partners, [len(bins[b]) + 1 for b in partners])
    taken = np.array([item for b in partners for item in (*bins[b], -1)])  # -1: nothing
    # Rows: what may be given; columns: for what.
    less = costs[given][:, None] - np.where(taken < 0, 0.0, costs[taken])
    more = sizes[given][:, None] - np.where(taken < 0, 0, sizes[taken])
    after = np.maximum(loads[top] - less, loads[owner] + less)
    fits = (more <= space[owner]) & (-more <= space[top]) & (owner != top)
    after = np.where(fits, after, np.inf)
    row, column = divmod(int(after.argmin()), len(taken))
    if after[row, column] >= loads[top] * (1 - 1e-9):
        return None
    back = int(taken[column])
    return int(given[row]), int(owner[column]), None if back < 0 else back
