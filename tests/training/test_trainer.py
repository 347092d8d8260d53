"""RankTrainer against the plain computation, and what it reports."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_runs import assert_same_weights, step_logs
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from fastrank import metrics
from fastrank.data.group import Group
from fastrank.errors import InputError
from fastrank.losses import PRO, RRHF, Loss
from fastrank.ranking import ranking_loss
from fastrank.tasks.menu import tiny_llama
from fastrank.training.callbacks import MetricsFile, read_metrics

Make = Callable[..., Any]

LOGGED = {
    "loss",
    "rank_loss",
    "sft_loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "num_tokens",
    "rank/kendall_tau",
    "rank/top1",
    "live_fraction",
    "tokens_per_second",
    "shared_prompt_ratio",
    "grad_norm",
    "learning_rate",
    "epoch",
    "step",
}


def _scores(model: torch.nn.Module, group: Group) -> list[torch.Tensor]:
    """Token log-probabilities of each response by a forward pass of its own."""
    found = []
    for response in group.response_ids:
        ids = torch.cat((group.prompt_ids, response))[None]
        logp = model(input_ids=ids).logits[0].log_softmax(-1)
        rows = torch.arange(len(group.prompt_ids) - 1, ids.shape[1] - 1)
        found.append(logp[rows, response])
    return found


def _plain_loss(model: torch.nn.Module, groups: list[Group], loss: Loss) -> torch.Tensor:
    """The formula of the design, group by group."""
    total = torch.zeros(())
    for group in groups:
        tokens = _scores(model, group)
        scores = torch.stack([t.mean() for t in tokens])
        best = tokens[int(group.rewards.argmax())]
        weight = loss.sft_weight * ((len(tokens) - 1) ** 2 if isinstance(loss, PRO) else 1)
        sft = -(best.sum() if loss.sft_reduction == "sum" else best.mean())
        total = total + ranking_loss(scores, group.rewards, loss=loss) + weight * sft
    return total / len(groups)


@pytest.mark.parametrize(("name", "loss"), [("rrhf", RRHF()), ("pro", PRO())], ids=["rrhf", "pro"])
@pytest.mark.parametrize(
    ("batch", "accumulation", "max_tokens"), [(8, 1, 16384), (8, 1, 70), (4, 2, 130), (1, 8, 75)]
)
def test_steps_equal_the_plain_computation(
    make_trainer: Make,
    ragged_groups: list[Group],
    name: str,
    loss: Loss,
    batch: int,
    accumulation: int,
    max_tokens: int,
) -> None:
    """However the 8 groups of a step are cut, three steps of SGD are those of the formula."""
    trainer = make_trainer(
        ragged_groups,
        loss=name,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_tokens=max_tokens,
        max_steps=3,
        optim="sgd",
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    reference = tiny_llama(0)
    start = copy.deepcopy(reference.state_dict())
    order = trainer.get_train_dataloader().batch_sampler
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05)
    expected = []
    for index in order:  # 23 groups: the third step has 7
        optimizer.zero_grad()
        value = _plain_loss(reference, [ragged_groups[i] for i in index], loss)
        value.backward()
        expected.append(value.item())
        optimizer.step()
    assert [len(index) for index in order] == [8, 8, 7]
    trainer.train()
    logged = step_logs(trainer)
    assert [row["loss"] for row in logged] == pytest.approx(expected, rel=1e-5)
    for row in logged:
        assert row["loss"] == pytest.approx(row["rank_loss"] + row["sft_loss"], rel=1e-5)
    trained = trainer.model.state_dict()
    assert_same_weights(trainer, reference, atol=3e-6, rtol=1e-5)
    moved = max((trained[key] - start[key]).abs().max().item() for key in start)
    assert moved > 1e-3


def test_what_is_logged(make_trainer: Make, menu_groups: list[Group]) -> None:
    trainer = make_trainer(menu_groups, menu_groups[:5], max_steps=4, logging_steps=2)
    before = {
        i: torch.stack([t.mean() for t in _scores(trainer.model, menu_groups[i])]).tolist()
        for i in range(len(menu_groups))
    }
    sampler = trainer.get_train_dataloader().batch_sampler
    first = next(iter(sampler))
    trainer.args.learning_rate = 0.0  # the scores of both logged steps are those of the start
    trainer.train()
    rows = step_logs(trainer)
    assert [row["step"] for row in rows] == [2, 4]
    assert set(rows[0]) == LOGGED
    second = list(sampler)[1]
    groups = [menu_groups[i] for i in first + second]
    scores = [before[i] for i in first + second]
    rewards = [group.rewards for group in groups]
    row = rows[0]
    assert row["rewards/accuracies"] == pytest.approx(metrics.pairwise_accuracy(scores, rewards))
    assert row["rank/kendall_tau"] == pytest.approx(metrics.kendall_tau(scores, rewards), abs=1e-6)
    assert row["rank/top1"] == pytest.approx(metrics.top1_accuracy(scores, rewards))
    best = [s[int(r.argmax())] for s, r in zip(scores, rewards, strict=True)]
    rest = [(sum(s) - b) / (len(s) - 1) for s, b in zip(scores, best, strict=True)]
    assert row["rewards/chosen"] == pytest.approx(sum(best) / len(best), abs=1e-5)
    assert row["rewards/rejected"] == pytest.approx(sum(rest) / len(rest), abs=1e-5)
    assert row["rewards/margins"] == pytest.approx(
        row["rewards/chosen"] - row["rewards/rejected"], abs=1e-6
    )
    separate = sum(group.num_tokens_separate for group in groups)
    shared = sum(group.num_tokens_shared for group in groups)
    assert row["shared_prompt_ratio"] == pytest.approx(separate / shared)
    live = total = 0
    for s, group in zip(scores, groups, strict=True):
        for i, (score, reward) in enumerate(zip(s, group.rewards.tolist(), strict=True)):
            pushed = sum(
                (score < s[j]) * (reward > r) - (score > s[j]) * (reward < r)
                for j, r in enumerate(group.rewards.tolist())
            )
            tokens = len(group.response_ids[i])
            live += tokens * (pushed != 0 or i == int(group.rewards.argmax()))
            total += tokens
    assert row["live_fraction"] == pytest.approx(live / total)
    assert row["tokens_per_second"] > 0


def test_evaluation_equals_separate_forward_passes(
    make_trainer: Make, ragged_groups: list[Group]
) -> None:
    trainer = make_trainer(ragged_groups, ragged_groups, max_tokens=90)
    values = trainer.evaluate()
    output = trainer.predict(ragged_groups)
    with torch.no_grad():
        scores = [
            torch.stack([t.mean() for t in _scores(trainer.model, group)])
            for group in ragged_groups
        ]
        expected = _plain_loss(trainer.model, ragged_groups, RRHF())
    for found, want in zip(output.predictions, scores, strict=True):
        torch.testing.assert_close(torch.from_numpy(found), want, atol=1e-5, rtol=1e-5)
    rewards = [group.rewards for group in ragged_groups]
    assert values["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert values["eval_loss"] == pytest.approx(
        values["eval_rank_loss"] + values["eval_sft_loss"], rel=1e-5
    )
    for key, function in {
        "eval_rewards/accuracies": metrics.pairwise_accuracy,
        "eval_rank/kendall_tau": metrics.kendall_tau,
        "eval_rank/ndcg": metrics.ndcg,
        "eval_rank/mrr": metrics.mrr,
        "eval_rank/top1": metrics.top1_accuracy,
    }.items():
        assert values[key] == pytest.approx(function(scores, rewards), abs=1e-6)


def test_a_supervised_term_of_sums_that_dwarfs_the_rest_is_said_once(
    make_trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Long responses and means of scores: PRO trains like SFT. RRHF's term is a mean, as PRO's can
    be; and short responses are no matter."""
    rows, rewards = [[5 + i] * (40 - i) for i in range(6)], [1.0 - i / 5 for i in range(6)]
    long = [Group([3, 4], rows, rewards)] * 8
    short = [replace(group, response_ids=[row[:1] for row in rows]) for group in long]
    for groups, options, said in (
        (long, {"loss": "pro"}, True),
        (long, {"loss": "rrhf"}, False),
        (long, {"loss": "pro", "loss_kwargs": {"sft_reduction": "mean"}}, False),
        (short, {"loss": "pro"}, False),
    ):
        caplog.clear()
        make_trainer(groups, max_steps=2, **options).train()
        found = [r.getMessage() for r in caplog.records if "the supervised term" in r.getMessage()]
        assert len(found) == said, options
        assert not said or "of PRO() is" in found[0] and "sft_reduction='mean'" in found[0]


