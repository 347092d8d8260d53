"""``fastrank evaluate``: the papers' evaluation of a policy, on prompts it was not trained on.

Models are loaded one after the other, never two at once: the policy that is evaluated, the one it
is compared with, the reward and the model for perplexity may each fill the device.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from fastrank import options as shared
from fastrank.console import Bar
from fastrank.data.fields import is_blank
from fastrank.data.write import atomic_path, check_output
from fastrank.errors import InputError
from fastrank.options.declare import change, option, options, values_of
from fastrank.workflow.items import PromptItem, Scores, as_line, check_distinct, read_items
from fastrank.workflow.reward import check_finite, check_reward, load_reward, read_as

if TYPE_CHECKING:
    from fastrank.workflow.policy_metrics import Samples


@options
class EvaluateOptions(
    shared.ModelOptions,
    shared.PromptOptions,
    shared.RewardModelOptions,
    shared.DataOptions,
    shared.ReadOptions,
    shared.OverwriteOptions,
    shared.DecodingOptions,
    shared.LoadOptions,
    shared.JsonOptions,
):
    """Draw fresh samples for held-out prompts and report their reward, perplexity and BLEU, and
    wins against a second model; with ranked records, the model's accuracy as a reward model."""

    model: str = change("Model folder or Hub name to evaluate.", required=True)
    prompts: str | None = change("Held-out prompts to draw fresh samples for.")
    data: str | None = change("Ranked records: the model's accuracy as a reward model.")
    output: str | None = change("JSONL file to write the samples and their rewards to.")
    num_responses: int = change(default=1)
    against: str | None = option(
        "A second model: on how many prompts the reward is above or below its.", default=None
    )
    perplexity_model: str | None = option(
        "Causal model to take the samples' perplexity under.", default=None
    )
    reference_key: str | None = option(
        "Field of the prompts with reference texts (one or a list), for BLEU; of pairs, chosen.",
        default=None,
    )

    def __post_init__(self) -> None:
        if self.prompts is None and self.data is None:
            raise InputError("expected --prompts (fresh samples) or --data (ranking), got neither")
        for name in ("reward", "perplexity_model", "reference_key", "against", "output"):
            if self.prompts is None and getattr(self, name) is not None:
                raise InputError(f"--{name} needs --prompts, got none")
        if self.against is not None and self.reward is None:
            raise InputError("--against needs --reward, got none")
        super().__post_init__()


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Evaluate, and return the figures as JSON types.

    Raises:
        InputError: something the user gave cannot be used.
    """
    from fastrank.modeling.pretrained import check_model_path, choose_device

    choose_device(options.device)
    for path in (options.model, options.against, options.perplexity_model):
        if path is not None:
            check_model_path(path)
            check_model_path(path, needed="tokenizer_config.json")
    if options.reward is not None:
        check_reward(options.reward, options.reward_kind, options)
    if options.output is not None:
        check_output(options.output, "--output", replace=options.overwrite)
        check_distinct(str(options.prompts), "--prompts", options.output)
    began = time.perf_counter()
    result: dict[str, Any] = {"model": options.model}
    if options.prompts is not None:
        result |= _fresh(options)
    if options.data is not None:
        result["ranking"] = _ranking(options)
    return result | {"seconds": time.perf_counter() - began}


def _fresh(options: EvaluateOptions) -> dict[str, Any]:
    """Sample, and compute every metric of fresh samples."""
    from fastrank.workflow.policy_metrics import bleu, compare_rewards, mean_reward

    items = list(read_items(str(options.prompts), format=options.format, columns=options.columns))
    references = _references(items, options.reference_key)
    samples = _sample(options.model, items, options)
    result: dict[str, Any] = {
        "prompts": len(items),
        "responses": samples.num_responses,
        "tokens_per_response": samples.num_tokens / max(samples.num_responses, 1),
        "empty_responses": sum(is_blank(r) for item in samples.items for r in item.responses),
    }
    if options.reward is not None:
        rewards, notes = _rewards(options, samples)
        result["reward"] = asdict(mean_reward(rewards)) | {"read_as": notes}
        pairs = zip(samples.items, rewards, strict=True)
        samples = replace(samples, items=[replace(item, scores=own) for item, own in pairs])
        if options.against is not None:
            other = _sample(options.against, items, options)
            others, _ = _rewards(options, other)
            result["against"] = {
                "model": options.against,
                "reward": asdict(mean_reward(others)),
                **compare_rewards(rewards, others),
            }
    if options.perplexity_model is not None:
        result["perplexity"] = _perplexity(options, samples)
        result["perplexity_model"] = options.perplexity_model
    if references is not None:
        result["bleu"] = bleu(samples, references)
    if options.output is not None:
        with atomic_path(options.output) as path:
            lines = [as_line(item.as_row()) for item in samples.items]
            path.write_text("".join(lines), encoding="utf-8")
        result["output"] = options.output
    return result


def _references(items: Sequence[PromptItem], key: str | None) -> list[list[str]] | None:
    """The reference texts of each prompt, if they were asked for."""
    if key is None:
        return None
    import sacrebleu  # noqa: F401  # its absence shows before anything is sampled

    references = []
    for item in items:
        value = item.named.get(key, item.extra.get(key))
        texts = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            raise InputError(f"{item.place}: {key} must be a text or a list of texts")
        references.append(texts)
    if not any(references):
        raise InputError(f"no record of the prompts has a reference in its field '{key}'")
    return references


def _sample(path: str, items: Sequence[PromptItem], options: EvaluateOptions) -> Samples:
    from fastrank.workflow.policy import load_policy
    from fastrank.workflow.policy_metrics import sample_items

    model, tokenizer = load_policy(path, options, options)
    with Bar(desc=f"sampling {path}", unit="prompts", total=len(items)) as bar:
        samples = sample_items(model, tokenizer, items, options, source=path, progress=bar.update)
    del model
    _free_memory()
    return samples


def _rewards(options: EvaluateOptions, samples: Samples) -> tuple[list[Scores], dict[str, int]]:
    """Rewards, and what is to be said of the texts that a model was given for them. A reward model
    has a chat template of its own: --chat_template is of the policies."""
    scorer, kind = load_reward(
        str(options.reward),
        options.reward_kind,
        options,
        batch_size=options.reward_batch_size,
        template=shared.TemplateOptions(as_chat=options.as_chat),
    )
    rewards = scorer(samples.items)
    notes = read_as(scorer)
    for item, scores in zip(samples.items, rewards, strict=True):
        check_finite(item, scores, str(options.reward))
    if kind != "function":
        del scorer
        _free_memory()
    return rewards, notes


def _perplexity(options: EvaluateOptions, samples: Samples) -> float:
    from fastrank.attention.gate import refusal
    from fastrank.modeling.prepare import prepare_model
    from fastrank.workflow.policy import load_policy, refusals_of
    from fastrank.workflow.policy_metrics import perplexity

    path = str(options.perplexity_model)
    model, tokenizer = load_policy(path, options, options)
    prepare_model(model, shared_prompts=refusal(model) is None)
    with refusals_of(path):
        return perplexity(model, tokenizer, samples, as_chat=options.as_chat)


def _ranking(options: EvaluateOptions) -> dict[str, Any]:
    from fastrank.data.load import load_groups
    from fastrank.data.tokenize import TokenizeOptions
    from fastrank.modeling.context import context_length
    from fastrank.workflow.policy import load_policy, refusals_of
    from fastrank.workflow.policy_metrics import ranking_accuracy

    model, tokenizer = load_policy(options.model, options, options)
    groups, report = load_groups(
        str(options.data),
        tokenizer,
        context_length=context_length(model.config),
        options=TokenizeOptions(as_chat=options.as_chat),
        **values_of(options, shared.ReadOptions),
    )
    with refusals_of(options.model):
        metrics = ranking_accuracy(model, groups)
    del model
    _free_memory()
    return {"data": options.data, **metrics, "report": report.as_dict()}


def _free_memory() -> None:
    """Give a dropped model's memory back to the device before the next one is loaded."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def evaluation_text(result: dict[str, Any]) -> str:
    """The result for a person."""
    lines = [f"{result['model']}: {result['seconds']:.1f} s"]
    if "prompts" in result:
        lines.append(
            f"  samples     {result['responses']} responses to {result['prompts']} prompts, "
            f"{result['tokens_per_response']:.1f} tokens each, {result['empty_responses']} empty"
        )
    if "reward" in result:
        lines.append(f"  reward      {_mean_text(result['reward'])}")
        notes = result["reward"]["read_as"].items()
        lines += [f"    {count} records read as: {note}" for note, count in notes]
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
