"""Options that several commands share, each declared once.

Commands compose these classes; see `fastrank.options.declare`. An option of a single command stands
in that command's own class.
"""

from __future__ import annotations

from typing import Literal

from fastrank.errors import InputError
from fastrank.options.declare import Options, change, check_least, option, options


@options
class ModelOptions(Options):
    """Model."""

    model: str | None = option(
        "Model folder or Hub name.", default=None, aliases=["model_name_or_path"]
    )


@options
class TrustOptions(Options):
    """Code that comes with a model."""

    trust_remote_code: bool = option(
        "Run code that comes with the model or its tokenizer.", default=False
    )


@options
class DtypeOptions(Options):
    """Precision."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "Type of the weights; auto: as stored on a GPU, float32 on a CPU.", default="auto"
    )


@options
class DeviceOptions(Options):
    """Device."""

    device: str = option("auto, cpu, cuda, cuda:1, ...", default="auto")


@options
class LoadOptions(DtypeOptions, DeviceOptions, TrustOptions):
    """How a model is loaded for inference."""


@options
class DataOptions(Options):
    """Records."""

    data: str | None = option(
        "Ranked records: JSONL, JSON or Parquet file, folder, or Hub data set.",
        default=None,
        aliases=["dataset_name"],
    )


@options
class FormatOptions(Options):
    """Format of the records."""

    format: str | None = option(
        "Record format (default: by its fields). Lists: canonical, best_first, unscored, "
        "rrhf, rrhf_scored, pro, all_rm_scores, ultrafeedback, nectar, stack_exchange, gpt4_llm. "
        "Pairs: preference (chosen, rejected), ab, arena, stack_pairs, gpt4_llm_pairs, helpsteer2, "
        "helpsteer3, safe_rlhf, shp, webgpt, tldr. One response per row: flat, completions. Trees: "
        "oasst, oasst_trees.",
        default=None,
    )
    columns: str | None = option(
        "Names of the file's fields, e.g. prompt=question,system=role; an empty name (context=) "
        "leaves a field out.",
        default=None,
    )


@options
class ReadOptions(FormatOptions):
    """How ranked records are read; the names are those of `fastrank.data.records.read_records`."""

    score_key: str | None = option(
        "Field that holds the scores, instead of the format's own; or several with weights: "
        '\'{"helpfulness": 0.7, "safety": 0.3}\'.',
        default=None,
    )
    max_candidates: int | None = option(
        "Most candidates of a prompt: the best, the worst, and others evenly spaced by reward "
        "between them are kept.",
        default=None,
    )
    normalize_rewards: Literal["none", "group"] = option(
        "group: zero mean and unit deviation within each prompt's candidates.", default="none"
    )


@options
class LengthOptions(Options):
    """Limits in tokens; see `fastrank.data.tokenize.TokenizeOptions`."""

    max_prompt_length: int | None = option(
        "Most tokens of a prompt; longer ones lose their beginning.", default=None
    )
    max_response_length: int | None = option(
        "Most tokens of a response; longer ones lose their end.", default=None
    )
    max_length: int | None = option(
        "Most tokens of prompt and response together (default: the context).", default=None
    )


@options
class ChatOptions(Options):
    """Chat templates."""

    as_chat: bool = option(
        "Treat a text prompt as one user message of the chat template.", default=False
    )


@options
class TemplateOptions(ChatOptions):
    """Chat templates."""

    chat_template: str | None = option(
        "Chat template instead of the tokenizer's own: a Jinja file, or the style alpaca, chatml, "
        "hh or oasst.",
        default=None,
    )
    chat_template_kwargs: str | None = option(
        "Values of the chat template's variables as a JSON object, e.g. "
        "'{\"enable_thinking\": false}'.",
        default=None,
    )


@options
class SameTokensOptions(Options):
    """Candidates that become the same tokens."""

    same_tokens: Literal["keep", "merge", "drop"] = option(
        "Candidates of one prompt with the same tokens and different rewards: keep all, merge them "
        "into one with their mean reward, or drop all.",
        default="keep",
    )


@options
class TextOptions(LengthOptions, TemplateOptions):
    """How records become tokens."""


@options
class PackOptions(Options):
    """Packs."""

    max_tokens: int = option(
        "Most tokens of a pack: the unit of one forward and backward pass.", default=16384
    )


@options
class SharingOptions(PackOptions):
    """How prompts are shared within a pack."""

    shared_prompts: bool | None = option(
        "Encode a prompt once for all of its responses (default: if possible).", default=None
    )
    attention: str = option(
        "Attention backend of shared-prompt packs; auto chooses by device and model.",
        default="auto",
    )


@options
class NormalizeOptions(Options):
    """Scores."""

    normalize: float | str | None = option(
        "A score is the mean or the sum of a response's token log-probabilities, or for a number "
        "their sum over the length to that power: 1 is the mean, 0 the sum (default: as the loss "
        "has it).",
        default=None,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        from fastrank.arguments import check_normalize  # torch would slow the help down

        try:
            check_normalize("normalize", "mean" if self.normalize is None else self.normalize)
        except ValueError as error:
            raise InputError(str(error)) from error


@options
class LossOptions(Options):
    """Loss."""

    loss: str = option(
        "Ranking loss: rrhf, pro, ranknet, slic, simpo, ipo, dpo, rebel, lambdarank, listmle, "
        "listnet, nca, lire or approxndcg; or FILE.py:name of a function of scores and rewards.",
        default="rrhf",
    )


@options
class ShapeOptions(Options):
    """Sizes of a step."""

    tokens: int | None = option("Response tokens.", default=None)
    vocab: int | None = option("Vocabulary entries.", default=None)


@options
class PromptOptions(Options):
    """Prompts."""

    prompts: str | None = option(
        "Prompts to sample for; responses in the file are kept as candidates.", default=None
    )


@options
class SamplingOptions(Options):
    """How responses are drawn from a policy.

    Attributes:
        strategy: ``"top_p"`` samples; ``"beam"`` takes the ends of one beam search;
            ``"diverse_beam"`` runs groups of beams that avoid each other's tokens. These are the
            strategies of the RRHF paper's data.
        num_responses: responses per prompt; the number of beams for both beam searches.
        max_new_tokens: longest response in tokens.
        top_p: sample from the smallest set of tokens with this probability mass; 1 is all of them.
        temperature: of sampling.

    Raises:
        InputError: a value out of range, or one that the strategy does not use.
    """

    num_responses: int = option("Responses to draw for each prompt.", default=6)
    strategy: Literal["top_p", "beam", "diverse_beam"] = option(
        "Sampling, one beam search, or groups of beams that avoid each other.", default="top_p"
    )
    max_new_tokens: int = option("Longest response in tokens.", default=256)
    top_p: float | None = option(
        "Probability mass to sample from (default: 1, all of it).", default=None
    )
    temperature: float | None = option("Sampling temperature (default: 1).", default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        strategies = ("top_p", "beam", "diverse_beam")
        if self.strategy not in strategies:
            expected = ", ".join(strategies)
            raise InputError(f"strategy must be one of {expected}, got '{self.strategy}'")
        check_least(self, num_responses=1, max_new_tokens=1)
        self._only("top_p", "top_p", "temperature")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise InputError(f"temperature must be above 0, got {self.temperature}")

    def _only(self, strategy: str, *names: str) -> None:
        for name in names:
            if self.strategy != strategy and getattr(self, name) is not None:
                raise InputError(f"{name} belongs to strategy {strategy}, got {self.strategy}")


@options
class Decoding(SamplingOptions):
    """One way of drawing responses.

    Attributes:
        num_beam_groups: groups of ``"diverse_beam"``, a divisor of ``num_responses`` (default: as
            many, so one beam each).
        diversity_penalty: what a token loses, in log-probability, for each beam of an earlier group
            that took it at the same step.
        stop: texts that end a response and are cut from it.
    """

    num_beam_groups: int | None = option(
        "Groups of diverse_beam (default: as many as responses).", default=None
    )
    diversity_penalty: float | None = option(
        "What a token loses per beam of an earlier group (default: 1).", default=None
    )
    stop: list[str] = option(
        "Text that ends a response and is cut from it; may be repeated.", default_factory=list
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._only("diverse_beam", "num_beam_groups", "diversity_penalty")
        if self.diversity_penalty is not None and not 0 <= self.diversity_penalty < float("inf"):
            raise InputError(f"diversity_penalty must be at least 0, got {self.diversity_penalty}")
        groups = self.num_beam_groups
        if groups is not None and (groups < 1 or self.num_responses % groups):
            raise InputError(
                f"num_beam_groups must divide num_responses={self.num_responses}, got {groups}"
            )
        if any(not text for text in self.stop):
            raise InputError("stop must be texts with a character, got an empty one")


@options
class BatchOptions(Options):
    """Batches."""

    batch_size: int = option(
        "Prompts at once, each with all of its responses. Part of the seed.", default=16
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, batch_size=1)


@options
class DecodingOptions(Decoding, BatchOptions, TemplateOptions):
    """How the responses to a file of prompts are drawn."""

    seed: int = option("Seed of the samples.", default=0)


@options
class RewardSourceOptions(Options):
    """Reward."""

    reward: str | None = option(
        "Reward of the responses: FILE.py:function, called as function(prompt, response) and "
        "returning a number; or a model folder or Hub name.",
        default=None,
    )
    reward_kind: Literal["auto", "classifier", "logprob"] = option(
        "What a reward model gives: the one label of a sequence classifier, or a causal model's "
        "own mean log-probability (auto: by its architecture).",
        default="auto",
    )


@options
class RewardModelOptions(RewardSourceOptions):
    """Reward, and how many responses a reward model reads at once."""

    reward_batch_size: int = option("Responses at once in a sequence classifier.", default=32)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, reward_batch_size=1)


@options
class OutputOptions(Options):
    """Output."""

    written = ("output",)

    output: str | None = option("JSONL file to write.", default=None)


@options
class OverwriteOptions(OutputOptions):
    """Output."""

    overwrite: bool = option("Replace a file that is there already.", default=False)


@options
class JsonOptions(Options):
    """Result."""

    json: bool = option("Print the result as one JSON object on the last line.", default=False)


@options
class ResumableOptions(OverwriteOptions, FormatOptions, LoadOptions, JsonOptions):
    """Files and model of a command that goes on where an interrupted run was."""

    output: str = change(required=True)
    partial: Literal["resume", "keep", "discard"] = option(
        "What to do with the unfinished work of a run that was stopped: resume if nothing changed, "
        "keep it although the reward changed, or discard it.",
        default="resume",
    )
