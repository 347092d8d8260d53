"""Prompts with their candidates as a page shows them: texts, rewards, a model's scores.

A run keeps its held-out prompts in ``held_out.jsonl``: the texts, their rewards, and the model's
scores before and after. The file is what the report is made from, and a resumed run finds in it the
scores from before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrank.data.fields import Message, as_turns
from fastrank.data.write import atomic_path
from fastrank.metrics import pairwise_accuracy
from fastrank.visual.html import escape

if TYPE_CHECKING:
    from fastrank.data.group import Group
    from fastrank.data.records import Record

FILE = "held_out.jsonl"
MOST = 200  # prompts that are kept, evenly spread
_LONGEST = 4000  # characters of a text that a page shows


@dataclass(frozen=True)
class ShownGroup:
    """One prompt and its n candidates.

    Attributes:
        prompt: text.
        responses: n texts.
        rewards: n numbers, higher is better; None where a candidate has none.
        before: n scores of the model before training.
        after: n scores afterwards.
        name: where the prompt comes from.
    """

    prompt: str
    responses: list[str]
    rewards: list[float | None]
    before: list[float | None] | None = None
    after: list[float | None] | None = None
    name: str = ""


class SpreadSample:
    """At most `MOST` groups, evenly spread over a stream whose length is not known: every so many,
    and twice as far apart whenever there are too many.

    Attributes:
        groups: those that were kept.
        total: number of groups that were seen.
    """

    def __init__(self) -> None:
        self.groups: list[ShownGroup] = []
        self.total = 0
        self._every = 1

    def add(self, make: Callable[[], ShownGroup]) -> None:
        """See a group, which is made if it is kept."""
        if self.total % self._every == 0:
            if len(self.groups) == MOST:
                del self.groups[1::2]
                self._every *= 2
            if self.total % self._every == 0:
                self.groups.append(make())
        self.total += 1


def of_record(record: Record, source: str) -> ShownGroup:
    """A record of a data file."""
    prompt = record.prompt if isinstance(record.prompt, str) else _as_text(record.prompt)
    responses = [
        said if isinstance(said, str) else _as_text(as_turns(said))
        for said in record.turns or record.responses
    ]
    name = f"{Path(source).name}:{record.line}"
    return ShownGroup(prompt, responses, list(record.scores), name=name)


def _as_text(turns: Sequence[Message]) -> str:
    """Messages with all of their fields."""
    made = []
    for turn in turns:
        rest = {key: value for key, value in turn.items() if key not in ("role", "content")}
        more = f"\n{json.dumps(rest, ensure_ascii=False, default=str)}" if rest else ""
        made.append(f"{turn['role']}: {turn['content']}{more}")
    return "\n\n".join(made)


def decoded_groups(groups: Sequence[Group], tokenizer: Any) -> list[ShownGroup]:
    """Groups as texts, of which `chosen_positions` are kept."""
    made = []
    for position in chosen_positions(len(groups)):
        group = groups[position]
        prompt = tokenizer.decode(group.prompt_ids.tolist())
        responses = []
        for ids in group.response_ids:
            # Alone, a response would lose the space that some tokenizers have in its first token.
            whole = tokenizer.decode([*group.prompt_ids.tolist(), *ids.tolist()])
            alone = tokenizer.decode(ids.tolist())
            responses.append(whole[len(prompt) :] if whole.startswith(prompt) else alone)
        rewards: list[float | None] = [float(reward) for reward in group.rewards]
        made.append(ShownGroup(prompt, responses, rewards, name=group.name or ""))
    return made


def chosen_positions(count: int) -> list[int]:
    """At most `MOST` of so many prompts, evenly spread."""
    kept = min(count, MOST)
    return [i * count // kept for i in range(kept)]


def with_scores(groups: Sequence[ShownGroup], **scores: Sequence[Any] | None) -> list[ShownGroup]:
    """The groups with the scores ``before`` or ``after``, one array per group."""
    made = list(groups)
    for name, values in scores.items():
        if values is not None:
            fields: list[dict[str, Any]] = [{name: _finite(own)} for own in values]
            made = [replace(group, **own) for group, own in zip(made, fields, strict=True)]
    return made


def write_groups(groups: Iterable[ShownGroup], path: Path) -> None:
    """Write JSON lines; the file is replaced when it is complete."""
    with atomic_path(path) as partial:
        partial.write_text("".join(f"{json.dumps(asdict(g))}\n" for g in groups), encoding="utf-8")


def read_groups(path: Path) -> list[ShownGroup]:
    """The groups of a file of `write_groups`; none if there is no such file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [ShownGroup(**json.loads(line)) for line in lines]


