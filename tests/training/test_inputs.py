"""What `RankTrainer` is given besides groups: names, records, data sets, streams."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from chat_templates import COLON
from trainer_runs import assert_same_weights
from transformers import AutoTokenizer

import fastrank
from fastrank.data.streamed_groups import StreamedGroups
from fastrank.data.tokenize import TokenizeOptions
from fastrank.errors import InputError

ROWS = [
    {"prompt": f"q{i} ", "responses": ["a" * (i + 1), "b", "c c"], "scores": [i, 1.5, 0.25]}
    for i in range(10)
]
PAIRS = [{"prompt": f"q{i} ", "chosen": f"yes {i}", "rejected": "no"} for i in range(4)]


def config(folder: Path, **options: Any) -> fastrank.RankConfig:
    options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 3} | options
    return fastrank.RankConfig(
        output_dir=str(folder),
        use_cpu=True,
        learning_rate=1e-2,
        disable_tqdm=True,
        report_to="none",
        **options,
    )


def tokens(groups: Any) -> list[Any]:
    return [
        (g.prompt_ids.tolist(), [ids.tolist() for ids in g.response_ids], g.rewards.tolist())
        for g in groups
    ]


def stream(rows: list[dict[str, Any]], passes: list[int] | None = None) -> Any:
    def generate() -> Iterator[dict[str, Any]]:
        if passes is not None:
            passes.append(0)
        yield from rows

    return datasets.IterableDataset.from_generator(generate)


def test_ready_groups_are_not_cut_in_silence(
    make_trainer: Any, menu_groups: list[fastrank.Group]
) -> None:
    prompt = max(len(group.prompt_ids) for group in menu_groups)
    response = max(len(ids) for group in menu_groups for ids in group.response_ids)
    assert make_trainer(menu_groups, max_prompt_length=prompt, max_response_length=response)
    for name, limit in (
        ("max_prompt_length", prompt - 1),
        ("max_response_length", response - 1),
        ("max_length", prompt),
    ):
        with pytest.raises(InputError, match=rf"{name}={limit} is for records, ready groups are"):
            make_trainer(menu_groups, **{name: limit})


@pytest.mark.parametrize(
    "name", ["compute_loss", "prediction_step", "_prepare_inputs", "_get_train_sampler"]
)
def test_a_method_that_would_never_be_called_is_refused(
    name: str, menu_groups: list[fastrank.Group], tmp_path: Path
) -> None:
    own = type("Own", (fastrank.RankTrainer,), {name: lambda self, *args, **kwargs: 0.0})
    with pytest.raises(InputError, match=rf"Own\.{name} would never be called by RankTrainer: "):
        own("./absent", config(tmp_path), menu_groups)


def test_the_best_model_needs_held_out_groups(
    make_trainer: Any, menu_groups: list[fastrank.Group]
) -> None:
    best = {"save_strategy": "best", "metric_for_best_model": "accuracy"}
    with pytest.raises(InputError, match="save_strategy=best needs evaluations, got no eval_data"):
        make_trainer(menu_groups, **best)
    assert make_trainer(menu_groups, menu_groups[:4], **best)
    best["metric_for_best_model"] = "acuracy"
    with pytest.raises(InputError, match="did you mean rewards/accuracies"):
        make_trainer(menu_groups, menu_groups[:4], **best)


def test_any_records_are_tokenised_as_the_command_line_does(
    policy_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tokenizer = AutoTokenizer.from_pretrained(policy_path)
    expected, report = fastrank.load_groups(file, tokenizer, context_length=128)
    assert report.kept == 10
    for given in (str(file), file, ROWS, iter(ROWS), datasets.Dataset.from_list(ROWS), expected):
        trainer = fastrank.RankTrainer(
            str(policy_path), config(tmp_path / "run"), given, {"pairs": PAIRS, "rows": ROWS[:2]},
            processing_class=None if given is not expected else tokenizer,
        )  # fmt: skip
        assert tokens(trainer.train_dataset) == tokens(expected)
        assert isinstance(trainer.processing_class, type(tokenizer))
        pairs, _ = fastrank.load_groups(PAIRS, tokenizer)
        assert tokens(trainer.eval_dataset["pairs"]) == tokens(pairs)
        assert tokens(trainer.eval_dataset["rows"]) == tokens(expected[:2])
    metrics = trainer.evaluate()
    for name, count in (("pairs", 4), ("rows", 2)):
        alone = trainer.evaluate(trainer.eval_dataset[name])
        assert metrics[f"eval_{name}_loss"] == pytest.approx(alone["eval_loss"])
        assert len(trainer.predict(trainer.eval_dataset[name]).predictions) == count
    assert "10 read, 10 kept" in capsys.readouterr().out
    assert trainer.model.dtype == torch.float32


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        ({"train": ROWS}, {}, "got a dictionary of train"),
        (stream(ROWS), {"max_steps": -1}, "train_dataset is a stream, which needs max_steps"),
        (stream(ROWS), {"loss": "dpo"}, "train_dataset is a stream, without the scores dpo needs"),
        (stream(ROWS), {"dataloader_num_workers": 1}, "which takes no loader's workers"),
        (stream([{"prompt": "q", "response": "a", "score": 1}]), {}, "give one record per row"),
        ([{"prompt": "q", "answer": "a"}], {}, "fields of no known format"),
        ([], {}, "train_dataset must hold at least one group, got none"),
        (3, {}, "expected a path or rows, got int"),
    ],
)
def test_what_cannot_be_trained_on(
    given: Any, options: dict[str, Any], said: str, policy_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        fastrank.RankTrainer(str(policy_path), config(tmp_path, **options), given)


def test_records_need_a_tokenizer_and_an_evaluation_an_end(
    policy_path: Path, tmp_path: Path
) -> None:
    trainer = fastrank.RankTrainer(str(policy_path), config(tmp_path), ROWS)
    with pytest.raises(InputError, match="which train_dataset needs, got NoneType"):
        fastrank.RankTrainer(trainer.model, config(tmp_path), ROWS)
    with pytest.raises(InputError, match="eval_dataset is read whole"):
        fastrank.RankTrainer(str(policy_path), config(tmp_path), ROWS, stream(ROWS))


def test_a_stream_is_trained_on_in_order_and_resumed_exactly(
    policy_path: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy_path)
    rows = [*ROWS[:4], {"prompt": "q", "responses": ["alone"], "scores": [1]}, *ROWS[4:]]
    passes: list[int] = []
    whole = fastrank.RankTrainer(str(policy_path), config(tmp_path / "whole"), stream(rows, passes))
    before = len(passes)
    whole.train()
    # 4 steps of 3 groups: ten usable records, and the first two again. The run is told by 64.
    assert len(whole.train_dataset) == 12 and len(passes) - before <= 8
    expected, _ = fastrank.load_groups(ROWS, tokenizer)
    assert tokens(whole.train_dataset[:]) == tokens([*expected, *expected[:2]])

    listed = fastrank.RankTrainer(str(policy_path), config(tmp_path / "listed"), ROWS)
    listed._sampler = whole._sampler  # type: ignore[method-assign]
    listed.train_dataset = [*listed.train_dataset, *listed.train_dataset[:2]]
    listed.train()
    assert_same_weights(listed.model, whole.model)

    first = config(tmp_path / "first", max_steps=2, lr_scheduler_type="constant")
    fastrank.RankTrainer(str(policy_path), first, stream(rows)).train()
    straight = config(tmp_path / "straight", lr_scheduler_type="constant")
    once = fastrank.RankTrainer(str(policy_path), straight, stream(rows))
    once.train()
    on = config(tmp_path / "first", lr_scheduler_type="constant")
    resumed = fastrank.RankTrainer(str(policy_path), on, stream(rows))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert_same_weights(resumed.model, once.model)
    other = fastrank.RankTrainer(str(policy_path), on, stream(ROWS[1:]))
    with pytest.raises(InputError, match="data"):
        other.train(resume_from_checkpoint=True)


def test_a_stream_is_read_no_further_than_training_comes(policy_path: Path, tmp_path: Path) -> None:
    read = []

    def generate() -> Iterator[dict[str, Any]]:
        while True:
            read.append(0)
            yield ROWS[0]

    endless = datasets.IterableDataset.from_generator(generate)
    long = config(tmp_path, max_steps=10**9)
    trainer = fastrank.RankTrainer(str(policy_path), long, endless)
    assert trainer.data_plan().startswith("stream ")
    batches = iter(trainer.get_train_dataloader())
    assert [next(batches).num_groups for _ in range(3)] == [3, 3, 3]
    assert len(read) < 1000


def test_a_stream_goes_back_and_checks_every_group(policy_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy_path)
    seen: list[Any] = []
    groups = StreamedGroups(
        stream(ROWS), tokenizer, TokenizeOptions(), check=seen.append, length=25, num_held=4
    )
    expected, _ = fastrank.load_groups(ROWS, tokenizer)
    assert tokens([groups[i] for i in (12, 11, 24, 3, -1)]) == tokens(
        [expected[i] for i in (2, 1, 4, 3, 4)]
    )
    assert len(seen) == 25 + 25
    with pytest.raises(IndexError):
        groups[25]
    empty = StreamedGroups(
        stream([{"prompt": "q", "responses": ["a"], "scores": [1]}]), tokenizer,
        TokenizeOptions(), length=3,
    )  # fmt: skip
    with pytest.raises(InputError, match="the stream has no usable record"):
        empty[0]


def test_a_bad_group_of_a_stream_is_named(policy_path: Path, tmp_path: Path) -> None:
    rows = [*ROWS[:5], ROWS[5] | {"responses": ["x" * 120, "y" * 120, "z"]}]
    small = config(tmp_path, max_tokens=64)
    trainer = fastrank.RankTrainer(str(policy_path), small, stream(rows))
    with pytest.raises(InputError, match="data set:6: must fit into max_tokens=64"):
        trainer.train()


def test_candidates_of_several_turns_train_in_both_ways(policy_path: Path, tmp_path: Path) -> None:
    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    rows = [
        {
            "prompt": [turn("user", "hi")],
            "chosen": [turn("assistant", "a" * i), turn("user", "long"), turn("assistant", "b")],
            "rejected": [turn("assistant", "c"), turn("user", "d" * 9), turn("assistant", "e" * i)],
        }
        for i in range(1, 6)
    ]
    tokenizer = AutoTokenizer.from_pretrained(policy_path)
    tokenizer.chat_template = COLON
    groups, _ = fastrank.load_groups(rows, tokenizer)
    bare = [replace(group, ranked=None) for group in groups]
    trainers = {}
    for name, data, backprop in (
        ("joint", rows, "joint"),
        ("two_phase", rows, "two_phase"),
        ("everything", bare, "joint"),
    ):
        trainers[name] = fastrank.RankTrainer(
            str(policy_path),
            config(tmp_path / name, backprop=backprop, loss="pro", save_strategy="no"),
            train_dataset=data,
            processing_class=tokenizer,
        )
        trainers[name].train()
    assert_same_weights(trainers["joint"], trainers["two_phase"], atol=1e-5)
    with pytest.raises(AssertionError):
        assert_same_weights(trainers["joint"], trainers["everything"], atol=1e-3)
