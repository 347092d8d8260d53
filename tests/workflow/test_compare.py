"""The comparison at tiny sizes: every method runs, and table and claims follow from the rows."""

from __future__ import annotations

import csv

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import compare, compare_online, story_task
from bench.compare_report import Row, claims, fill, markdown_table, read_csv
from bench.happy_reward import reward


def row(method: str, seed: int, reward: float, perplexity: float) -> Row:
    return Row(method, seed, reward, 0.1, perplexity, 0.5, 3.0)


def test_every_method_runs_and_the_files_agree(policy_path, tmp_path, capsys, vowels):
    sizes = {"prompts": 6, "heldout": 3, "samples": 3, "tokens": 8, "batch_size": 3, "seeds": 1}
    arguments = [part for key, value in sizes.items() for part in (f"--{key}", str(value))]
    folders = ["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- comparison -->\nold\n<!-- /comparison -->\nafter\n")
    folders += ["--readme", str(readme)]
    assert compare.main(["--model", str(policy_path), "--jobs", "1", *arguments, *folders]) == 0
    rows = read_csv(tmp_path / "out" / "compare.csv")
    assert [r.method for r in rows] == [compare.BASE, *compare.METHODS]
    with (tmp_path / "out" / "compare.csv").open() as file:
        first = next(csv.DictReader(file))
    assert first["prompts"] == "6" and first["commit"] and first["date"]
    table = (tmp_path / "out" / "compare.md").read_text()
    assert table.startswith(markdown_table(rows)) and table in capsys.readouterr().out
    assert "6 prompts with 3 samples of 8 tokens, 3 prompts held out" in table
    marked = f"before\n<!-- comparison -->\n{table}<!-- /comparison -->\nafter\n"
    assert readme.read_text() == marked
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    # Every method starts from the base model and really trains.
    base = [r for r in rows if r.method == compare.BASE]
    for method in compare.METHODS:
        found = [r for r in rows if r.method == method]
        assert [r.perplexity for r in found] != [r.perplexity for r in base], method
        assert all(r.train_seconds > 0 for r in found)


@pytest.fixture
def vowels(tmp_path, monkeypatch):
    """A reward that tells the texts of a random model apart: it writes no happy words."""
    path = tmp_path / "vowels.py"
    path.write_text("def reward(p, r):\n    return sum(c in 'aeiou' for c in r) - len(r) / 9\n")
    monkeypatch.setattr(compare, "REWARD", f"{path}:reward")


