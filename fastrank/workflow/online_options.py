"""Options of online training, on top of those of ``fastrank train``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastrank.errors import InputError
from fastrank.training.options import TrainOptions
from fastrank.workflow.decoding import Decoding


@dataclass
class OnlineTrainOptions(TrainOptions):
    """`TrainOptions` of a run that may be online; see `fastrank.workflow.online_trainer`.

    With ``online_every`` the prompts take the place of ``data``.
    """

    online_every: int | None = field(
        default=None,
        metadata={"help": "Online training: sample anew from the model every so many steps."},
    )
    online_prompts: str | None = field(
        default=None,
        metadata={"help": "Prompts of online training; responses in them are stored candidates."},
    )
    reward: str | None = field(
        default=None,
        metadata={"help": "Reward of online training: FILE.py:function or a model."},
    )
    reward_kind: Literal["auto", "classifier", "logprob"] = field(
        default="auto", metadata={"help": "What a reward model gives; see fastrank reward."}
    )
    reward_batch_size: int = field(
        default=32, metadata={"help": "Responses at once in a sequence classifier."}
    )
    online_responses: int = field(
        default=6, metadata={"help": "Fresh candidates of each prompt, less duplicates."}
    )
    online_stored: int = field(
        default=0,
        metadata={
            "help": "Most stored candidates of each prompt beside them: best, worst, spread."
        },
    )
    online_max_new_tokens: int = field(
        default=256, metadata={"help": "Longest fresh candidate in tokens."}
    )
    online_temperature: float | None = field(
        default=None, metadata={"help": "Sampling temperature (default: 1)."}
    )
    online_top_p: float | None = field(
        default=None, metadata={"help": "Probability mass to sample from (default: 1)."}
    )
    online_batch_size: int = field(
        default=16, metadata={"help": "Prompts sampled at once. Part of the seed."}
    )
    online_perplexity: bool = field(
        default=True,
        metadata={
            "help": "Report the samples' perplexity under the reference model, which is then held "
            "beside the one that is trained."
        },
    )
    kl_weight: float = field(
        default=0.0,
        metadata={
            "help": "Penalty towards --reference_model: the reward loses this times the response's "
            "log-probability under the trained model less that under the reference."
        },
    )
    kl_reduction: Literal["mean", "sum"] = field(
        default="mean",
        metadata={
            "help": "Log-probabilities of the penalty as the mean over a response's tokens, or "
            "their sum, which favours short responses."
        },
    )

    def __post_init__(self) -> None:
        if self.online_every is None:
            self._refuse_without_online()
            super().__post_init__()
            return
        for name in ("model", "online_prompts", "reward"):
            if getattr(self, name) is None:
                raise InputError(f"--online_every needs --{name}, got none")
        if self.data is not None:
            raise InputError(
                "--data does not go with --online_every: give stored candidates as responses of "
                "--online_prompts, and their number by --online_stored"
            )
        for name, least in (
            ("online_every", 1),
            ("online_stored", 0),
            ("online_batch_size", 1),
            ("reward_batch_size", 1),
        ):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.kl_weight < float("inf"):
            raise InputError(f"kl_weight must be at least 0, got {self.kl_weight}")
        _ = self.decoding

    def _refuse_without_online(self) -> None:
        for name in ("online_prompts", "reward", "kl_weight"):
            if getattr(self, name):
                raise InputError(f"--{name} belongs to online training: give --online_every too")

    @property
    def decoding(self) -> Decoding:
        return Decoding(
            num_responses=self.online_responses,
            max_new_tokens=self.online_max_new_tokens,
            top_p=self.online_top_p,
            temperature=self.online_temperature,
        )

    @property
    def needs_reference(self) -> bool:
        """Whether the reference model is held in memory."""
        return self.online_perplexity or self.kl_weight > 0
