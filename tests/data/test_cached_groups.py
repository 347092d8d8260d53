"""Groups in mapped files behave as the list of them does."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader

from fastrank import Group
from fastrank.data.cached_groups import CachedGroups, group_writer
from fastrank.data.columns import (
    group_sizes,
    largest_ids,
    prompt_key,
    prompt_keys,
    response_lengths,
    select,
    tokens_digest,
)
from fastrank.data.records import Record


@pytest.fixture(scope="module")
def encoded() -> list[tuple[list[int], list[list[int]], list[float], int]]:
    rng = np.random.default_rng(0)

    def ids(longest: int) -> list[int]:
        return rng.integers(0, 1000, rng.integers(1, longest)).tolist()

    out = []
    for i in range(57):
        n = int(rng.integers(1, 7))
        out.append((ids(9), [ids(12) for _ in range(n)], rng.normal(size=n).tolist(), 3 * i + 1))
    out[50] = (out[3][0], *out[50][1:])  # a prompt twice
    return out


def write(path: Path, encoded: list) -> None:
    rows = [(Record("", [], rewards, line), (p, r)) for p, r, rewards, line in encoded]
    with group_writer(path) as add:
        for first in range(0, len(rows), 10):
            add(rows[first : first + 10])


@pytest.fixture
def table(encoded, tmp_path: Path) -> CachedGroups:
    for number, rows in enumerate((encoded[:34], encoded[34:])):  # the last batches are short ones
        write(tmp_path / f"groups-{number}.arrow", rows)
    return CachedGroups(tmp_path, "file")


@pytest.fixture
def plain(encoded) -> list[Group]:
    return [Group(p, r, w, name=f"file:{line}") for p, r, w, line in encoded]


def same(a: Group, b: Group) -> bool:
    texts = zip((a.prompt_ids, *a.response_ids), (b.prompt_ids, *b.response_ids), strict=True)
    return (
        all(x.equal(y) and x.dtype == y.dtype == torch.int64 for x, y in texts)
        and a.rewards.equal(b.rewards)
        and a.name == b.name
        and a.reference_scores is b.reference_scores is None
    )


def test_items_slices_and_iteration(table: CachedGroups, plain: list[Group]) -> None:
    assert len(table) == len(plain) == 57
    assert all(map(same, table, plain))
    for i in (0, 9, 10, 56, -1, -57):
        assert same(table[i], plain[i])
    for i in (57, -58):
        with pytest.raises(IndexError):
            table[i]
    for part in (slice(5, 30, 7), slice(None, None, -1), slice(60, 90), slice(-3, None)):
        assert len(table[part]) == len(plain[part])
        assert all(map(same, table[part], plain[part]))
    assert same(table[np.int64(4)], plain[4])  # type: ignore[call-overload]


def test_a_group_owns_its_numbers(table: CachedGroups, plain: list[Group]) -> None:
    table[2].prompt_ids.zero_()
    table[2].rewards.zero_()
    assert same(table[2], plain[2])


@pytest.mark.parametrize("ids", [([], [[1]]), ([1], [[1], []]), ([1], [])])
def test_nothing_empty_is_written(ids: tuple, encoded: list, tmp_path: Path) -> None:
    """Every largest id is that of a row of its own."""
    with pytest.raises(ValueError, match="a prompt and every response must have tokens"):
        write(tmp_path / "groups.arrow", [encoded[0], (*ids, [0.0] * len(ids[1]), 1), encoded[1]])


def test_views_of_views(table: CachedGroups, plain: list[Group]) -> None:
    first = table.select([40, 3, 3, 50, 11])
    second = first.select(np.array([3, 0]))
    assert [g.name for g in second] == [plain[50].name, plain[40].name]
    assert second.dataset is table.dataset
    assert len(table.select([])) == 0 and list(table.select(range(0))) == []
    for wrong in ([5], [-1]):
        with pytest.raises(IndexError, match=r"must lie in \[0, 5\)"):
            first.select(wrong)


def test_columns_are_those_of_the_groups(table: CachedGroups, plain: list[Group]) -> None:
    for chosen in (range(57), [50, 3, 7, 7]):
        mapped, listed = select(table, chosen), select(plain, chosen)
        assert isinstance(mapped, CachedGroups) and isinstance(listed, list)
        a, b = group_sizes(mapped), group_sizes(listed)
        for name in ("num_candidates", "num_tokens", "longest_sequence"):
            assert getattr(a, name).tolist() == getattr(b, name).tolist()
            assert getattr(a, name).dtype == getattr(b, name).dtype == np.int64
        for shared in (False, True):
            assert a.pack_tokens(shared).tolist() == b.pack_tokens(shared).tolist()
        assert largest_ids(mapped).tolist() == largest_ids(listed).tolist()
        assert prompt_keys(mapped).tolist() == prompt_keys(listed).tolist()
        for position in range(len(listed)):
            lengths = [len(ids) for ids in listed[position].response_ids]
            assert response_lengths(mapped, position).tolist() == lengths
            assert response_lengths(listed, position).tolist() == lengths
    keys = prompt_keys(table)
    assert keys[3] == keys[50] and len(set(keys.tolist())) == 56
    assert prompt_key(np.array([1, 2])) != prompt_key(np.array([2, 1]))


def test_nothing_is_a_table_too(table: CachedGroups) -> None:
    none = table.select([])
    assert len(group_sizes(none)) == len(group_sizes([])) == 0
    assert len(largest_ids(none)) == len(largest_ids([])) == len(prompt_keys([])) == 0


def test_other_processes_open_the_file(table: CachedGroups, plain: list[Group]) -> None:
    view = table.select([8, 2])
    assert len(pickle.dumps(view)) < 1000
    assert [g.name for g in pickle.loads(pickle.dumps(view))] == [plain[8].name, plain[2].name]
    loader = DataLoader(table, batch_size=None, num_workers=1)  # type: ignore[arg-type]
    assert all(map(same, loader, plain))


def test_a_file_that_is_not_whole_is_no_table(table: CachedGroups, tmp_path: Path) -> None:
    path = tmp_path / "groups-1.arrow"
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) * 2 // 3])
    with pytest.raises((OSError, pa.ArrowInvalid)):
        CachedGroups(tmp_path, "file")


def test_the_digest_tells_tokens_and_their_order(
    table: CachedGroups, plain: list[Group], tmp_path: Path
) -> None:
    for groups in (table, plain):
        backwards = range(len(groups))[::-1]
        digests = [tokens_digest(select(groups, index)) for index in (range(56), backwards)]
        assert len({tokens_digest(groups), *digests}) == 3
        assert tokens_digest(select(groups, backwards)) == digests[1]
    assert tokens_digest(pickle.loads(pickle.dumps(table))) == tokens_digest(table)
    # Another cache entry, and the same one with other content.
    moved = tmp_path / "another entry"
    moved.mkdir()
    for file in tmp_path.glob("*.arrow"):
        shutil.copy(file, moved)
    first = tokens_digest(CachedGroups(moved, "file"))
    write(moved / "groups-1.arrow", [([1], [[2]], [1.0], 1)])
    second = tokens_digest(CachedGroups(moved, "file"))
    assert len({tokens_digest(table), first, second}) == 3
