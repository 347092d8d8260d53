"""The table at the end of a run: every split before and after training."""

from __future__ import annotations

from collections.abc import Mapping

_ROWS = (
    ("loss", "loss"),
    ("rank_loss", "ranking term"),
    ("sft_loss", "supervised term"),
    ("rewards/accuracies", "pairwise accuracy"),
    ("rank/kendall_tau", "Kendall tau-b"),
    ("rank/ndcg", "NDCG"),
    ("rank/mrr", "MRR"),
    ("rank/top1", "top-1 accuracy"),
)

Values = Mapping[str, float]


def summary_table(splits: Mapping[str, tuple[Values | None, Values]]) -> str:
    """Rows of metrics, two columns a split; a split's first values may be unknown (None).

    >>> print(summary_table({"held out": ({"loss": 2.0}, {"loss": 0.5})}))
                       held out
                       before    after
    loss                2.0000   0.5000
    """
    label = max(len(text) for _, text in _ROWS)
    header = [" " * label, " " * label]
    for name in splits:
        header[0] += f"  {name:<16}"
        header[1] += f"  {'before':<6}   {'after':>6}"
    lines = [header[0].rstrip(), header[1].rstrip()]
    for key, text in _ROWS:
        cells = [
            (_number(None if before is None else before.get(key)), _number(after.get(key)))
            for before, after in splits.values()
        ]
        if any(value.strip() != "-" for pair in cells for value in pair):
            lines.append(f"{text:<{label}}" + "".join(f"  {a}  {b}" for a, b in cells))
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return f"{'-':>7}" if value is None else f"{value:7.4f}"