def groups_section(groups: Sequence[ShownGroup]) -> list[str]:
    """The groups as HTML, the first three open, with buttons to choose among them."""
    changes = [_change(group) for group in groups]
    buttons = ['<button data-show="all" aria-pressed="true">all</button>']
    if any(change is not None for change in changes):
        buttons += [f'<button data-show="{x}">got {x}</button>' for x in ("better", "worse")]
    made = [
        f'<div class="controls">{"".join(buttons)}<input type="search" placeholder="search">'
        '<span class="soft" id="count"></span></div>'
    ]
    for number, (group, change) in enumerate(zip(groups, changes, strict=True)):
        made.append(_group(group, change, opened=number < 3))
    return made


def _group(group: ShownGroup, change: float | None, opened: bool) -> str:
    title = " ".join(group.prompt.split())
    title = escape(title if len(title) < 110 else f"{title[:50]} … {title[-55:]}")
    said = []
    for name, scores in (("before", group.before), ("after", group.after)):
        accuracy = _accuracy(group, scores)
        if accuracy is not None:
            said.append(f"{accuracy:.0%} of the pairs in order {name}")
    orders = [
        _order(group, f"{name} training, by the model's score", scores)
        for name, scores in (("before", group.before), ("after", group.after))
        if scores is not None
    ]
    orders = orders or [_order(group, "by reward", group.rewards)]
    return (
        f'<details data-change="{change or 0:.6g}"{" open" if opened else ""}>'
        f'<summary><b>{title}</b> <span class="soft">{escape(group.name)} '
        f"{', '.join(said)}</span></summary>"
        f'<div class="prompt">{escape(_cut(group.prompt))}</div>'
        f'<div class="orders">{"".join(orders)}</div></details>'
    )


def _order(group: ShownGroup, title: str, scores: Sequence[float | None]) -> str:
    """The candidates in falling order of ``scores``, coloured by reward."""
    known = [reward for reward in group.rewards if reward is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)

    def rank(i: int) -> float:
        score = scores[i]
        return math.inf if score is None else -score

    cards = []
    for i in sorted(range(len(group.responses)), key=rank):
        reward, score = group.rewards[i], scores[i]
        share = 0.5 if reward is None or high == low else (reward - low) / (high - low)
        numbers = f"reward {'none' if reward is None else f'{reward:.4g}'}"
        if scores is not group.rewards:
            numbers += f" · score {'−∞' if score is None else f'{score:.4f}'}"
        cards.append(
            f'<div class="candidate" style="--t:{share:.3f}"><div class="numbers">{numbers}</div>'
            f'<div class="text">{escape(_cut(group.responses[i]))}</div></div>'
        )
    return f"<div><h3>{title}</h3>{''.join(cards)}</div>"


def _accuracy(group: ShownGroup, scores: Sequence[float | None] | None) -> float | None:
    if scores is None or None in group.rewards:
        return None
    found = pairwise_accuracy([[-math.inf if s is None else s for s in scores]], [group.rewards])
    return None if math.isnan(found) else found


def _change(group: ShownGroup) -> float | None:
    before, after = (_accuracy(group, scores) for scores in (group.before, group.after))
    return None if before is None or after is None else after - before


def _finite(values: Any) -> list[float | None]:
    """JSON has no infinity: a candidate that the model rules out has the score None."""
    return [float(v) if math.isfinite(float(v)) else None for v in values]


def _cut(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    half = _LONGEST // 2
    return f"{text[:half]} … ({len(text) - _LONGEST:,} characters) … {text[-half:]}"
