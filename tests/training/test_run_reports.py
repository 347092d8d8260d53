"""What a run prints, draws and writes about itself; and how it splits its data."""

from __future__ import annotations

import doctest
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from transformers import TrainerControl, TrainerState, TrainingArguments

import fastrank.training.callbacks
import fastrank.training.run_report
from fastrank.data.group import Group
from fastrank.errors import InputError
from fastrank.training.callbacks import MetricsFile, RankProgress, format_line, read_metrics
from fastrank.training.run_report import TRAINING_PANELS, plot_metrics, summary_table
from fastrank.training.splits import choose_groups, shared_prompts, split_by_prompt


@pytest.mark.parametrize("module", [fastrank.training.callbacks, fastrank.training.run_report])
def test_examples(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


def test_lines() -> None:
    assert format_line({"train_runtime": 3.0, "epoch": 1.0}, 5, 9) is None
    line = format_line({"eval_rank_loss": 0.5, "eval_rewards/accuracies": 0.75}, 7, 100)
    assert line == "eval at step 7:  rank_loss 0.5000  rewards/accuracies 0.750"
    line = format_line({"loss": 1.0, "skipped_records": 2.0, "tokens_per_second": 12345.6}, 7, 100)
    assert line == "step   7/100  loss 1.0000  tokens_per_second 12,346  skipped_records 2"


@pytest.mark.parametrize("bar", [True, False])
def test_bar_and_lines_live_together(
    capsys: Any, tmp_path: Path, monkeypatch: Any, bar: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: bar)
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    state = TrainerState(is_world_process_zero=True, max_steps=20, global_step=4)
    control = TrainerControl()
    progress = RankProgress()
    progress.on_train_begin(args, state, control)
    for step in (5, 6):
        state.global_step = step
        progress.on_step_end(args, state, control)
        progress.on_log(args, state, control, logs={"loss": 1.0 / step})
    for _ in range(3):
        progress.on_prediction_step(args, state, control, eval_dataloader=range(3))
    time.sleep(0.11)  # a bar is redrawn ten times a second
    progress.on_evaluate(args, state, control)
    progress.on_step_end(args, state, control)
    progress.on_train_end(args, state, control)
    captured = capsys.readouterr()
    assert captured.out == "step  5/20  loss 0.2000\nstep  6/20  loss 0.1667\n"
    if bar:  # a resumed run begins where it was
        assert "4/20 steps" in captured.err and "6/20 steps" in captured.err
        assert "0/3 packs" in captured.err and "left" in captured.err
    else:
        assert captured.err == ""


def test_another_process_is_silent(capsys: Any, tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    state = TrainerState(is_world_process_zero=False, max_steps=20)
    progress, file = RankProgress(), MetricsFile(tmp_path / "m")
    for callback in (progress, file):
        callback.on_train_begin(args, state, TrainerControl())
        callback.on_log(args, state, TrainerControl(), logs={"loss": 1.0})
        callback.on_train_end(args, state, TrainerControl())
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "m").exists()


def test_a_resumed_run_continues_the_metrics_file(tmp_path: Path) -> None:
    """The checkpoint of step 2 knows of an evaluation there, not of one made after it was saved."""
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    state = TrainerState(is_world_process_zero=True)
    file = MetricsFile(tmp_path)
    file.on_train_begin(args, state, TrainerControl())
    for step in (0, 1, 2, 3):
        state.global_step = step
        file.on_log(args, state, TrainerControl(), logs={"loss": float(step)})
    first = file.path.read_text().splitlines(keepends=True)
    file.on_log(args, state, TrainerControl(), logs={"train_runtime": 1.0})
    with file.path.open("a") as handle:
        handle.write('{"step": 4, "lo')  # killed while writing
    assert len(read_metrics(file.path)) == 5
    history = [{"loss": float(step), "step": step} for step in (0, 1, 2)]
    resumed = TrainerState(is_world_process_zero=True, global_step=2, log_history=history)
    MetricsFile(tmp_path).on_train_begin(args, resumed, TrainerControl())
    assert file.path.read_text() == "".join(first[:3])
    new = TrainerState(is_world_process_zero=True)
    MetricsFile(tmp_path).on_train_begin(args, new, TrainerControl())
    assert file.path.read_text() == ""
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_the_plot_shows_loss_and_accuracy(tmp_path: Path, monkeypatch: Any) -> None:
    drawn: list[tuple[str, str, str]] = []
    plot = Axes.plot

    def record(axis: Axes, x: Any, y: Any, style: str, **look: Any) -> Any:
        drawn.append((axis.get_title() or "?", style, look["c"]))
        return plot(axis, x, y, style, **look)

    monkeypatch.setattr(Axes, "plot", record)
    rows = [
        {"step": 0, "eval_loss": 2.0, "eval_rewards/accuracies": 0.5},
        *({"step": s, "loss": 2.0 / s, "rewards/accuracies": 0.5 + s / 20} for s in range(1, 9)),
        {"step": 8, "eval_loss": None, "eval_rewards/accuracies": 0.9},
    ]
    path = plot_metrics(rows, tmp_path / "curves.png", "a title")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000
    # A colour for a split, and no line between the values of the start and the end alone.
    assert [(style, colour) for _, style, colour in drawn] == [
        ("o-", "C0"), ("o", "C1"), ("o-", "C0"), ("o", "C1"),
    ]  # fmt: skip
    assert [title for title, *_ in TRAINING_PANELS] == [
        "loss", "ranking term alone", "ranking accuracy",
    ]  # fmt: skip
    empty = plot_metrics([], tmp_path / "empty.png", "nothing logged")
    assert empty.stat().st_size < path.stat().st_size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "empty.png"]


