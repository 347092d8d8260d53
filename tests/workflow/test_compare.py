"""The comparison at tiny sizes: every method runs, and table and claims follow from the rows."""

from __future__ import annotations

import csv

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import compare, story_task, tables
from bench.compare import Outcome, claims, comparison_table, outcome_table
from bench.happy_reward import reward
from fastrank.benchmarks.results import read_csv


def row(method: str, seed: int, reward: float, perplexity: float) -> Outcome:
    return Outcome(method, seed, reward, 0.1, perplexity, 0.5)


@pytest.fixture
def run(policy_path, tmp_path, vowels):
    """A function that runs a comparison of tiny sizes in this process; its rows."""

    def compare_methods(name: str, *options: str) -> list[Outcome]:
        sizes = {"prompts": 6, "heldout": 3, "samples": 3, "tokens": 8, "batch_size": 3, "seeds": 1}
        folders = {"output": tmp_path / "out", "work": tmp_path / "work", "model": policy_path}
        given = {**sizes, **folders, "jobs": 1}
        arguments = [part for key, value in given.items() for part in (f"--{key}", str(value))]
        assert compare.main([*arguments, *options]) == 0
        return read_csv(tmp_path / "out" / f"{name}.csv", Outcome)

    return compare_methods


def test_every_method_runs_and_the_files_agree(run, tmp_path, capsys):
    rows = run("compare")
    out = tmp_path / "out"
    assert [r.method for r in rows] == [compare.BASE, *compare.OFFLINE]
    with (out / "compare.csv").open() as file:
        first = next(csv.DictReader(file))
    assert first["prompts"] == "6" and first["commit"] and first["date"]
    table = (out / "compare.md").read_text()
    assert table.startswith(outcome_table(rows)) and table in capsys.readouterr().out
    assert "6 prompts with 3 samples of 8 tokens, 3 prompts held out" in table
    page = "before\n<!-- table: compare -->\nold\n<!-- end -->\nafter\n"
    marked = f"before\n<!-- table: compare -->\n{table}<!-- end -->\nafter\n"
    assert tables.fill(page, out) == marked and comparison_table(out / "compare.csv") == table
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    # Every method starts from the base model and really trains.
    base = [r for r in rows if r.method == compare.BASE]
    for method in compare.OFFLINE:
        found = [r for r in rows if r.method == method]
        assert [r.perplexity for r in found] != [r.perplexity for r in base], method


@pytest.fixture
def vowels(tmp_path, monkeypatch):
    """A reward that tells the texts of a random model apart: it writes no happy words."""
    path = tmp_path / "vowels.py"
    path.write_text("def reward(p, r):\n    return sum(c in 'aeiou' for c in r) - len(r) / 9\n")
    monkeypatch.setattr(compare, "REWARD", f"{path}:reward")


@pytest.mark.slow
def test_online_methods_run_beside_offline_ones(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "EVERY", 1)
    for name in ("offline RRHF, online settings", "online RRHF", "online RRHF with penalty"):
        faster = {**compare.METHODS[name], "learning_rate": 2e-2}
        monkeypatch.setitem(compare.METHODS, name, faster)
    rows = run("compare_online", "--online")
    assert [r.method for r in rows] == [compare.BASE, *compare.ONLINE]
    figures = [(r.reward, r.perplexity, r.accuracy) for r in rows]
    assert len(set(figures)) == 5
    assert (tmp_path / "out" / "online_RRHF.png").read_bytes().startswith(b"\x89PNG")
    assert "drifts further" in capsys.readouterr().out


def test_the_table_gives_means_and_spread():
    rows = [row("base model", 0, 1.0, 4.0), row("base model", 1, 2.0, 6.0), row("RRHF", 0, 5, 321)]
    lines = outcome_table(rows).splitlines()
    assert lines[2] == "| base model | 1.50 ± 0.71 | 5.0 ± 1.4 | 0.500 ± 0.000 |"
    assert lines[3] == "| RRHF | 5.00 | 321 | 0.500 |"


def test_a_figure_that_is_none_is_shown_as_such():
    rows = [row("RRHF", 0, float("nan"), 4.0), row("RRHF", 1, 2.0, 4.0)]
    assert "| nan ± nan | 4.0 ± 0.0 |" in outcome_table(rows)


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (
            [(compare.BASE, 1.0, 4.0), ("SFT on the best", 2.9, 4.0), ("RRHF", 3.0, 5.0),
             ("RRHF without SFT", 9.0, 50.0)],
            [(compare.BASE, 1.1, 4.0), ("SFT on the best", 3.1, 4.0), ("RRHF", 3.0, 5.0),
             ("RRHF without SFT", 9.0, 49.0)],
        ),
        (
            [("online RRHF with penalty", 3.0, 8.0), ("offline RRHF", 3.0, 8.0),
             ("online RRHF", 9.0, 9.0)],
            [("online RRHF with penalty", 3.0, 8.0), ("offline RRHF", 3.1, 7.9),
             ("online RRHF", 9.0, 8.0)],
        ),
    ],
    ids=["stored", "online"],
)  # fmt: skip
def test_claims_follow_the_rows(good: list, bad: list):
    for rows, expected in ((good, True), (bad, False)):
        found = claims([row(method, 0, *figures) for method, *figures in rows])
        assert [holds for _, holds in found] == [expected] * 3
    assert claims([row(method, 0, *figures) for method, *figures in good[:1]]) == []


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


@pytest.mark.parametrize("options", compare.METHODS.values(), ids=compare.METHODS)
def test_methods_name_losses_that_exist(options):
    from fastrank import loss_from_name

    assert loss_from_name(options.get("loss", "rrhf"), **options.get("loss_kwargs", {}))


def test_sft_on_the_best_is_the_best_responses_language_model_loss(policy_path, tmp_path):
    """RRHF with a margin far below 0 is what the comparison calls SFT: the mean token loss of the
    best response."""
    import torch

    from fastrank import Group, loss_from_name, pack, prepare_model

    model = AutoModelForCausalLM.from_pretrained(policy_path, dtype=torch.float32)
    ids = torch.tensor([7, 9, 30, 41, 2])
    expected = model(ids[None], labels=torch.tensor([[-100, -100, 30, 41, 2]])).loss
    responses = (torch.tensor([11, 3]), ids[2:], torch.tensor([5, 5, 5]))
    group = Group(ids[:2], responses, torch.tensor([1.0, 3.0, -2.0]))
    prepare_model(model)
    (packed,) = pack([group], max_tokens=64)
    loss = loss_from_name("rrhf", **compare.METHODS["SFT on the best"]["loss_kwargs"])
    out = model(pack=packed, loss=loss)
    torch.testing.assert_close(out.loss, expected)
    assert out.rank_loss == 0
