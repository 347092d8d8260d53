"""The candidates of a round of online training: in memory, in a file, and as figures to log."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fastrank.data.fields import end_names
from fastrank.data.write import atomic_path
from fastrank.errors import InputError
from fastrank.workflow.items import PromptItem


@dataclass(frozen=True)
class RoundCandidates:
    """The candidates of one prompt in a round, fresh ones first.

    Attributes:
        index: the prompt's position in the file of prompts.
        responses: texts.
        ended: whether each came to its end.
        fresh: whether the model drew it in this round.
        rewards: as the reward gave them.
        scores: rewards less the penalty, as trained on.
        log_ratios: log π − log ρ of each response; 0 where no reference is held.
        reference_logprobs: log ρ of each response.
        num_tokens: tokens of each response, its end included.
    """

    index: int
    responses: list[str]
    ended: list[bool]
    fresh: list[bool]
    rewards: list[float]
    scores: list[float]
    log_ratios: list[float]
    reference_logprobs: list[float]
    num_tokens: list[int]


@dataclass(frozen=True)
class Round:
    """The candidates that a round's steps train on."""

    number: int
    step: int
    candidates: list[RoundCandidates]
    duplicates: int = 0
    empty: int = 0

    def write(self, path: Path, items: Sequence[PromptItem]) -> None:
        """Write canonical records, one prompt per line, after a line about the round."""
        about = {"round": self.number, "step": self.step, "duplicates": self.duplicates}
        lines = [json.dumps({**about, "empty": self.empty})]
        for own in self.candidates:
            row = {
                "prompt": items[own.index].prompt,
                **asdict(own),
                "ended": end_names(own.ended),
            }
            lines.append(json.dumps(row, ensure_ascii=False))
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as file:
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Round:
        """Read a round that `write` wrote.

        Raises:
            InputError: the file is not there or not whole.
        """
        names = set(RoundCandidates.__dataclass_fields__)
        try:
            # Not splitlines: a response may hold U+2028 and other ends of a line.
            lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
            first, *rest = map(json.loads, lines)
            rows = [
                RoundCandidates(
                    **{k: v for k, v in row.items() if k in names}
                    | {"ended": [name == "stop" for name in row["ended"]]}
                )
                for row in rest
            ]
            return cls(first["round"], first["step"], rows, first["duplicates"], first["empty"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{path}: the candidates of the round to be resumed cannot be read "
                f"({type(error).__name__}); resume from the checkpoint of an earlier round"
            ) from error


def round_metrics(drawn: Round, *, with_reference: bool) -> dict[str, float]:
    """Metrics of a round to log, over its fresh responses."""
    fresh = [
        values
        for own in drawn.candidates
        for is_fresh, *values in zip(
            own.fresh,
            own.rewards,
            own.log_ratios,
            own.reference_logprobs,
            own.num_tokens,
            own.ended,
            strict=True,
        )
        if is_fresh
    ]
    values = {
        "online/round": float(drawn.number),
        "online/responses": float(len(fresh)),
        "online/duplicates": float(drawn.duplicates),
        "online/empty": float(drawn.empty),
    }
    if not fresh:
        return values
    rewards, ratios, logprobs, tokens, ended = zip(*fresh, strict=True)
    count = len(fresh)
    mean = math.fsum(rewards) / count
    values |= {
        "online/reward": mean,
        "online/reward_std": math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / count),
        "online/response_tokens": sum(tokens) / count,
        "online/ended": sum(ended) / count,
    }
    if with_reference:
        values["online/kl"] = math.fsum(ratios) / count
        values["online/perplexity"] = math.exp(min(-math.fsum(logprobs) / sum(tokens), 700.0))
    return values


def round_line(values: dict[str, float], step: int) -> str:
    """One readable line for what `round_metrics` gives.

    >>> round_line({"online/round": 2.0, "online/reward": 0.5, "online/reward_std": 1.0}, 8)
    'round 2 at step 8:  reward 0.5 ± 1'
    """
    parts = [f"round {values['online/round']:.0f} at step {step}:"]
    if "online/reward" in values:
        parts.append(f"reward {values['online/reward']:.4g} ± {values['online/reward_std']:.2g}")
    for key in ("perplexity", "kl", "duplicates", "empty"):
        if values.get(f"online/{key}"):
            parts.append(f"{key} {values[f'online/{key}']:.4g}")
    return "  ".join(parts)