def test_the_table_shows_what_is_known() -> None:
    table = summary_table(
        {
            "held out": (None, {"loss": 0.5, "rewards/accuracies": 0.75}),
            "training split": ({"loss": 1.0}, {"loss": 0.25}),
        }
    )
    lines = table.splitlines()
    assert lines[2].split() == ["loss", "-", "0.5000", "1.0000", "0.2500"]
    assert lines[3].split() == ["rewards/accuracies", "-", "0.7500", "-", "-"]
    assert len(lines) == 4


# ---- splits ----------------------------------------------------------------------------------


def _groups(prompts: list[int]) -> list[Group]:
    return [Group([p], [[1], [2]], [0.0, 1.0], name=str(i)) for i, p in enumerate(prompts)]


def test_a_prompt_is_never_on_both_sides() -> None:
    groups = _groups([i % 20 for i in range(60)])
    train, heldout = split_by_prompt(groups, 0.25, seed=1)
    assert len(train) == 45 and len(heldout) == 15
    assert shared_prompts(train, heldout) == 0
    assert [int(g.name) for g in heldout] == sorted(int(g.name) for g in heldout)
    again = split_by_prompt(list(groups), 0.25, seed=1)
    assert [g.name for g in again[1]] == [g.name for g in heldout]
    assert [g.name for g in split_by_prompt(groups, 0.25, seed=2)[1]] != [g.name for g in heldout]
    assert shared_prompts(groups[:20], groups[15:25]) == 10


def test_the_ends_of_the_fraction() -> None:
    groups = _groups([1, 2, 3])
    assert split_by_prompt(groups, 0.0, seed=1)[1] == []
    assert len(split_by_prompt(groups, 0.01, seed=1)[1]) == 1
    assert len(split_by_prompt(groups, 0.99, seed=1)[0]) == 1
    with pytest.raises(InputError, match="eval_fraction must be at least 0 and below 1, got 1"):
        split_by_prompt(groups, 1.0, seed=1)
    with pytest.raises(InputError, match="needs at least 2 different ones, got 1"):
        split_by_prompt(_groups([7, 7]), 0.5, seed=1)


def test_a_sample_is_seeded_and_in_order() -> None:
    groups = _groups(list(range(50)))
    chosen = choose_groups(groups, 10, seed=4)
    assert len(chosen) == 10
    assert [int(g.name) for g in chosen] == sorted(int(g.name) for g in chosen)
    assert [g.name for g in choose_groups(groups, 10, seed=4)] == [g.name for g in chosen]
    assert choose_groups(groups, 99, seed=4) == groups
