"""Counts of the records read, kept, dropped and truncated.

One `Report` travels with a file through reading and tokenising, and each stage counts in it. It
keeps counters and line numbers, never the records, so that it stays small beside a large file; the
price is that the reward range is of the rewards as read, before anything is normalised or dropped
for its tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

#: Reasons for dropping a whole record.
FEW_CANDIDATES = "fewer than {minimum} candidates"
NO_PROMPT = "no prompt"
#: Reasons for dropping one candidate.
EMPTY_RESPONSE = "empty response"
NO_TURN = "no turn of the assistant"
NO_SCORE = "no score"
NO_RANKED = "no token of the assistant left by truncation"
AS_ANOTHER = "same tokens as a candidate of another reward"
BEYOND_MAXIMUM = "beyond max_candidates"
WITH_RECORD = "in a dropped record"
#: What is counted of candidates and pairs that are used.
CUT_SAMPLE = "responses cut at a limit when they were made: no end is taught"
SAME_PAIRS = "pairs of different rewards and the same tokens: they teach nothing"
CUT_EQUAL = "pairs of different rewards that truncation made equal"
#: What is said of a record that is used.
NOT_TAUGHT = "sft_index is not the best candidate: the best one is taught"

_LINES_SHOWN = 5


def strict_pairs(scores: Sequence[float]) -> tuple[int, int]:
    """(pairs with a strict order, pairs tied) among the ``n(n-1)/2`` pairs of one group."""
    n = len(scores)
    tied = sum(k * (k - 1) // 2 for k in Counter(scores).values())
    return n * (n - 1) // 2 - tied, tied


@dataclass
class Report:
    """Counts of one file; ``read == kept + dropped`` for records and for candidates at all times.

    Every dropped thing has exactly one reason. Line numbers are 1-based lines of a JSONL file, or
    record numbers of any other kind of file; a reason's list may name a line several times when
    several of its candidates were dropped.
    """

    name: str = ""
    format: str = ""
    read: int = 0
    candidates_read: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    dropped_candidates: dict[str, list[int]] = field(default_factory=dict)
    truncated: dict[str, list[int]] = field(default_factory=dict)
    forced_boundaries: list[int] = field(default_factory=list)
    notes: dict[str, list[int]] = field(default_factory=dict)
    counts: dict[str, list[int]] = field(default_factory=dict)
    reward_min: float | None = None
    reward_max: float | None = None
    pairs: int = 0
    tied_pairs: int = 0
    all_tied: int = 0
    _sizes: Counter[int] = field(default_factory=Counter)

    @property
    def kept(self) -> int:
        """Records that are still in."""
        return self.read - sum(len(lines) for lines in self.dropped.values())

    @property
    def candidates_kept(self) -> int:
        """Candidates of the records that are still in."""
        return self.candidates_read - sum(len(x) for x in self.dropped_candidates.values())

    @property
    def candidates_per_group(self) -> dict[int, int]:
        """How many kept groups have n candidates, by n."""
        return dict(sorted(self._sizes.items()))

    def add_read(self, num_candidates: int) -> None:
        """One more record, with as many candidates as the file gives it."""
        self.read += 1
        self.candidates_read += num_candidates

    def drop_candidate(self, reason: str, line: int, count: int = 1) -> None:
        """Leave out ``count`` candidates of a record that itself stays (for now)."""
        if count:
            self.dropped_candidates.setdefault(reason, []).extend([line] * count)

    def drop_record(self, reason: str, line: int, num_candidates: int) -> None:
        """Leave out a record with its ``num_candidates`` candidates not yet counted as dropped."""
        self.dropped.setdefault(reason, []).append(line)
        self.drop_candidate(WITH_RECORD, line, num_candidates)

    def keep(self, scores: Sequence[float]) -> None:
        """A record has passed the reader with these rewards (ranks already turned round)."""
        self._count(scores, 1)
        low, high = min(scores), max(scores)
        self.reward_min = low if self.reward_min is None else min(self.reward_min, low)
        self.reward_max = high if self.reward_max is None else max(self.reward_max, high)

    def rescore(self, before: Sequence[float], after: Sequence[float]) -> None:
        """The rewards of a record that `keep` had counted have changed at a later stage."""
        self._count(before, -1)
        self._count(after, 1)

    def drop_kept(
        self, reason: str, line: int, scores: Sequence[float], num_candidates: int | None = None
    ) -> None:
        """Leave out, at a later stage, a record that `keep` had counted, and those of its
        candidates (by default all) that are not yet counted as dropped."""
        self._count(scores, -1)
        self.drop_record(reason, line, len(scores) if num_candidates is None else num_candidates)

    def _count(self, scores: Sequence[float], sign: int) -> None:
        strict, tied = strict_pairs(scores)
        self.pairs += sign * (strict + tied)
        self.tied_pairs += sign * tied
        self.all_tied += sign * (strict == 0)
        self._sizes[len(scores)] += sign
        if not self._sizes[len(scores)]:
            del self._sizes[len(scores)]

    def truncate(self, what: str, line: int) -> None:
        """A prompt or a response ("prompt" | "response") of the record was cut to a length."""
        self.truncated.setdefault(what, []).append(line)

    def note(self, what: str, line: int) -> None:
        """Something is to be said of a record that is used."""
        self.notes.setdefault(what, []).append(line)

    def count(self, what: str, line: int, number: int = 1) -> None:
        """``number`` candidates or pairs of a record that is used, of which something is said."""
        if number:
            self.counts.setdefault(what, []).extend([line] * number)

    def merge(self, later: Report) -> None:
        """Add what was counted of a later part of the same file."""
        self.read += later.read
        self.candidates_read += later.candidates_read
        for name in ("dropped", "dropped_candidates", "truncated", "notes", "counts"):
            mine = getattr(self, name)
            for reason, lines in getattr(later, name).items():
                mine.setdefault(reason, []).extend(lines)
        self.forced_boundaries.extend(later.forced_boundaries)
        if later.reward_min is not None and later.reward_max is not None:
            low, high = self.reward_min, self.reward_max
            self.reward_min = later.reward_min if low is None else min(low, later.reward_min)
            self.reward_max = later.reward_max if high is None else max(high, later.reward_max)
        self.pairs += later.pairs
        self.tied_pairs += later.tied_pairs
        self.all_tied += later.all_tied
        self._sizes.update(later._sizes)

    def state(self) -> dict[str, Any]:
        """All of it as JSON types, for `from_state`; `as_dict` is the one for people."""
        return vars(self) | {"_sizes": sorted(self._sizes.items())}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Report:
        """The report that gave ``state``."""
        return cls(**(state | {"_sizes": Counter(dict(state["_sizes"]))}))

    def as_dict(self) -> dict[str, Any]:
        """Everything counted, as JSON types; reasons map to ``{"count", "lines"}``."""

        def counted(lines: list[int]) -> dict[str, Any]:
            return {"count": len(lines), "lines": sorted(set(lines))}

        return {
            "file": self.name,
            "format": self.format,
            "records": {
                "read": self.read,
                "kept": self.kept,
                "dropped": {k: counted(v) for k, v in self.dropped.items()},
            },
            "candidates": {
                "read": self.candidates_read,
                "kept": self.candidates_kept,
                "dropped": {k: counted(v) for k, v in self.dropped_candidates.items()},
            },
            "truncated": {k: counted(v) for k, v in self.truncated.items()},
            "forced_boundaries": counted(self.forced_boundaries),
            "notes": {k: counted(v) for k, v in self.notes.items()},
            "counts": {k: counted(v) for k, v in self.counts.items()},
            "candidates_per_group": {str(n): k for n, k in self.candidates_per_group.items()},
            "ties": {
                "pairs": self.pairs,
                "tied_pairs": self.tied_pairs,
                "groups_all_tied": self.all_tied,
            },
            "reward_range": None if self.reward_min is None else [self.reward_min, self.reward_max],
        }

    def as_text(self) -> str:
        """The same for a person: a few lines, each list of line numbers cut after five."""
        out = [f"{self.name}: format {self.format or 'unknown'}"]
        out.append(f"  records     {self.read} read, {self.kept} kept")
        out += [_reason(k, v, "dropped") for k, v in self.dropped.items()]
        out.append(f"  candidates  {self.candidates_read} read, {self.candidates_kept} kept")
        out += [_reason(k, v, "dropped") for k, v in self.dropped_candidates.items()]
        if self._sizes:
            sizes = self.candidates_per_group
            mean = sum(n * k for n, k in sizes.items()) / sum(sizes.values())
            shown = ", ".join(f"{n}: {k}" for n, k in list(sizes.items())[:12])
            more = ", …" if len(sizes) > 12 else ""
            out.append(
                f"  a group     {min(sizes)} to {max(sizes)} candidates, mean {mean:.2f}"
                f" (groups by size {shown}{more})"
            )
        out.append(
            f"  ties        {self.tied_pairs} of {self.pairs} pairs;"
            f" {self.all_tied} groups without any order"
        )
        if self.reward_min is not None:
            out.append(f"  rewards     {self.reward_min:g} to {self.reward_max:g}")
        out += [_reason(f"{k}s", v, "truncated") for k, v in self.truncated.items()]
        if self.forced_boundaries:
            out.append(
                _reason("prompt and responses tokenised apart", self.forced_boundaries, "records:")
            )
        out += [_reason(k, v, "records:") for k, v in self.notes.items()]
        out += [_reason(k, v) for k, v in self.counts.items()]
        return "\n".join(out)


def _reason(reason: str, lines: list[int], *verb: str) -> str:
    unique = sorted(set(lines))
    shown = ", ".join(map(str, unique[:_LINES_SHOWN]))
    more = f", … {len(unique) - _LINES_SHOWN} more" if len(unique) > _LINES_SHOWN else ""
    return f"    {' '.join([str(len(lines)), *verb, reason])} (line {shown}{more})"
