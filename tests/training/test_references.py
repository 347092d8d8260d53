"""``fastrank train`` with losses that subtract a reference model's scores."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
from pack_cases import tied_groups
from peft import LoraConfig, get_peft_model
from trainer_runs import step_logs

from fastrank.cli.main import main
from fastrank.data.group import Group
from fastrank.data.report import strict_pairs
from fastrank.errors import InputError
from fastrank.losses import DPO
from fastrank.modeling.pretrained import load_model
from fastrank.modeling.score import score
from fastrank.tasks.menu import menu_task
from fastrank.training.step_metrics import PackScores, score_metrics

ROWS = [
    {"prompt": f"q{k}", "responses": ["ab", "cde", "f"], "scores": [2, 1, k % 2]} for k in range(8)
]


@pytest.fixture
def command(policy_path, write_rows) -> list[str]:
    """Two steps in a folder of this test's own."""
    data: Path = write_rows(ROWS)
    command = ["train", "--data", str(data), "--output_dir", str(data.parent / "run")]
    command += ["--model", str(policy_path), "--cache_dir", str(data.parent / "cache")]
    return [*command, "--max_steps", "2", "--save_strategy", "no", "--disable_tqdm", "true"]


def test_the_starting_model_is_the_default_reference(command, tmp_path, run_json) -> None:
    result = run_json(*command, "--loss", "dpo")
    # Equal policy and reference: every pair costs softplus(0). Two or three strict pairs a prompt.
    rows = sum(2 if row["scores"][1] == row["scores"][2] else 3 for row in ROWS)
    splits = {"eval": result["heldout_prompts"], "train_split": result["train_prompts"]}
    total = sum(result["before"][name]["rank_loss"] * count for name, count in splits.items())
    assert total == pytest.approx(rows * math.log(2), rel=1e-5)
    before, after = (result[when]["train_split"]["rank_loss"] for when in ("before", "after"))
    assert after != before
    assert len(list((tmp_path / "cache").glob("reference-*.safetensors"))) == 2


def test_rewards_are_of_the_policy_over_its_reference(
    command, policy_path, other_policy_path, run_json
) -> None:
    """Equal models: no reward at the start, whatever the scores are; β scales what comes later."""
    found = {}
    for beta in (0.1, 0.4):
        options = ["--loss", "dpo", "--loss_kwargs", json.dumps({"beta": beta})]
        for reference in (policy_path, other_policy_path):
            more = ["--reference_model", reference, "--overwrite_output_dir", "--max_steps", "1"]
            result = run_json(*command, *options, *more)
            found[beta, reference] = [result[when]["train_split"] for when in ("before", "after")]
        start, end = found[beta, policy_path]
        assert start["rewards/chosen"] == start["rewards/margins"] == 0.0
        assert start["rewards/accuracies"] == 0.5 and start["logps/chosen"] < -1
        assert end["rewards/margins"] != 0.0
    weak, strong = (found[beta, other_policy_path][0] for beta in (0.1, 0.4))
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert weak[key] != 0 and strong[key] == pytest.approx(4 * weak[key], rel=1e-4)
    assert strong["logps/chosen"] == weak["logps/chosen"] == start["logps/chosen"]


def test_metrics_of_implicit_rewards_and_of_scores() -> None:
    """By hand: two groups of different sizes, a tie, and one without a pair."""
    loss = DPO(beta=0.5)
    groups = PackScores(
        scores=torch.tensor([-4.0, -2.0, -6.0, -1.0, -3.0, -9.0]),
        rewards=torch.tensor([0.0, 2.0, 0.0, 1.0, 3.0, 5.0]),
        reference_scores=torch.tensor([-5.0, -2.0, -8.0, -1.0, -7.0, -1.0]),
        tokens=torch.ones(6, dtype=torch.int64),
        sizes=(3, 2, 1),
    ).groups(loss)
    assert [g.implicit.tolist() for g in groups] == [[0.5, 0, 1], [0, 2], [-4]]
    found = score_metrics(groups)
    assert found["rewards/chosen"] == (0 + 2) / 2
    assert found["rewards/rejected"] == ((0.5 + 1) / 2 + 0) / 2
    assert found["rewards/margins"] == 1 - 0.375
    assert found["rewards/accuracies"] == (0 + 1) / 2  # both pairs of the first are wrong
    assert found["logps/chosen"] == (-2 - 3) / 2
    assert found["logps/rejected"] == (-5 - 1) / 2
    assert found["rank/top1"] == 0.5  # by the scores: the first is right, the second is not
    plain = score_metrics([g._replace(implicit=None) for g in groups])
    assert plain["rewards/chosen"] == plain["logps/chosen"] == found["logps/chosen"]


def test_another_reference_changes_the_loss(
    command, policy_path, other_policy_path, run_json
) -> None:
    found = []
    for reference in (other_policy_path, policy_path):
        options = ["--loss", "dpo", "--reference_model", reference, "--overwrite_output_dir"]
        found.append(run_json(*command, *options)["before"]["train_split"]["rank_loss"])
    assert found[1] != pytest.approx(found[0], rel=1e-3)