@pytest.mark.slow
def test_online_methods_run_beside_offline_ones(policy_path, tmp_path, capsys, vowels, monkeypatch):
    monkeypatch.setattr(compare_online, "EVERY", 1)
    faster = {name: {**o, "learning_rate": 2e-2} for name, o in compare_online.METHODS.items()}
    faster["offline RRHF"] = {}
    monkeypatch.setattr(compare_online, "METHODS", faster)
    sizes = {"prompts": 6, "heldout": 3, "samples": 3, "tokens": 8, "batch_size": 3, "seeds": 1}
    arguments = [part for key, value in sizes.items() for part in (f"--{key}", str(value))]
    folders = ["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    arguments += ["--model", str(policy_path), "--jobs", "1", *folders]
    assert compare_online.main(arguments) == 0
    rows = read_csv(tmp_path / "out" / "compare_online.csv")
    assert [r.method for r in rows] == [compare.BASE, *compare_online.METHODS]
    figures = [(r.reward, r.perplexity, r.accuracy) for r in rows]
    assert len(set(figures)) == 5
    assert (tmp_path / "out" / "online_RRHF.png").read_bytes().startswith(b"\x89PNG")
    assert "drifts further" in capsys.readouterr().out


def test_claims_about_online_training_follow_the_rows():
    good = [
        row("offline RRHF", 0, 3.0, 8.0),
        row("online RRHF", 0, 9.0, 9.0),
        row("online RRHF with penalty", 0, 3.0, 8.0),
    ]
    assert [holds for _, holds in compare_online.claims(good)] == [True, True, True]
    bad = [
        row("offline RRHF", 0, 3.1, 7.9),
        row("online RRHF", 0, 9.0, 8.0),
        row("online RRHF with penalty", 0, 3.0, 8.0),
    ]
    assert [holds for _, holds in compare_online.claims(bad)] == [False, False, False]
    assert compare_online.claims(good[:2]) == []


def test_a_file_without_the_marks_is_refused():
    with pytest.raises(ValueError, match="expected <!-- comparison --> and <!-- /comparison -->"):
        fill("no marks", "comparison", "table")


def test_the_table_gives_means_and_spread():
    rows = [row("base model", 0, 1.0, 4.0), row("base model", 1, 2.0, 6.0), row("RRHF", 0, 5, 321)]
    lines = markdown_table(rows).splitlines()
    assert lines[2] == "| base model | 1.50 ± 0.71 | 5.0 ± 1.4 | 0.500 ± 0.000 |"
    assert lines[3] == "| RRHF | 5.00 | 321 | 0.500 |"


def test_a_figure_that_is_none_is_shown_as_such():
    rows = [row("RRHF", 0, float("nan"), 4.0), row("RRHF", 1, 2.0, 4.0)]
    assert "| nan ± nan | 4.0 ± 0.0 |" in markdown_table(rows)


def test_claims_follow_the_rows():
    good = [
        row("base model", 0, 1.0, 4.0),
        row("SFT on the best", 0, 2.9, 4.0),
        row("RRHF", 0, 3.0, 5.0),
        row("RRHF without SFT", 0, 9.0, 50.0),
    ]
    assert [holds for _, holds in claims(good)] == [True, True, True]
    bad = [
        row("base model", 0, 1.1, 4.0),
        row("SFT on the best", 0, 3.1, 4.0),
        row("RRHF", 0, 3.0, 5.0),
        row("RRHF without SFT", 0, 9.0, 49.0),
    ]
    assert [holds for _, holds in claims(bad)] == [False, False, False]
    assert claims(good[:1]) == []


def test_the_reward_counts_happy_less_sad_words():
    assert reward("", "They PLAYED. A friend, sad; unhappy happiness") == 1.0
    assert reward("", "") == 0.0


def test_openings_are_different_and_seeded():
    found = story_task.openings(400)
    assert len(set(found)) == 400 and found == story_task.openings(400)
    assert found[:10] != story_task.openings(400, seed=1)[:10]


def test_without_the_pretrained_model_one_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(story_task, "PRETRAINED", tmp_path / "absent")
    path = story_task.story_model(tmp_path / "own", steps=3)
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert 100_000 < model.num_parameters() < 400_000
    story = story_task.grammar_stories(1)[0]
    assert tokenizer.decode(tokenizer(story)["input_ids"], skip_special_tokens=True) == story
    before = (path / "model.safetensors").stat().st_mtime_ns
    assert story_task.story_model(tmp_path / "own") == path
    assert (path / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("method", list(compare.METHODS))
def test_methods_name_losses_that_exist(method):
    from fastrank import loss_from_name

    name, options, candidates = compare.METHODS[method]
    assert loss_from_name(name, **options) and candidates in ("best", "all")


def test_sft_on_the_best_is_the_best_responses_language_model_loss(policy_path, tmp_path):
    """What the comparison calls SFT: groups of one, whose RRHF loss is the mean token loss."""
    import torch

    from fastrank import RRHF, Group, pack, prepare_model

    model = AutoModelForCausalLM.from_pretrained(policy_path, dtype=torch.float32)
    ids = torch.tensor([7, 9, 30, 41, 2])
    group = Group(ids[:2], (ids[2:],), torch.tensor([3.0]))
    expected = model(ids[None], labels=torch.tensor([[-100, -100, 30, 41, 2]])).loss
    prepare_model(model)
    (packed,) = pack([group], max_tokens=64)
    found = model(pack=packed, loss=RRHF()).loss
    torch.testing.assert_close(found, expected)
