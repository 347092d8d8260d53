"""Options that several commands share, and what they all print at the end."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class ReadOptions:
    """How a record file is read; the names are those of `fastrank.data.records.read_records`."""

    format: str | None = field(
        default=None,
        metadata={
            "help": "Record format: canonical, rrhf, pro, ultrafeedback, nectar, all_rm_scores, "
            "preference, best_first, flat or unscored (default: recognised by its fields)."
        },
    )
    score_key: str | None = field(
        default=None,
        metadata={"help": "Field that holds the scores, instead of the format's own."},
    )
    max_candidates: int | None = field(
        default=None,
        metadata={
            "help": "Most candidates of a prompt: the best, the worst, and others evenly spaced "
            "by reward between them are kept."
        },
    )
    normalize_rewards: Literal["none", "group"] = field(
        default="none",
        metadata={"help": "group: zero mean and unit deviation within each prompt's candidates."},
    )

    def as_kwargs(self) -> dict[str, Any]:
        """The options as keyword arguments of `read_records` and `load_groups`."""
        return {
            "format": self.format,
            "score_key": self.score_key,
            "max_candidates": self.max_candidates,
            "normalize_rewards": self.normalize_rewards,
        }


@dataclass
class LengthOptions:
    """Limits in tokens; see `fastrank.data.tokenize.TokenizeOptions`."""

    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Most tokens of a prompt; longer ones lose their beginning."},
    )
    max_response_length: int | None = field(
        default=None, metadata={"help": "Most tokens of a response; longer ones lose their end."}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Most tokens of prompt and response together (default: the context)."},
    )
    as_chat: bool = field(
        default=False,
        metadata={"help": "Treat a text prompt as one user message of the chat template."},
    )

    def as_kwargs(self) -> dict[str, Any]:
        """The options as keyword arguments of `TokenizeOptions`."""
        return {
            "max_prompt_length": self.max_prompt_length,
            "max_response_length": self.max_response_length,
            "max_length": self.max_length,
            "as_chat": self.as_chat,
        }


def print_json(result: dict[str, Any]) -> None:
    """One JSON object as the last line on stdout; NaN and infinity, which JSON lacks, as null."""
    print(json.dumps(_finite(result), ensure_ascii=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
