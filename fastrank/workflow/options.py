"""Options that several commands of the workflow share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastrank.errors import InputError
from fastrank.workflow.decoding import Decoding


@dataclass
class ModelOptions:
    """How a model is loaded for inference."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={"help": "Type of the weights; auto: as stored on a GPU, float32 on a CPU."},
    )
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1, ..."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the model."}
    )


@dataclass
class DecodingOptions:
    """How responses are drawn; see `fastrank.workflow.decoding.Decoding`."""

    num_responses: int = field(default=6, metadata={"help": "Responses to draw for each prompt."})
    strategy: Literal["top_p", "beam", "diverse_beam"] = field(
        default="top_p",
        metadata={"help": "Sampling, one beam search, or groups of beams that avoid each other."},
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Longest response in tokens."})
    top_p: float | None = field(
        default=None, metadata={"help": "Probability mass to sample from (default: 1, all of it)."}
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Sampling temperature (default: 1)."}
    )
    num_beam_groups: int | None = field(
        default=None,
        metadata={"help": "Groups of diverse_beam (default: as many as responses)."},
    )
    diversity_penalty: float | None = field(
        default=None,
        metadata={"help": "What a token loses per beam of an earlier group (default: 1)."},
    )
    stop: list[str] = field(
        default_factory=list,
        metadata={"help": "Text that ends a response and is cut from it; may be repeated."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the samples."})
    batch_size: int = field(
        default=16,
        metadata={"help": "Prompts at once, each with all of its responses. Part of the seed."},
    )
    as_chat: bool = field(
        default=False,
        metadata={"help": "Treat a text prompt as one user message of the chat template."},
    )

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {self.batch_size}")
        _ = self.decoding

    @property
    def decoding(self) -> Decoding:
        return Decoding(
            strategy=self.strategy,
            num_responses=self.num_responses,
            max_new_tokens=self.max_new_tokens,
            top_p=self.top_p,
            temperature=self.temperature,
            num_beam_groups=self.num_beam_groups,
            diversity_penalty=self.diversity_penalty,
            stop=tuple(self.stop),
        )
