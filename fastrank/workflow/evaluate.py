"""``fastrank evaluate``: a policy as the papers evaluate one, on prompts it was not trained on.

Models are loaded one after the other, never two at once: the policy that is evaluated, the one it
is compared with, the reward and the model for perplexity may each fill the device.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from fastrank.data.write import atomic_path, check_output
from fastrank.errors import InputError
from fastrank.workflow.items import Item, as_line, check_distinct, read_items
from fastrank.workflow.options import DecodingOptions, ModelOptions
from fastrank.workflow.reward import check_finite, check_reward, load_reward

if TYPE_CHECKING:
    from fastrank.workflow.evaluation import Samples

Rewards = list[list[float | None]]


@dataclass
class EvaluateOptions:
    """What to evaluate, on what, and by what."""

    model: str = field(metadata={"help": "Model folder or Hub name to evaluate."})
    prompts: str | None = field(
        default=None, metadata={"help": "Held-out prompts to draw fresh samples for."}
    )
    reward: str | None = field(
        default=None, metadata={"help": "Reward of the samples: FILE.py:function or a model."}
    )
    reward_kind: Literal["auto", "classifier", "logprob"] = field(
        default="auto", metadata={"help": "What a reward model gives; see fastrank reward."}
    )
    against: str | None = field(
        default=None,
        metadata={"help": "A second model: on how many prompts the reward is above or below its."},
    )
    perplexity_model: str | None = field(
        default=None, metadata={"help": "Causal model to take the samples' perplexity under."}
    )
    reference_key: str | None = field(
        default=None,
        metadata={"help": "Field of the prompts with reference texts (one or a list), for BLEU."},
    )
    data: str | None = field(
        default=None, metadata={"help": "Ranked records: the model's accuracy as a reward model."}
    )
    output: str | None = field(
        default=None, metadata={"help": "JSONL file to write the samples and their rewards to."}
    )
    reward_batch_size: int = field(
        default=32, metadata={"help": "Responses at once in a sequence classifier."}
    )
    json: bool = field(default=False, metadata={"help": "Print one JSON object instead of text."})

    def __post_init__(self) -> None:
        if self.prompts is None and self.data is None:
            raise InputError("expected --prompts (fresh samples) or --data (ranking), got neither")
        for name in ("reward", "perplexity_model", "reference_key", "against", "output"):
            if self.prompts is None and getattr(self, name) is not None:
                raise InputError(f"--{name} needs --prompts, got none")
        if self.against is not None and self.reward is None:
            raise InputError("--against needs --reward, got none")


@dataclass
class FreshDecodingOptions(DecodingOptions):
    """`DecodingOptions` with one response a prompt."""

    num_responses: int = field(default=1, metadata={"help": "Responses to draw for each prompt."})


def evaluate(
    options: EvaluateOptions, drawing: DecodingOptions, loading: ModelOptions
) -> dict[str, Any]:
    """Evaluate, and return the figures as JSON types.

    Raises:
        InputError: something the user gave cannot be used.
    """
    from fastrank.modeling.pretrained import check_model_path, choose_device

    choose_device(loading.device)
    for path in (options.model, options.against, options.perplexity_model):
        if path is not None:
            check_model_path(path)
            check_model_path(path, needed="tokenizer_config.json")
    if options.reward is not None:
        check_reward(options.reward, options.reward_kind, loading)
    if options.output is not None:
        check_output(options.output, "--output")
        check_distinct(str(options.prompts), "--prompts", options.output)
    began = time.perf_counter()
    result: dict[str, Any] = {"model": options.model}
    if options.prompts is not None:
        result |= _fresh(options, drawing, loading)
    if options.data is not None:
        result["ranking"] = _ranking(options.model, options.data, drawing, loading)
    return result | {"seconds": time.perf_counter() - began}


def _fresh(
    options: EvaluateOptions, drawing: DecodingOptions, loading: ModelOptions
) -> dict[str, Any]:
    """Everything about fresh samples."""
    from fastrank.workflow.evaluation import bleu, compare_rewards, mean_reward

    items = list(read_items(str(options.prompts)))
    references = _references(items, options.reference_key)
    samples = _sample(options.model, items, drawing, loading)
    result: dict[str, Any] = {
        "prompts": len(items),
        "responses": samples.num_responses,
        "tokens_per_response": samples.num_tokens / max(samples.num_responses, 1),
        "empty_responses": sum(not r.strip() for item in samples.items for r in item.responses),
    }
    if options.reward is not None:
        rewards = _rewards(options, samples, drawing, loading)
        result["reward"] = asdict(mean_reward(rewards))
        samples = _scored(samples, rewards)
        if options.against is not None:
            other = _sample(options.against, items, drawing, loading)
            others = _rewards(options, other, drawing, loading)
            result["against"] = {
                "model": options.against,
                "reward": asdict(mean_reward(others)),
                **compare_rewards(rewards, others),
            }
    if options.perplexity_model is not None:
        result["perplexity"] = _perplexity(options.perplexity_model, samples, drawing, loading)
        result["perplexity_model"] = options.perplexity_model
    if references is not None:
        result["bleu"] = bleu(samples, references)
    if options.output is not None:
        with atomic_path(options.output) as path:
            lines = [as_line(item.as_row()) for item in samples.items]
            path.write_text("".join(lines), encoding="utf-8")
        result["output"] = options.output
    return result


def _references(items: Sequence[Item], key: str | None) -> list[list[str]] | None:
    """The reference texts of each prompt, if they were asked for."""
    if key is None:
        return None
    import sacrebleu  # noqa: F401  # its absence shows before anything is sampled

    references = []
    for item in items:
        value = item.extra.get(key)
        texts = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            raise InputError(f"{item.place}: {key} must be a text or a list of texts")
        references.append(texts)
    if not any(references):
        raise InputError(f"no record of the prompts has a reference in its field '{key}'")
    return references


def _sample(
    path: str, items: Sequence[Item], drawing: DecodingOptions, loading: ModelOptions
) -> Samples:
    from tqdm import tqdm

    from fastrank.workflow.evaluation import sample_items
    from fastrank.workflow.policy import load_policy

    model, tokenizer = load_policy(path, loading)
    with tqdm(desc=f"sampling {path}", unit=" prompts", total=len(items), disable=None) as bar:
        samples = sample_items(model, tokenizer, items, drawing, source=path, progress=bar.update)
    del model
    _free_memory()
    return samples


def _rewards(
    options: EvaluateOptions, samples: Samples, drawing: DecodingOptions, loading: ModelOptions
) -> Rewards:
    scorer, _ = load_reward(
        str(options.reward),
        options.reward_kind,
        loading,
        batch_size=options.reward_batch_size,
        as_chat=drawing.as_chat,
    )
    rewards = scorer(samples.items)
    for item, scores in zip(samples.items, rewards, strict=True):
        check_finite(item, scores, str(options.reward))
    del scorer
    _free_memory()
    return rewards


def _scored(samples: Samples, rewards: Rewards) -> Samples:
    items = [
        replace(item, scores=scores) for item, scores in zip(samples.items, rewards, strict=True)
    ]
    return replace(samples, items=items)


def _perplexity(
    path: str, samples: Samples, drawing: DecodingOptions, loading: ModelOptions
) -> float:
    from fastrank.attention.gate import refusal
    from fastrank.modeling.prepare import prepare_model
    from fastrank.workflow.evaluation import perplexity
    from fastrank.workflow.policy import load_policy

    model, tokenizer = load_policy(path, loading)
    prepare_model(model, shared_prompts=refusal(model) is None)
    try:
        return perplexity(model, tokenizer, samples, as_chat=drawing.as_chat)
    except ValueError as error:  # a tokenizer that does not go with the model, longrope, ...
        raise InputError(f"{path}: {error}") from error


def _ranking(
    path: str, data: str, drawing: DecodingOptions, loading: ModelOptions
) -> dict[str, Any]:
    from fastrank.data.load import load_groups
    from fastrank.data.tokenize import TokenizeOptions
    from fastrank.modeling.context import context_length
    from fastrank.workflow.evaluation import ranking_accuracy
    from fastrank.workflow.policy import load_policy

    model, tokenizer = load_policy(path, loading)
    groups, report = load_groups(
        data,
        tokenizer,
        context_length=context_length(model.config),
        options=TokenizeOptions(as_chat=drawing.as_chat),
    )
    try:
        metrics = ranking_accuracy(model, groups)
    except ValueError as error:  # a tokenizer that does not go with the model, longrope, ...
        raise InputError(f"{path}: {error}") from error
    del model
    _free_memory()
    return {"data": data, **metrics, "report": report.as_dict()}


def _free_memory() -> None:
    """Give a dropped model's memory back to the device before the next one is loaded."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def summary_text(result: dict[str, Any]) -> str:
    """The result for a person."""
    lines = [f"{result['model']}: {result['seconds']:.1f} s"]
    if "prompts" in result:
        lines.append(
            f"  samples     {result['responses']} responses to {result['prompts']} prompts, "
            f"{result['tokens_per_response']:.1f} tokens each, {result['empty_responses']} empty"
        )
    if "reward" in result:
        lines.append(f"  reward      {_mean_text(result['reward'])}")
    if "against" in result:
        other = result["against"]
        lines.append(
            f"  against     {other['model']} ({_mean_text(other['reward'])}): {other['win']} won, "
            f"{other['tie']} tied, {other['lose']} lost"
        )
    if "perplexity" in result:
        lines.append(f"  perplexity  {result['perplexity']:.2f} under {result['perplexity_model']}")
    if "bleu" in result:
        lines.append(f"  BLEU        {result['bleu']:.2f}")
    if "ranking" in result:
        ranking = result["ranking"]
        lines.append(f"  ranking of  {ranking['data']}")
        figures = {k: v for k, v in ranking.items() if isinstance(v, float)}
        lines += [f"    {name:<18} {value:.4f}" for name, value in figures.items()]
    if "output" in result:
        lines.append(f"  output      {result['output']}")
    return "\n".join(lines)


def _mean_text(reward: dict[str, Any]) -> str:
    return f"{reward['mean']:.4g} ± {reward['standard_error']:.2g}"
