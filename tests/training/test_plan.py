"""Resuming with other options or data: named, refused, and effective where it is allowed."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from menu_files import menu_rows
from trainer_runs import assert_same_weights, step_logs
from transformers import LlamaForCausalLM, TrainerCallback

from fastrank.data.columns import groups_digest, select
from fastrank.data.group import Group
from fastrank.data.load import load_groups
from fastrank.errors import InputError
from fastrank.losses import loss_from_name
from fastrank.tasks.menu import tiny_llama, word_tokenizer
from fastrank.training import plan
from fastrank.training.config import RankConfig

Make = Callable[..., Any]

SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}

#: Options that determine a run: another value, the names of the plan, and part of the message.
CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"learning_rate": 2e-3}, "learning_rate=0.001, got 0.002"),
    ({"weight_decay": 0.1}, "weight_decay=0.0, got 0.1"),
    ({"adam_beta1": 0.8}, "adam_beta1=0.9, got 0.8"),
    ({"adam_beta2": 0.99}, "adam_beta2=0.999, got 0.99"),
    ({"adam_epsilon": 1e-6}, "adam_epsilon=1e-08, got 1e-06"),
    ({"optim": "sgd"}, "optim=adamw_torch"),
    ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type=linear, got cosine"),
    ({"warmup_steps": 1}, "warmup_steps=0, got 1"),
    ({"max_grad_norm": 0.5}, "max_grad_norm=1.0, got 0.5"),
    ({"max_steps": 4}, "max_steps=2, got 4"),
    ({"num_train_epochs": 5}, "num_train_epochs=3.0, got 5"),
    ({"per_device_train_batch_size": 4}, "groups_per_step=8, got 4"),
    ({"gradient_accumulation_steps": 2}, "groups_per_step=8, got 16"),
    ({"groups_per_step": 9}, "groups_per_step=8, got 9"),
    ({"data_seed": 7}, "data_seed=42, got 7"),
    ({"seed": 7}, "seed=42, got 7"),
    ({"dataloader_drop_last": True}, "dataloader_drop_last=false, got true"),
    ({"loss": "pro"}, "loss=rrhf, got pro"),
    ({"loss_kwargs": {"margin": 0.5}}, "loss_kwargs"),
    ({"max_tokens": 8192}, "max_tokens=16384, got 8192"),
    ({"shared_prompts": False}, "shared_prompts=true, got false"),
    ({"max_length": 60}, "max_length=null, got 60"),
    ({"max_prompt_length": 30}, "max_prompt_length=null, got 30"),
    ({"max_response_length": 30}, "max_response_length=null, got 30"),
    ({"backprop": "two_phase"}, "backprop=joint, got two_phase"),
    ({"disable_dropout": False}, "disable_dropout=true, got false"),
    ({"nonfinite": "skip"}, "nonfinite=stop, got skip"),
    ({"bf16": True, "use_cpu": True}, "mixed_precision=no, got bf16"),
    ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=null, got 5.0"),
]

#: Options that leave the numbers as they are.
HARMLESS: list[dict[str, Any]] = [
    {"logging_steps": 2, "save_steps": 1, "save_total_limit": 2, "run_name": "other"},
    {"gradient_checkpointing": False, "dataloader_num_workers": 0, "log_level": "error"},
    {"disable_tqdm": True, "logging_first_step": True, "save_only_model": True},
]


def _reversed(groups: list[Group]) -> list[Group]:
    return [dataclasses.replace(group, rewards=-group.rewards) for group in groups]


@pytest.fixture
def saved(make_trainer: Make, menu_groups: list[Group]) -> Make:
    """A trainer of the same run, which has left a checkpoint of step 2."""
    make_trainer(menu_groups, **SAVED).train()

    def again(groups: Any = menu_groups, **options: Any) -> Any:
        return make_trainer(groups, **(SAVED | options))

    return again


def test_every_change_is_named(saved: Make, menu_groups: list[Group]) -> None:
    for options, text in CHANGES:
        with pytest.raises(InputError) as caught:
            saved(**options).train(resume_from_checkpoint=True)
        message = str(caught.value)
        assert "checkpoint-2 was written with " in message and "\n" not in message
        assert text in message, message
        assert message.count(", got ") == 1 + ("seed" in options), message  # and nothing else
        name = next(iter(options))
        assert f"--resume_changed {text.partition('=')[0]}" in message or name == "seed"


def test_other_data_is_named(saved: Make, menu_groups: list[Group]) -> None:
    last = menu_groups[-1]
    other = dataclasses.replace(last, response_ids=(*last.response_ids[:-1], torch.tensor([1, 2])))
    for groups in (
        _reversed(menu_groups),
        menu_groups[::-1],
        menu_groups[:-1],
        [*menu_groups[:-1], other],
    ):
        with pytest.raises(InputError, match=r"data=48 groups \w+, got 4[78] groups \w+: "):
            saved(groups).train(resume_from_checkpoint=True)


def test_another_model_never_goes_on(saved: Make) -> None:
    with pytest.raises(InputError, match=r"model=Llama.* go with no other model; begin a new run"):
        deeper = copy.deepcopy(tiny_llama(0).config)
        deeper.num_hidden_layers = 3
        trainer = saved(model=LlamaForCausalLM(deeper), resume_changed=["model"])
        trainer.train(resume_from_checkpoint=True)


def test_what_changes_no_number_may_change(saved: Make) -> None:
    for options in HARMLESS:
        assert saved(**options).train(resume_from_checkpoint=True) is not None


def test_a_run_whose_schedule_has_no_end_may_be_prolonged(
    make_trainer: Make, menu_groups: list[Group], tmp_path: Path
) -> None:
    options = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}
    make_trainer(menu_groups, max_steps=2, **options).train()
    longer = make_trainer(menu_groups, max_steps=4, **options)
    longer.train(resume_from_checkpoint=True)
    whole = make_trainer(menu_groups, output_dir=str(tmp_path / "whole"), max_steps=4, **options)
    whole.train()
    assert_same_weights(longer, whole)


def test_only_what_is_allowed_may_change(saved: Make) -> None:
    options = {"learning_rate": 2e-3, "loss": "pro", "max_steps": 4}
    with pytest.raises(InputError, match="with loss=rrhf, got pro: .*max_steps,learning"):
        trainer = saved(resume_changed=["learning_rate,max_steps"], **options)
        trainer.train(resume_from_checkpoint=True)
    allowed = ["learning_rate,max_steps", "loss"]
    saved(resume_changed=allowed, **options).train(resume_from_checkpoint=True)
    with pytest.raises(InputError, match="has no lerning_rate; did you mean learning_rate"):
        saved(resume_changed=["lerning_rate"]).train(resume_from_checkpoint=True)
    with pytest.raises(InputError, match="has no bf16; its name there is mixed_precision"):
        saved(resume_changed=["bf16"]).train(resume_from_checkpoint=True)


# ---- what is allowed takes effect ------------------------------------------------------------


class _At(TrainerCallback):
    """Does something after step 2."""

    def __init__(self, change: Callable[..., None]) -> None:
        self.change = change

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.change(kwargs["optimizer"], kwargs["lr_scheduler"])


def _rates(optimizer: Any, scheduler: Any, rate: float) -> None:
    scheduler.base_lrs = [rate] * len(scheduler.base_lrs)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = rate


def _decay(optimizer: Any, value: float) -> None:
    for group in optimizer.param_groups:
        if group["weight_decay"]:
            group["weight_decay"] = value


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "adam_beta1", "loss", "data"])
def test_a_change_takes_effect_as_if_made_within_the_run(
    make_trainer: Make, menu_groups: list[Group], tmp_path: Path, name: str
) -> None:
    """Bit for bit the run in which the same was changed by hand between its steps."""
    common = {"lr_scheduler_type": "constant", "max_steps": 4, "weight_decay": 0.5}
    value: Any = {
        "learning_rate": 5e-3,
        "weight_decay": 3.0,
        "adam_beta1": 0.5,
        "loss": "pro",
        "data": None,
    }[name]
    later = _reversed(menu_groups) if name == "data" else menu_groups
    options = {} if name == "data" else {name: value}

    def change(optimizer: Any, scheduler: Any) -> None:
        if name == "learning_rate":
            _rates(optimizer, scheduler, value)
        elif name == "weight_decay":
            _decay(optimizer, value)
        elif name == "adam_beta1":
            for group in optimizer.param_groups:
                group["betas"] = (value, group["betas"][1])
        elif name == "loss":
            by_hand.backprop.loss = by_hand.loss = loss_from_name("pro")
        else:
            groups[:] = later

    groups = list(menu_groups)
    by_hand = make_trainer(groups, callbacks=[_At(change)], output_dir=str(tmp_path / "hand"),
                           **common)  # fmt: skip
    by_hand.train()
    saving = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(menu_groups, **saving, **common).train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    resumed = make_trainer(later, resume_changed=[name], **saving, **(common | options))
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed, by_hand)
    found = json.loads((tmp_path / "run" / "checkpoint-4" / "checkpoint_files.json").read_text())
    assert found["plan"] == json.loads(json.dumps(resumed.run_plan()))  # to go on without asking


@pytest.mark.parametrize(
    "options",
    [
        {"lr_scheduler_type": "cosine", "max_steps": 4},
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 8, "max_steps": 4},
        {"learning_rate": 3e-3, "max_steps": 6},
        {"optim": "sgd", "max_steps": 4},
    ],
    ids=lambda options: "+".join(options),
)
def test_the_schedule_goes_on_as_the_new_options_say(
    saved: Make, make_trainer: Make, menu_groups: list[Group], tmp_path: Path, options: Any
) -> None:
    resumed = saved(resume_changed=list(options), **options)
    resumed.train(resume_from_checkpoint=True)
    whole = make_trainer(menu_groups, output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    rates = {row["step"]: row["learning_rate"] for row in step_logs(whole)}
    found = {row["step"]: row["learning_rate"] for row in step_logs(resumed)}
    assert {step: found[step] for step in found if step > 2} == pytest.approx(
        {step: rates[step] for step in rates if step > 2}
    )
    assert type(resumed.optimizer.optimizer) is type(whole.optimizer.optimizer)


def test_intervals_follow_the_options(saved: Make, tmp_path: Path) -> None:
    """transformers would go on with the checkpoint's own, in silence."""
    saved(resume_changed=["max_steps"], max_steps=5, save_steps=1).train(
        resume_from_checkpoint=True
    )
    names = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert names == {f"checkpoint-{step}" for step in (2, 3, 4, 5)}


