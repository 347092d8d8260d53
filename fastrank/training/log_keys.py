"""Every value that a run logs, under its one name.

The console, ``metrics.jsonl``, the table of before and after, ``summary.json``, ``report.html``,
trackers and ``metric_for_best_model`` use these names, which are TRL's where it has them. Values of
an evaluation have the data set's name before them (``eval_``). ``docs/log-keys.md`` is made from
this table: ``python -m fastrank.training.log_keys``.
"""

from __future__ import annotations

from typing import NamedTuple


class LogKey(NamedTuple):
    """A logged value."""

    name: str
    form: str
    """How it is written for people."""
    meaning: str
    of: str = "both"
    """Of a ``training`` step, an ``evaluation``, ``both``, or an ``online`` round."""
    in_line: bool = False
    """Whether the console shows it."""
    aliases: tuple[str, ...] = ()
    """Other spellings that ``metric_for_best_model`` takes: earlier versions' own."""


_LINE, _EVALUATION = True, "evaluation"
LOG_KEYS = (
    LogKey("loss", "{:.4f}", "`rank_loss + sft_loss`, the mean over prompts", "both", _LINE),
    LogKey("rank_loss", "{:.4f}", "the ranking term", "both", _LINE, ("rank",)),
    LogKey("sft_loss", "{:.4f}", "the supervised term with its weight", "both", _LINE, ("sft",)),
    LogKey(
        "rewards/accuracies",
        "{:.3f}",
        "share of the pairs with different rewards that the model's (as in `rewards/chosen`) order "
        "the same way, the mean over prompts; a tie counts one half",
        "both",
        _LINE,
        ("accuracy", "pairwise_accuracy", "ranking_accuracy"),
    ),
    LogKey(
        "rewards/margins", "{:+.3f}", "`rewards/chosen - rewards/rejected`", "both", _LINE,
        ("margin",),
    ),
    LogKey(
        "rewards/chosen",
        "{:.3f}",
        "the model's reward of the best candidate: its score, or with a reference β(s − s_ref)",
    ),
    LogKey("rewards/rejected", "{:.3f}", "the mean of the other candidates'"),
    LogKey("logps/chosen", "{:.3f}", "the model's own score of the best candidate"),
    LogKey("logps/rejected", "{:.3f}", "the mean of the other candidates'"),
    LogKey(
        "rank/kendall_tau", "{:+.3f}", "Kendall's τ-b of the model's own scores and the rewards",
        aliases=("tau", "kendall_tau"),
    ),
    LogKey(
        "rank/top1", "{:.3f}", "share of the prompts whose best candidate scores highest",
        aliases=("top1", "top1_accuracy"),
    ),
    LogKey("rank/ndcg", "{:.3f}", "normalised discounted cumulative gain", _EVALUATION,
           aliases=("ndcg",)),
    LogKey("rank/mrr", "{:.3f}", "reciprocal rank of the best candidate", _EVALUATION,
           aliases=("mrr",)),
    LogKey(
        "entropy", "{:.3f}", "mean entropy, in nats, of the model's next-token distributions over "
        "the responses; with `eval_token_statistics`", _EVALUATION, _LINE,
    ),
    LogKey(
        "mean_token_accuracy", "{:.3f}", "share of the response tokens that are the model's most "
        "likely ones; with `eval_token_statistics`", _EVALUATION, _LINE,
    ),
    LogKey("grad_norm", "{:.3g}", "norm of the gradient before it is clipped", "training", _LINE,
           ("grad",)),
    LogKey("learning_rate", "{:.2e}", "of the step", "training", _LINE, ("lr",)),
    LogKey("num_tokens", "{:,.0f}", "tokens computed since training began, over all processes; a "
           "shared prompt counts once", "training"),
    LogKey("tokens_per_second", "{:,.0f}", "of these, over all processes", "training", _LINE,
           ("tok/s",)),
    LogKey("live_fraction", "{:.2f}", "share of the response tokens with a gradient", "training",
           aliases=("live",)),
    LogKey("shared_prompt_ratio", "{:.2f}", "tokens of all sequences by themselves, over those "
           "computed", "training"),
    LogKey("backprop_fraction", "{:.2f}", "two phases: share of the tokens that were "
           "back-propagated", "training"),
    LogKey("work_saved", "{:.2f}", "two phases: share of the work saved, against joint training "
           "with gradient checkpointing", "training"),
    LogKey("skipped_records", "{:.0f}", "records left out because of numbers that are not finite",
           "both", _LINE, ("skipped",)),
    LogKey("online/round", "{:.0f}", "number of the round", "online"),
    LogKey("online/responses", "{:.0f}", "fresh samples", "online"),
    LogKey("online/duplicates", "{:.0f}", "samples left out because they occur twice", "online"),
    LogKey("online/empty", "{:.0f}", "samples left out because they are empty", "online"),
    LogKey("online/reward", "{:.4g}", "mean reward of the fresh samples", "online"),
    LogKey("online/reward_std", "{:.2g}", "its standard deviation", "online"),
    LogKey("online/response_tokens", "{:.1f}", "mean length of the fresh samples", "online"),
    LogKey("online/ended", "{:.2f}", "share that ended before the limit", "online"),
    LogKey("online/kl", "{:.3f}", "mean log-ratio to the reference", "online"),
    LogKey("online/perplexity", "{:.3g}", "under the reference", "online"),
)  # fmt: skip
#: Values that only ``eval_token_statistics`` gives.
TOKEN_STATISTICS = ("entropy", "mean_token_accuracy")
BY_NAME = {key.name: key for key in LOG_KEYS}
#: Other spellings, and the names that they stand for.
ALIASES = {alias: key.name for key in LOG_KEYS for alias in key.aliases}


def canonical_name(name: str) -> str:
    """The one spelling of a logged value's name, with its data set's prefix if it has one.

    >>> canonical_name("eval_accuracy"), canonical_name("tau"), canonical_name("eval_own")
    ('eval_rewards/accuracies', 'rank/kendall_tau', 'eval_own')
    """
    prefix, bare = ("eval_", name[5:]) if name.startswith("eval_") else ("", name)
    return prefix + ALIASES.get(bare, bare)


def as_markdown() -> str:
    """The page of the documentation."""
    lines = [
        "# Log keys",
        "",
        "One name for each value, on the console, in `metrics.jsonl`, `summary.json` and",
        "`report.html`, for trackers and for `metric_for_best_model`. The values of an evaluation",
        "begin with the data set's name, `eval_`; those of the share of the training set that",
        "`fastrank train` evaluates with `train_split_`.",
        "",
        "| key | of | meaning | also taken |",
        "| --- | --- | --- | --- |",
    ]
    for key in LOG_KEYS:
        of = {"both": "steps, evaluations", "training": "steps"}.get(key.of, f"{key.of}s")
        of = {"onlines": "online rounds"}.get(of, of)
        also = ", ".join(f"`{alias}`" for alias in key.aliases)
        lines.append(f"| `{key.name}` | {of} | {key.meaning} | {also} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(as_markdown(), end="")