def test_the_built_in_task_is_its_own_reference(tmp_path, run_json) -> None:
    arguments = ["--output_dir", tmp_path / "run", "--max_steps", "1", "--eval_groups", "8"]
    options = ["--loss", "dpo", "--save_strategy", "no", "--disable_tqdm", "true"]
    first = run_json("train", *arguments, *options)["before"]["eval"]["rank_loss"]
    pairs = [strict_pairs(record.scores)[0] for record in menu_task(seed=42).heldout]
    assert first == pytest.approx(math.log(2) * sum(pairs) / len(pairs), rel=1e-5)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--reference_model", "x"], "--reference_model is for losses that use a reference"),
        (["--loss", "dpo", "--reference_model", "./no"], "./no: no such model folder"),
    ],
)
def test_a_reference_that_is_of_no_use_is_one_line(command, tmp_path, capsys, more, said) -> None:
    assert main([*command, *more]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.fixture
def groups() -> list[Group]:
    return tied_groups(5, 5, vocab=31)[:16]


def test_the_trainer_scores_by_its_reference(
    make_trainer, groups, policy_path, other_policy_path, tmp_path, monkeypatch
) -> None:
    """A model, the folder of one, and scores that the groups bring give the same run; the starting
    model as reference gives margins of 0. A folder's scores are kept for the next start."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    other = load_model(other_policy_path, "float32")
    brought = [
        replace(group, reference_scores=scores)
        for group, scores in zip(groups, score(other, groups, normalize="sum"), strict=True)
    ]
    runs = []
    for given, reference in ((brought, None), (groups, other_policy_path), (groups, other)):
        options = {"loss": "dpo", "max_steps": 2, "model": load_model(policy_path, "float32")}
        run = make_trainer(given, given[:4], ref_model=reference, **options)
        run.train()
        runs.append((step_logs(run), run.evaluate()))
    for logs, values in runs[1:]:
        for row, expected in zip(logs, runs[0][0], strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-6)
            assert row["rewards/margins"] == pytest.approx(expected["rewards/margins"], rel=1e-4)
        assert values["eval_loss"] == pytest.approx(runs[0][1]["eval_loss"], rel=1e-6)
    assert len(list((tmp_path / "home").rglob("reference-*.safetensors"))) == 2
    policy = load_model(policy_path, "float32")
    start = make_trainer(groups, groups[:4], ref_model=policy, loss="nca", model=policy).evaluate()
    assert start["eval_rewards/margins"] == start["eval_rewards/chosen"] == 0
    assert start["eval_logps/chosen"] < -1


def test_the_model_below_an_adapter_is_its_reference(make_trainer, groups, policy_path) -> None:
    """A fresh adapter changes nothing yet; a trained one, given as the model, is switched off."""
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    options = {"loss": "dpo", "max_steps": 1}
    base = load_model(policy_path, "float32")
    wanted = score(base, groups, normalize="sum")
    fresh = make_trainer(groups, model=base, peft_config=adapter, **options)
    adapted = get_peft_model(load_model(policy_path, "float32"), adapter)
    given = make_trainer(groups, model=adapted, **options)
    bare = make_trainer(groups, model=load_model(policy_path, "float32"), **options)
    for run in (fresh, given, bare):
        found = [run.train_dataset[i].reference_scores for i in range(len(groups))]
        torch.testing.assert_close(torch.cat(found), torch.cat(wanted))
        run.train()
        assert math.isfinite(step_logs(run)[0]["loss"])
    (moved,) = step_logs(given)
    assert moved["rewards/margins"] != 0  # the adapter is on again


def test_what_the_trainer_cannot_take_as_reference(make_trainer, groups, policy_path) -> None:
    scored = replace(groups[1], reference_scores=[0.0] * groups[1].num_candidates)
    adapter = LoraConfig(r=4, target_modules=["q_proj"])
    for given, options, said in (
        (groups, {"ref_model": policy_path}, "ref_model is for losses that use a reference, such"),
        (groups, {"loss": "dpo", "ref_model": "./no"}, "./no: no such model folder"),
        (
            [groups[0], scored],
            {"loss": "dpo", "peft_config": adapter},
            "train_dataset: all groups or none must have reference_scores, got 1 of 2",
        ),
    ):
        with pytest.raises(InputError, match=said):
            make_trainer(given, **options)


def test_groups_to_evaluate_later_bring_their_reference_scores(make_trainer, groups) -> None:
    trainer = make_trainer(groups, loss="dpo")
    with pytest.raises(InputError, match="the loss dpo needs reference_scores or a ref_model"):
        trainer.evaluate(list(groups))


def test_a_reference_with_other_tokens_is_refused(command, tmp_path, capsys) -> None:
    other = tiny_models.save_llama(tmp_path / "other")
    tokenizer = tiny_models.ascii_tokenizer()
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(other)
    assert main([*command, "--loss", "dpo", "--reference_model", str(other)]) == 2
    assert "its tokens are not those of the model to train" in capsys.readouterr().err
