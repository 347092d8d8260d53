"""``fastrank iterate``: rounds of sample, reward and train, each from the model before.

This is the papers' iterated training, made of the library's own commands: what a round leaves in
its folder (``round-1/samples.jsonl``, ``ranked.jsonl``, ``model``, ``result.json``) is what they
would have left. A run that was stopped goes on in the step that it was in: sampling and rewarding
by their journals, training by its checkpoints. In contrast to online training the model in
training and the one that samples are never in memory together, and any candidate file can be looked
at, or repeated, by itself.
"""

from __future__ import annotations

import copy
import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrank import options as shared
from fastrank.data.locks import LOCK_FILE
from fastrank.data.write import atomic_path
from fastrank.errors import InputError
from fastrank.options.declare import change, check_least, option, options, values_of
from fastrank.workflow.evaluate import EvaluateOptions, evaluate
from fastrank.workflow.items import file_identity, template_identity
from fastrank.workflow.reward import RewardOptions, check_reward, reward_file
from fastrank.workflow.sample import SampleOptions, sample_file

if TYPE_CHECKING:
    from fastrank.training.config import RankConfig

PLAN_FILE = "iterate.json"
RESULT_FILE = "result.json"

#: Options of training that a run cannot change between its rounds.
_FIXED = (
    "loss",
    "loss_kwargs",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
)


@options
class IterateOptions(
    shared.ModelOptions,
    shared.PromptOptions,
    shared.RewardSourceOptions,
    shared.SamplingOptions,
    shared.FormatOptions,
    shared.TemplateOptions,
    shared.TrustOptions,
    shared.JsonOptions,
):
    """Rounds of sampling from a model, rewarding the samples and training on them. A run that was
    stopped goes on where it was when the same command is given again."""

    model: str = change("Model folder or Hub name to start from.", required=True)
    prompts: str = change(required=True)
    reward: str = change(required=True)
    rounds: int = option("Rounds of sample, reward and train.", default=2)
    eval_prompts: str | None = option(
        "Held-out prompts to evaluate every round's model on.", default=None
    )
    sample_batch_size: int = option("Prompts sampled at once.", default=16)

    def __post_init__(self) -> None:
        check_least(self, rounds=1, sample_batch_size=1)
        super().__post_init__()

    def drawing(self, seed: int) -> dict[str, Any]:
        """The options of ``fastrank sample`` that say how responses are drawn."""
        own = values_of(self, shared.SamplingOptions)
        own |= values_of(self, shared.FormatOptions) | values_of(self, shared.TemplateOptions)
        return own | {"batch_size": self.sample_batch_size, "seed": seed}


def iterate(options: IterateOptions, config: RankConfig) -> dict[str, Any]:
    """Run the rounds that are missing; returns what every round gave, as JSON types.

    Raises:
        InputError: something the user gave cannot be used, or the folder holds another run.
        TrainingStopped: training cannot go on.
    """
    from fastrank.modeling.pretrained import check_model_path
    from fastrank.training.early_checks import check_best_metric
    from fastrank.training.run import output_folder

    check_best_metric(config)
    if config.world_size > 1:
        raise InputError(
            "fastrank iterate runs in one process; for several, call sample, reward and train by "
            "themselves"
        )
    loading = shared.LoadOptions(
        device=str(config.device), trust_remote_code=options.trust_remote_code
    )
    check_model_path(options.model)
    check_reward(options.reward, options.reward_kind, loading)
    with output_folder(config) as output_dir:
        return _rounds(output_dir, options, config, loading)


def _rounds(
    output_dir: Path, options: IterateOptions, config: RankConfig, loading: shared.LoadOptions
) -> dict[str, Any]:
    _check_plan(output_dir, options, config)
    model = options.model
    results = []
    for number in range(1, options.rounds + 1):
        folder = output_dir / f"round-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / RESULT_FILE).is_file():
            result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        else:
            result = _round(number, model, folder, options, config, loading)
        print(round_text(result), flush=True)
        results.append(result)
        model = str(folder / "model")
    return {"output_dir": str(output_dir), "model": model, "rounds": results}