def test_evaluation_leaves_the_mode_and_the_weights(
    make_trainer: Make, menu_groups: list[Group]
) -> None:
    plain = make_trainer(menu_groups, max_steps=4)
    plain.train()
    evaluated = make_trainer(
        menu_groups, menu_groups[:4], max_steps=4, eval_strategy="steps", eval_steps=1
    )
    evaluated.train()
    assert sum("eval_loss" in row for row in evaluated.state.log_history) == 4
    assert_same_weights(evaluated, plain)


def test_an_epoch_takes_every_group_once(make_trainer: Make, ragged_groups: list[Group]) -> None:
    trainer = make_trainer(
        ragged_groups, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=5
    )
    trainer.train()
    assert trainer.state.global_step == 10
    assert trainer.state.epoch == 2.0
    plan = trainer.run_plan()
    assert plan["groups_per_step"] == 5 and plan["data_seed"] == 42
    assert plan["data"].startswith("23 groups ")


def test_every_dropout_is_set_to_zero(make_trainer: Make, menu_groups: list[Group]) -> None:
    def gpt2() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=32, n_positions=64, n_embd=32, n_layer=1, n_head=2)
        return GPT2LMHeadModel(config)

    trainer = make_trainer(menu_groups, model=gpt2())
    assert trainer.disabled_dropout
    assert all(m.p == 0 for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout))
    kept = make_trainer(menu_groups, model=gpt2(), disable_dropout=False, shared_prompts=False)
    assert not kept.disabled_dropout
    assert any(m.p > 0 for m in kept.model.modules() if isinstance(m, torch.nn.Dropout))