# ---- what a plan holds -----------------------------------------------------------------------


def test_every_option_is_in_the_plan_or_known_to_have_no_effect(tmp_path: Path) -> None:
    config = RankConfig(output_dir=str(tmp_path))
    names = {field.name for field in dataclasses.fields(config)}
    found = plan.option_plan(config).keys()
    assert names - found == names & plan._WITHOUT_EFFECT
    assert json.loads(json.dumps(plan.option_plan(config))) == plan.option_plan(config)


def test_a_loss_of_ones_own_counts_by_its_file(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    code = "def loss(scores, rewards):\n    return (scores - rewards).square().mean() * {}\n"
    found = []
    for factor in (1, 1, 2):
        file.write_text(code.format(factor))
        config = RankConfig(output_dir=str(tmp_path), loss=f"{file}:loss")
        found.append(plan.option_plan(config)["loss_file"])
    assert found[0] == found[1] != found[2]
    given = RankConfig(output_dir=str(tmp_path), loss=lambda scores, rewards: scores.sum())
    assert "0x" not in plan.option_plan(given)["loss"]


def test_tokenizer_and_template_are_told_apart() -> None:
    tokenizer = word_tokenizer()
    before = plan.tokenizer_plan(tokenizer)
    assert before == plan.tokenizer_plan(word_tokenizer())
    tokenizer.chat_template = "{{ messages }}"
    templated = plan.tokenizer_plan(tokenizer)
    assert templated["tokenizer"] == before["tokenizer"]
    assert templated["chat_template"] != before["chat_template"]
    tokenizer.add_tokens(["quite-new"])
    assert plan.tokenizer_plan(tokenizer)["tokenizer"] != before["tokenizer"]
    assert plan.tokenizer_plan(None) == {"tokenizer": None, "chat_template": None}


def test_data_counts_by_its_content_wherever_it_lies(tmp_path: Path, write_rows: Any) -> None:
    """A list, a cached data set, a copy of the file, and parts of either."""
    rows = menu_rows(300, seed=9)
    tokenizer = word_tokenizer()
    kept, _ = load_groups(str(write_rows(rows)), tokenizer, cache=False)
    first, _ = load_groups(
        str(write_rows(rows)), tokenizer, cache=True, cache_dir=tmp_path / "cache", num_proc=1
    )
    copied, _ = load_groups(
        str(write_rows(rows, "copy.jsonl")), tokenizer, cache=True, cache_dir=tmp_path / "cache"
    )
    assert type(kept) is not type(first)
    digest = groups_digest(kept)
    assert groups_digest(first) == groups_digest(copied) == digest
    for index in ([], [7], range(3, 290), [5, 4, 299, 0, 1, 2, 260, 261], range(0, 300, 2)):
        some = groups_digest(select(kept, index))
        assert groups_digest(select(first, index)) == some != digest
    assert groups_digest(_reversed(list(kept))) != digest
