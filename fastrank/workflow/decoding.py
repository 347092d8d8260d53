"""How responses are drawn from a policy: the options, checked before a model is loaded.

The strategies are those of the RRHF paper's data: nucleus sampling, beam search, and diverse beam
search. A model's own generation defaults (``generation_config.json``) are not used beyond its
special tokens: with another top-k or repetition penalty slipped in, the samples would not be those
of the policy that is trained.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastrank.errors import InputError

STRATEGIES = ("top_p", "beam", "diverse_beam")


@dataclass(frozen=True)
class Decoding:
    """One way of drawing responses.

    Attributes:
        strategy: ``"top_p"`` samples; ``"beam"`` takes the ends of one beam search;
            ``"diverse_beam"`` runs groups of beams that avoid each other's tokens.
        num_responses: responses a prompt; the number of beams for both beam searches.
        max_new_tokens: longest response in tokens.
        top_p: sample from the smallest set of tokens with this probability mass; 1 is all of them.
        temperature: of sampling.
        num_beam_groups: groups of ``"diverse_beam"``, a divisor of ``num_responses`` (default: as
            many, so one beam each).
        diversity_penalty: what a token loses, in log-probability, for each beam of an earlier group
            that took it at the same step.
        stop: texts that end a response and are cut from it.

    Raises:
        InputError: a value out of range, or one that the strategy does not use.
    """

    strategy: str = "top_p"
    num_responses: int = 6
    max_new_tokens: int = 256
    top_p: float | None = None
    temperature: float | None = None
    num_beam_groups: int | None = None
    diversity_penalty: float | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            expected = ", ".join(STRATEGIES)
            raise InputError(f"strategy must be one of {expected}, got '{self.strategy}'")
        for name in ("num_responses", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        self._only("top_p", "top_p", "temperature")
        self._only("diverse_beam", "num_beam_groups", "diversity_penalty")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise InputError(f"temperature must be above 0, got {self.temperature}")
        if self.diversity_penalty is not None and not 0 <= self.diversity_penalty < float("inf"):
            raise InputError(f"diversity_penalty must be at least 0, got {self.diversity_penalty}")
        groups = self.num_beam_groups
        if groups is not None and (groups < 1 or self.num_responses % groups):
            raise InputError(
                f"num_beam_groups must divide num_responses={self.num_responses}, got {groups}"
            )
        if any(not text for text in self.stop):
            raise InputError("stop must be texts with a character, got an empty one")

    def _only(self, strategy: str, *names: str) -> None:
        for name in names:
            if self.strategy != strategy and getattr(self, name) is not None:
                raise InputError(f"{name} belongs to strategy {strategy}, got {self.strategy}")
