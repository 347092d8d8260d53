"""``fastrank train --online_every``: a whole run of online training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastrank.attention.gate import refusal
from fastrank.data.load import load_groups
from fastrank.errors import InputError
from fastrank.modeling.context import context_length
from fastrank.modeling.prepare import prepare_model
from fastrank.modeling.pretrained import (
    check_model_path,
    load_model,
    load_tokenizer,
    template_values,
)
from fastrank.options import LoadOptions, ReadOptions, TemplateOptions
from fastrank.options.declare import values_of
from fastrank.training.callbacks import METRICS_FILE, read_metrics
from fastrank.training.config import RankConfig
from fastrank.training.early_checks import check_best_metric
from fastrank.training.inputs import length_limits
from fastrank.training.run import Job, output_folder, train
from fastrank.training.run_report import ONLINE_PANELS, plot_metrics
from fastrank.training.together import ending_together
from fastrank.workflow.items import read_items
from fastrank.workflow.online_options import OnlineTrainOptions
from fastrank.workflow.online_round import TEXTS_ALONE, RoundMaker
from fastrank.workflow.online_trainer import OnlineTrainer
from fastrank.workflow.policy import encode_prompts
from fastrank.workflow.reward import check_reward, load_reward


@ending_together()
def train_online(options: OnlineTrainOptions, config: RankConfig) -> dict[str, Any]:
    """Train online; returns the result as a dictionary that JSON can hold.

    Raises:
        InputError: something the user gave cannot be used; nothing has been written.
        TrainingStopped: training cannot go on.
    """
    with output_folder(config):
        return _train_online(options, config)


def _train_online(options: OnlineTrainOptions, config: RankConfig) -> dict[str, Any]:
    loading = LoadOptions(device=str(config.device), trust_remote_code=options.trust_remote_code)
    check_best_metric(config)
    check_reward(str(options.reward), options.reward_kind, loading)
    if options.reference_model is not None:
        check_model_path(options.reference_model)
        if not (options.needs_reference or config.ranking_loss.uses_reference):
            raise InputError(
                "--reference_model is for --kl_weight, --online_perplexity or a loss that uses a "
                "reference, got none of them"
            )
    job, maker = _load(options, config, loading)

    def make_trainer(model: nn.Module, args: RankConfig, **kwargs: Any) -> OnlineTrainer:
        kwargs.pop("train_dataset")
        return OnlineTrainer(model, args, maker, **kwargs)

    result = train(options, config, job=job, make_trainer=make_trainer)
    if config.should_save:
        folder = Path(str(result["output_dir"]))
        rows = read_metrics(folder / METRICS_FILE)
        result["online_plot"] = str(plot_metrics(rows, folder / "online.png", panels=ONLINE_PANELS))
    return result


def _load(
    options: OnlineTrainOptions, config: RankConfig, loading: LoadOptions
) -> tuple[Job, RoundMaker]:
    """Load model, prompts, reward, reference and evaluation data."""
    path = str(options.model)
    trust = options.trust_remote_code
    items = list(
        read_items(str(options.online_prompts), format=options.format, columns=options.columns)
    )
    for item in items:
        item.texts(TEXTS_ALONE)
    tokenizer = load_tokenizer(
        path,
        trust_remote_code=trust,
        **template_values(options),
    )
    model = load_model(path, config.weights_dtype, trust_remote_code=trust)
    context = context_length(model.config)
    limit = replace(length_limits(config, model), as_chat=options.as_chat)
    encoded = encode_prompts(
        [item.prompt for item in items],
        tokenizer,
        options.decoding,
        context,
        as_chat=options.as_chat,
        tools=[item.tools for item in items],
    )
    if not any(encoded.ids):
        raise InputError(f"{options.online_prompts}: no prompt can be sampled for")
    scorer, _ = load_reward(
        str(options.reward),
        options.reward_kind,
        loading,
        batch_size=options.reward_batch_size,
        template=TemplateOptions(as_chat=options.as_chat),
    )
    reference = None
    if options.needs_reference or config.ranking_loss.uses_reference:
        reference = load_model(
            options.reference_model or path, config.weights_dtype, trust_remote_code=trust
        )
        torch.nn.Module.to(reference, config.device)
        reference.requires_grad_(False)
        prepare_model(reference, shared_prompts=refusal(reference) is None)
    maker = RoundMaker(
        items=items,
        encoded=encoded,
        options=options,
        tokenizer=tokenizer,
        limit=limit,
        scorer=scorer,
        seed=config.seed,
        reference=reference,
    )
    job = Job(model, tokenizer, [], [], source=str(options.online_prompts))
    if options.eval_data is not None:
        job.heldout, report = load_groups(
            options.eval_data,
            tokenizer,
            options=limit,
            # --format and --columns are those of the prompts.
            **(values_of(options, ReadOptions) | {"format": None, "columns": None}),
        )
        job.reports.append(report)
    return job, maker