def test_padded_rows_give_the_same_run_as_shared_prompts(
    make_trainer: Make, menu_groups: list[Group]
) -> None:
    options = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 2}
    shared = make_trainer(menu_groups, **options)
    shared.train()
    padded = make_trainer(menu_groups, shared_prompts=False, **options)
    padded.train()
    assert_same_weights(padded, shared, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        ([], {}, "train_dataset must hold at least one group, got none"),
        (
            [Group([1], [[2] * 30, [3] * 30], [0, 1], name="f:9")],
            {"max_tokens": 20},
            "f:9: must fit into max_tokens=20, got 61 tokens.*max_response_length",
        ),
        ([Group([1], [[2], [999]], [0, 1], name="f:3")], {}, "f:3: token ids must be below"),
    ],
)
def test_groups_that_cannot_be_trained_on_are_named(
    make_trainer: Make, tmp_path: Path, groups: list[Group], options: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make_trainer(groups, **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_last_step_left_out_may_leave_none(make_trainer: Make, menu_groups: list[Group]) -> None:
    trainer = make_trainer(menu_groups[:5], dataloader_drop_last=True)
    with pytest.raises(InputError, match="a step needs 8 groups .* got 5"):
        trainer.train()


def test_the_metrics_file_and_the_saved_model(
    make_trainer: Make, menu_groups: list[Group], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    trainer = make_trainer(menu_groups, menu_groups[:4], callbacks=[MetricsFile(run)])
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows if "grad_norm" in row] == [1, 2, 3, 4]
    assert any("eval_rank/ndcg" in row for row in rows)
    assert not list(run.glob("*.bin")) and not list(run.glob(".*"))
    assert json.loads((run / "training_args.json").read_text())["loss"] == "rrhf"
    assert_same_weights(AutoModelForCausalLM.from_pretrained(run), trainer)


def test_values_that_json_cannot_hold_become_null(tmp_path: Path) -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    file = MetricsFile(tmp_path)
    state = TrainerState(global_step=3, is_world_process_zero=True)
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    file.on_log(args, state, TrainerControl(), logs={"loss": math.nan, "x": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 3, "loss": null, "x": 1.0}\n'