def _check_plan(output_dir: Path, options: IterateOptions, config: RankConfig) -> None:
    """Refuse a folder with another run; otherwise remember this one."""
    decoding = shared.Decoding(**values_of(options, shared.SamplingOptions))
    plan: dict[str, Any] = {
        "model": options.model,
        "prompts": [options.prompts, file_identity(options.prompts)],
        "reward": [options.reward, options.reward_kind],
        "format": [options.format, options.columns],
        "chat template": template_identity(options),
        "decoding": values_of(decoding, shared.Decoding),
        "sample_batch_size": options.sample_batch_size,
        **{name: getattr(config, name) for name in _FIXED},
    }
    plan = json.loads(json.dumps(plan))
    path = output_dir / PLAN_FILE
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        for key, value in plan.items():
            if before.get(key) != value:
                raise InputError(
                    f"output_dir {output_dir} holds a run with another {key}; go on with the same, "
                    "or choose another --output_dir"
                )
        return
    if any(path.name != LOCK_FILE for path in output_dir.iterdir()):
        raise InputError(f"output_dir {output_dir} holds other files; choose a new folder")
    _write_json(path, plan)


def _round(
    number: int,
    model: str,
    folder: Path,
    options: IterateOptions,
    config: RankConfig,
    loading: shared.LoadOptions,
) -> dict[str, Any]:
    """One round, from where it was left; writes its result at the end."""
    samples, ranked = folder / "samples.jsonl", folder / "ranked.jsonl"
    inference = values_of(loading, shared.LoadOptions)
    reward = values_of(options, shared.RewardSourceOptions)
    if not samples.is_file():  # it appears when it is whole
        sampling = options.drawing(config.seed + number)
        sample_file(
            SampleOptions(
                model=[model],
                prompts=options.prompts,
                output=str(samples),
                **sampling,
                **inference,
            )
        )
    rewards = folder / "rewards.json"
    if not rewards.is_file():
        rewarding = RewardOptions(
            data=str(samples),
            output=str(ranked),
            overwrite=True,  # without the result below, the step did not end
            as_chat=options.as_chat,
            **reward,
            **inference,
        )
        _write_json(rewards, reward_file(rewarding))
    trained = _train(model, ranked, folder / "model", options, config)
    result: dict[str, Any] = {
        "round": number,
        "from": model,
        "model": str(folder / "model"),
        "rewards": json.loads(rewards.read_text(encoding="utf-8")),
        "training": trained,
    }
    if options.eval_prompts is not None:
        evaluating = EvaluateOptions(
            model=result["model"],
            prompts=options.eval_prompts,
            perplexity_model=options.model,
            **reward,
            **(options.drawing(config.seed) | {"num_responses": 1}),
            **inference,
        )
        result["evaluation"] = evaluate(evaluating)
    _write_json(folder / RESULT_FILE, result)
    return result


def _train(
    model: str, data: Path, output: Path, options: IterateOptions, config: RankConfig
) -> dict[str, Any]:
    from fastrank.training.run import train
    from fastrank.training.run_options import TrainOptions

    config = copy.copy(config)
    config.output_dir = str(output)
    config.resume_from_checkpoint = "auto"  # from the latest checkpoint, or from the beginning
    training = TrainOptions(
        model=model,
        data=str(data),
        trust_remote_code=options.trust_remote_code,
        **values_of(options, shared.TemplateOptions),
    )
    result = train(training, config)
    gc.collect()
    return {key: result[key] for key in ("steps", "seconds", "train_prompts", "before", "after")}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with atomic_path(path) as file:
        file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def round_text(result: dict[str, Any]) -> str:
    """One line for a finished round."""
    rewards = result["rewards"]
    parts = [f"round {result['round']}: samples of {result['from']}"]
    if rewards["mean"] is not None:
        parts.append(f"mean reward {rewards['mean']:.4g}, best {rewards['mean_of_best']:.4g}")
    if "evaluation" in result:
        found = result["evaluation"]
        parts.append(
            f"after training, held out {found['reward']['mean']:.4g}, perplexity "
            f"{found['perplexity']:.4g}"
        )
    return "; ".join(parts)
