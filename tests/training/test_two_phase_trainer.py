"""``--backprop two_phase`` in a run: the numbers of joint training, and what it saves."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import Inject, clean_groups, limit_memory, poison, spoil_gradients, spoil_scores
from trainer_runs import assert_same_values, assert_same_weights, step_logs
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from fastrank.cli.main import main
from fastrank.data.columns import group_sizes
from fastrank.data.group import Group
from fastrank.errors import InputError, TrainingStopped
from fastrank.training.batching import PackDataset, StepCutter
from fastrank.training.config import RankConfig
from fastrank.training.trainer import RankTrainer

Make = Callable[..., Any]
SAME = (
    "loss", "rank_loss", "sft_loss", "grad_norm", "rewards/chosen", "rewards/accuracies",
    "rewards/margins", "rank/kendall_tau", "live_fraction", "shared_prompt_ratio",
)  # fmt: skip
PACK = 24  # smaller than every group of the menu, larger than each of its paths
TWO = {"backprop": "two_phase", "max_tokens": PACK}


@pytest.mark.parametrize("loss", ["rrhf", "pro", "listmle"])
def test_a_run_is_that_of_joint_training(
    make_trainer: Make, menu_groups: list[Group], loss: str
) -> None:
    sizes = group_sizes(menu_groups)
    assert sizes.num_tokens.min() > PACK > sizes.longest_sequence.max()
    options = {
        "loss": loss, "optim": "sgd", "learning_rate": 0.05, "max_steps": 8, "eval_steps": 4,
        "eval_strategy": "steps",
    }  # fmt: skip
    joint, two = (
        make_trainer(menu_groups, menu_groups[:9], **options, **extra) for extra in ({}, TWO)
    )
    start = {key: value.clone() for key, value in joint.model.state_dict().items()}
    joint.train()
    two.train()
    for row, expected in zip(step_logs(two), step_logs(joint), strict=True):
        for key in SAME:
            assert row.get(key) == pytest.approx(expected.get(key), rel=1e-4, abs=1e-6), key
    assert_same_weights(two, joint, atol=1e-5)
    assert not any(torch.equal(v, start[key]) for key, v in joint.model.state_dict().items())
    assert_same_values(two.evaluate(), joint.evaluate(), rel=1e-4, abs=1e-5)


def test_the_work_saved_is_logged(make_trainer: Make, menu_groups: list[Group]) -> None:
    joint, two = (
        make_trainer(menu_groups, max_steps=2, **extra) for extra in ({}, {"backprop": "two_phase"})
    )
    joint.train()
    two.train()
    assert not any("work_saved" in row or "backprop_fraction" in row for row in step_logs(joint))
    for row in step_logs(two):
        # Here no group is cut: prompts are encoded once in each phase.
        assert row["live_fraction"] < row["backprop_fraction"] < 1
        saved = 1 - (1 + 3 * row["backprop_fraction"]) / 4
        assert row["work_saved"] == pytest.approx(saved)


def test_a_resumed_run_is_the_same_bit_for_bit(
    make_trainer: Make, menu_groups: list[Group], tmp_path: Path
) -> None:
    """Whatever number of processes loads the groups."""
    options = {**TWO, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    whole = make_trainer(menu_groups, output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    for workers in (0, 1):
        cut = {**options, "dataloader_num_workers": workers, "output_dir": f"{tmp_path}/{workers}"}
        make_trainer(menu_groups, max_steps=2, **cut).train()
        resumed = make_trainer(menu_groups, max_steps=4, **cut)
        resumed.train(resume_from_checkpoint=True)
        assert_same_weights(resumed, whole)


def test_padded_rows(make_trainer: Make, menu_groups: list[Group]) -> None:
    options = {"shared_prompts": False, "optim": "sgd", "learning_rate": 0.05}
    joint = make_trainer(menu_groups, menu_groups[:5], **options)
    two = make_trainer(menu_groups, menu_groups[:5], **options, **TWO)
    joint.train()
    two.train()
    assert_same_weights(two, joint, atol=1e-5)
    assert two.evaluate()["eval_loss"] == pytest.approx(joint.evaluate()["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("inject", [spoil_scores, spoil_gradients])
def test_numbers_that_are_not_finite_are_traced_to_their_records(
    make_trainer: Make, menu_groups: list[Group], inject: Inject
) -> None:
    clean = clean_groups(menu_groups)
    options = {**TWO, "max_steps": 3, "optim": "sgd", "learning_rate": 0.1}
    probe = make_trainer(clean, **options)
    bad = sorted(list(probe.get_train_dataloader().batch_sampler)[1][2:4])
    groups = poison(clean, bad)
    stop, skip = (make_trainer(groups, nonfinite=mode, **options) for mode in ("stop", "skip"))
    for trainer in (stop, skip):
        inject(trainer.model)
    with pytest.raises(TrainingStopped) as caught:
        stop.train()
    text = str(caught.value)
    assert "in step 2" in text and "2 of the step's 8 records" in text
    assert all(f"menu:{i}" in text for i in bad)
    skip.train()
    assert [row.get("skipped_records") for row in step_logs(skip)] == [None, 2.0, None]
    assert all(value.isfinite().all() for value in skip.model.state_dict().values())


@pytest.mark.parametrize(("limit", "advice"), [(20, r"lower --max_tokens \(24\)"), (2, "response")])
def test_out_of_memory_names_the_pack(
    make_trainer: Make, menu_groups: list[Group], limit: int, advice: str
) -> None:
    options = (
        TWO
        if limit > 2
        else {**TWO, "max_tokens": int(group_sizes(menu_groups).longest_sequence.max())}
    )
    trainer = make_trainer(menu_groups, **options)
    limit_memory(trainer.model, limit)
    with pytest.raises(TrainingStopped, match=f"out of memory in a pack of .*{advice}") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)


def test_a_group_needs_room_for_its_longest_path_only(
    make_trainer: Make, menu_groups: list[Group]
) -> None:
    longest = int(group_sizes(menu_groups).longest_sequence.max())
    with pytest.raises(InputError, match="backprop=two_phase"):
        make_trainer(menu_groups, max_tokens=longest)
    make_trainer(menu_groups, max_tokens=longest, backprop="two_phase")
    with pytest.raises(InputError, match=rf"menu:\d+: .*max_tokens={longest - 1}, got {longest}"):
        make_trainer(menu_groups, max_tokens=longest - 1, backprop="two_phase")


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="joint, two_phase, got 'both'"):
        RankConfig(output_dir=str(tmp_path), backprop="both")
    with pytest.raises(InputError, match="auto_find_pack_size.*set max_tokens"):
        RankConfig(output_dir=str(tmp_path), backprop="two_phase", auto_find_pack_size=True)


def test_randomness_is_refused_before_training(tmp_path: Path, menu_groups: list[Group]) -> None:
    dropout = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2))
    options = {"output_dir": str(tmp_path / "run"), "backprop": "two_phase", "use_cpu": True}
    config = RankConfig(disable_dropout=False, shared_prompts=False, **options)
    with pytest.raises(InputError, match=r"attn_dropout: 0.1"):
        RankTrainer(dropout, config, menu_groups)
    jitter = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
            router_jitter_noise=0.1,
        )
    )  # fmt: skip
    with pytest.raises(InputError, match=r"jitter_noise: 0.1"):
        RankTrainer(jitter, RankConfig(**options), menu_groups)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_groups_are_dealt_out_once_and_evenly(menu_groups: list[Group], world_size: int) -> None:
    batches = [
        StepCutter(PACK, rank=rank, world_size=world_size, whole_groups=True)(
            menu_groups, range(5, 21)
        )
        for rank in range(world_size)
    ]
    members = sorted(i for batch in batches for i in batch.members)
    assert members == list(range(16))
    for batch in batches:
        assert batch.index == tuple(range(5, 21)) and batch.num_groups == 16
        assert [g.name for g in batch.groups] == [menu_groups[5 + i].name for i in batch.members]
    loads = [batch.num_tokens for batch in batches]
    step = menu_groups[5:21]
    assert sum(loads) == sum(group.num_tokens_shared for group in step)
    assert max(loads) - min(loads) <= max(g.num_tokens_shared for g in step)


def test_an_evaluation_is_dealt_out_in_equally_many_parts(ragged_groups: list[Group]) -> None:
    found = [
        PackDataset(ragged_groups, StepCutter(1, rank=rank, world_size=3, whole_groups=True))
        for rank in range(3)
    ]
    assert len({len(dataset) for dataset in found}) == 1
    seen = [i for dataset in found for n in range(len(dataset)) for i in dataset[n].members]
    assert sorted(seen) == list(range(len(ragged_groups)))


def test_a_group_travels_between_processes_by_value(ragged_groups: list[Group]) -> None:
    group = replace(ragged_groups[3], reference_scores=-ragged_groups[3].rewards)
    again = pickle.loads(pickle.dumps(group))
    assert again.name == group.name and torch.equal(again.prompt_ids, group.prompt_ids)
    assert torch.equal(again.rewards, group.rewards) and again.rewards.dtype == group.rewards.dtype
    assert torch.equal(again.reference_scores, group.reference_scores)
    for one, other in zip(again.response_ids, group.response_ids, strict=True):
        assert torch.equal(one, other)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    argv = [
        "train", "--backprop", "two_phase", "--max_tokens", "64", "--max_steps", "2",
        "--logging_steps", "1", "--eval_groups", "8", "--output_dir", str(folder),
    ]  # fmt: skip
    assert main(argv) == 0
    assert "back-propagated in two phases" in capsys.readouterr().out
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "backprop_fraction" in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(0 < row["backprop_fraction"] for row in steps)
