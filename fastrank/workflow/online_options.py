"""Options of online training, on top of those of ``fastrank train``."""

from __future__ import annotations

from typing import Literal

from fastrank.errors import InputError
from fastrank.options import Decoding, RewardModelOptions
from fastrank.options.declare import change, check_least, option, options
from fastrank.training.run_options import TrainOptions


@options
class OnlineTrainOptions(TrainOptions, RewardModelOptions):
    """Train a causal language model to rank responses: those of ranked records, or with
    --online_every those that the model itself draws to prompts."""

    reward: str | None = change("Reward of online training: FILE.py:function or a model.")
    online_every: int | None = option(
        "Online training: sample anew from the model every so many steps.", default=None
    )
    online_prompts: str | None = option(
        "Prompts of online training; responses in them are stored candidates.", default=None
    )
    online_responses: int = option("Fresh candidates of each prompt, less duplicates.", default=6)
    online_stored: int = option(
        "Most stored candidates of each prompt beside them: best, worst, spread.", default=0
    )
    online_max_new_tokens: int = option("Longest fresh candidate in tokens.", default=256)
    online_temperature: float | None = option("Sampling temperature (default: 1).", default=None)
    online_top_p: float | None = option(
        "Probability mass to sample from (default: 1).", default=None
    )
    online_batch_size: int = option("Prompts sampled at once. Part of the seed.", default=16)
    online_perplexity: bool = option(
        "Report the samples' perplexity under the reference model, which is then held beside the "
        "one that is trained.",
        default=True,
    )
    kl_weight: float = option(
        "Penalty towards --reference_model: the reward loses this times the response's "
        "log-probability under the trained model less that under the reference.",
        default=0.0,
    )
    kl_reduction: Literal["mean", "sum"] = option(
        "Log-probabilities of the penalty as the mean over a response's tokens, or their sum, "
        "which favours short responses.",
        default="mean",
    )

    def _check_source(self) -> None:
        if self.online_every is None:
            for name in ("online_prompts", "reward", "kl_weight"):
                if getattr(self, name):
                    raise InputError(
                        f"--{name} belongs to online training: give --online_every too"
                    )
            super()._check_source()
            return
        for name in ("model", "online_prompts", "reward"):
            if getattr(self, name) is None:
                raise InputError(f"--online_every needs --{name}, got none")
        if self.data is not None:
            raise InputError(
                "--data does not go with --online_every: give stored candidates as responses of "
                "--online_prompts, and their number by --online_stored"
            )
        if self.quantized:
            raise InputError("--online_every samples from a whole model, got a quantised one")
        check_least(self, online_every=1, online_stored=0, online_batch_size=1)
        if not 0 <= self.kl_weight < float("inf"):
            raise InputError(f"kl_weight must be at least 0, got {self.kl_weight}")
        _ = self.decoding

    @property
    def decoding(self) -> Decoding:
        """How fresh candidates are drawn."""
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
