"""`sample_file`: mixtures, duplicates, empty generations, and the same file after a kill."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from killing import run_until_lines
from transformers import AutoTokenizer

from fastrank.data.load import load_groups
from fastrank.data.report import CUT_SAMPLE
from fastrank.errors import InputError
from fastrank.options import LoadOptions, TemplateOptions
from fastrank.workflow import policy
from fastrank.workflow.items import read_items
from fastrank.workflow.journal import Journal
from fastrank.workflow.reward import RewardOptions, reward_file
from fastrank.workflow.reward_model import LogprobReward
from fastrank.workflow.sample import SampleOptions, sample_file, sample_text

PROMPTS = [{"prompt": "once " * (k % 5 + 1) + str(k), "id": k} for k in range(23)]


def draw(models, prompts: Path, output: Path, **options):
    options = {"max_new_tokens": 6, "batch_size": 4, "num_responses": 3, **options}
    paths = [str(m) for m in (models if isinstance(models, list) else [models])]
    return sample_file(
        SampleOptions(model=paths, prompts=str(prompts), output=str(output), **options)
    )


def test_every_prompt_gets_responses_in_its_place(policy_path, write_rows, read_rows, tmp_path):
    output = tmp_path / "out.jsonl"
    result = draw(policy_path, write_rows(PROMPTS), output)
    rows = read_rows(output)
    assert [(row["prompt"], row["id"]) for row in rows] == [(p["prompt"], p["id"]) for p in PROMPTS]
    assert result["prompts"] == 23
    new = sum(len(row["responses"]) for row in rows)
    assert result["responses"] == result["responses_new"] == new
    assert new + result["duplicates"] + result["empty"] == 69
    assert all(row["scores"] == [None] * len(row["responses"]) for row in rows)
    assert all(set(row["sources"]) <= {str(policy_path)} for row in rows)
    assert not (tmp_path / "out.jsonl.partial").exists()
    assert "23 prompts" in sample_text(result)


def test_the_same_seed_gives_the_same_file(policy_path, write_rows, tmp_path):
    prompts = write_rows(PROMPTS)
    outputs = [tmp_path / f"{name}.jsonl" for name in "abc"]
    for output, seed in zip(outputs, (1, 1, 2), strict=True):
        draw(policy_path, prompts, output, seed=seed)
    first, second, other = (output.read_bytes() for output in outputs)
    assert first == second != other


def test_several_policies_and_the_files_own_responses_are_mixed(
    policy_path, other_policy_path, write_rows, read_rows, tmp_path
):
    rows = [
        {"prompt": "a b", "responses": ["mine", "", None], "scores": [0.5, 1.0, None]},
        {"prompt": "c", "responses": ["yours"]},
        {"query": "d", "responses": ["theirs"], "scores": [2]},
        {"prompt": "e", "chosen": "good", "rejected": "bad"},
        {"instruction": "f"},
    ]
    output = tmp_path / "out.jsonl"
    result = draw([policy_path, other_policy_path], write_rows(rows), output)
    found = read_rows(output)
    assert [row["prompt"] for row in found] == ["a b", "c", "d", "e", "f"]
    assert [row["responses"][0] for row in found[:4]] == ["mine", "yours", "theirs", "good"]
    assert [row["scores"][0] for row in found[:4]] == [0.5, None, 2.0, None]
    assert found[3]["responses"][1] == "bad" and found[3]["sources"][:2] == ["data", "data"]
    assert not {"chosen", "rejected", "query", "instruction"} & {k for row in found for k in row}
    assert result["responses_from_file"] == 5
    for row in found:
        assert {str(policy_path), str(other_policy_path)} <= set(row["sources"])
    # The second policy's draws do not depend on the first one's.
    alone = tmp_path / "alone.jsonl"
    draw([policy_path], write_rows(rows), alone)
    for row, single in zip(found, read_rows(alone), strict=True):
        of_first, own = (
            [
                response
                for response, source in zip(line["responses"], line["sources"], strict=True)
                if source == str(policy_path)
            ]
            for line in (row, single)
        )
        assert of_first == own


def test_whole_messages_and_turns_of_the_file_stay_as_they_are(
    policy_path, write_rows, read_rows, tmp_path
):
    turn = {"role": "assistant", "content": "a", "reasoning_content": "r"}
    talk = [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}, turn]
    rows = [{"prompt": "q", "responses": [talk, turn, "d", talk, turn], "scores": [3, 2, 1, 0, 0]}]
    output = tmp_path / "out.jsonl"
    result = draw([policy_path], write_rows(rows), output)
    (row,) = read_rows(output)
    assert row["prompt"] == [{"role": "user", "content": "q"}]
    assert row["responses"][:3] == [talk, turn, "d"] and row["scores"][:3] == [3, 2, 1]
    assert result["duplicates"] == 2 and result["responses_new"] >= 1
    assert all(isinstance(response, str) for response in row["responses"][3:])


def test_an_output_can_be_sampled_for_again(policy_path, write_rows, read_rows, tmp_path):
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    draw(policy_path, write_rows(PROMPTS), first)
    result = draw(policy_path, first, second, seed=9)
    for before, after in zip(read_rows(first), read_rows(second), strict=True):
        n = len(before["responses"])
        assert after["responses"][:n] == before["responses"]
        assert after["sources"][:n] == before["sources"]
    assert result["responses_from_file"] == sum(len(row["responses"]) for row in read_rows(first))


def test_duplicates_go_until_one_candidate_is_left(policy_path, write_rows, read_rows, tmp_path):
    output = tmp_path / "out.jsonl"
    result = draw(policy_path, write_rows(PROMPTS), output, top_p=1e-6, num_responses=5)
    rows = read_rows(output)
    assert all(len(row["responses"]) <= 1 for row in rows)
    assert result["prompts_with_fewer_than_2"] == 23
    assert result["duplicates"] + result["empty"] + result["responses_new"] == 115
    assert result["duplicates"] >= 60
    assert "fewer than 2 responses" in sample_text(result)


def test_empty_generations_are_counted_and_the_prompt_stays(write_rows, read_rows, tmp_path):
    silent = tiny_models.save_silent_model(tmp_path / "silent")
    output = tmp_path / "out.jsonl"
    result = draw(silent, write_rows(PROMPTS[:5]), output)
    assert [row["responses"] for row in read_rows(output)] == [[]] * 5
    assert result["empty"] == 15 and result["responses"] == 0 and result["tokens"] == 15


def test_chat_prompts_go_through_the_template(write_rows, read_rows, tmp_path):
    path = tiny_models.save_llama(tmp_path / "chat", chat_template=tiny_models.CHAT)
    rows = [{"prompt": [{"role": "user", "content": "hi"}]}, {"prompt": "hi"}]
    both, asked = tmp_path / "both.jsonl", tmp_path / "asked.jsonl"
    draw(path, write_rows(rows), both, batch_size=1, num_responses=2)
    as_text, as_chat = read_rows(both)[1], read_rows(both)[0]
    assert as_text["responses"] != as_chat["responses"]
    assert all(text == text.strip() for text in as_chat["responses"])
    draw(path, write_rows(rows), asked, batch_size=1, num_responses=2, as_chat=True, top_p=1e-6)
    again = read_rows(asked)
    assert again[0]["responses"] == again[1]["responses"]  # now the same conversation


def test_long_prompts_lose_their_beginning(policy_path, write_rows, tmp_path):
    rows = [{"prompt": "x" * 300}, {"prompt": "x"}]
    result = draw(policy_path, write_rows(rows), tmp_path / "out.jsonl", max_new_tokens=20)
    assert result["prompts_truncated"] == 1
    with pytest.raises(InputError, match="max_new_tokens must be below the model's context of 128"):
        draw(policy_path, write_rows(rows), tmp_path / "other.jsonl", max_new_tokens=128)


def test_a_killed_run_goes_on_and_ends_with_the_same_file(policy_path, write_rows, tmp_path):
    rows = [{"prompt": "word " * (k % 7 + 1) + str(k)} for k in range(60)]
    prompts = write_rows(rows)
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    options = {"max_new_tokens": 40, "batch_size": 2, "num_responses": 3, "seed": 4}
    draw(policy_path, prompts, whole, **options)

    journal = tmp_path / "killed.jsonl.partial"
    arguments = ["sample", "--model", str(policy_path), "--prompts", str(prompts)]
    arguments += ["--output", str(killed)]
    arguments += [part for key, value in options.items() for part in (f"--{key}", str(value))]
    run_until_lines(arguments, journal, lines=7)
    assert not killed.exists()
    kept = journal.read_bytes()
    with journal.open("ab") as file:
        file.write(b'{"key": "0/29", "value": {"respon')  # as if the kill had torn a line

    result = draw(policy_path, prompts, killed, **options)
    assert killed.read_bytes() == whole.read_bytes()
    finished = kept.count(b"\n") - 2  # the plans of the run and of the policy
    assert result["prompts_resumed"] == 2 * finished
    assert 0 < result["prompts_resumed"] < 60
    assert not journal.exists()


@pytest.fixture
def stop_after(monkeypatch):
    """Let sampling break off after so many batches; returns the list of batches drawn."""
    real = policy.generate

    def limit(count: int) -> list[Any]:
        drawn: list[Any] = []

        def generate(model, tokenizer, batch, *rest):
            if len(drawn) == count:
                raise InputError("stop here")
            drawn.append(batch)
            return real(model, tokenizer, batch, *rest)

        monkeypatch.setattr(policy, "generate", generate)
        return drawn

    return limit


def test_finished_batches_are_not_drawn_again(policy_path, write_rows, tmp_path, stop_after):
    prompts, output = write_rows(PROMPTS), tmp_path / "out.jsonl"
    seen = stop_after(3)
    with pytest.raises(InputError, match="stop here"):
        draw(policy_path, prompts, output)
    assert not output.exists() and (tmp_path / "out.jsonl.partial").exists()
    later = stop_after(99)
    assert draw(policy_path, prompts, output)["prompts_resumed"] == 12
    done = [tuple(ids) for batch in seen + later for ids in batch]
    assert len(done) == len(set(done)) == 23


def test_another_run_does_not_take_up_unfinished_work(
    policy_path, write_rows, tmp_path, stop_after
):
    prompts, output = write_rows(PROMPTS), tmp_path / "out.jsonl"
    stop_after(1)
    with pytest.raises(InputError, match="stop here"):
        draw(policy_path, prompts, output)
    with pytest.raises(InputError, match="run with another seed"):
        draw(policy_path, prompts, output, seed=1)
    with pytest.raises(InputError, match="run with another batch size"):
        draw(policy_path, prompts, output, batch_size=5)
    stop_after(99)
    result = draw(policy_path, prompts, output, seed=1, partial="discard")
    assert result["prompts_resumed"] == 0


def test_a_damaged_journal_is_refused(policy_path, write_rows, tmp_path):
    journal = tmp_path / "out.jsonl.partial"
    journal.write_bytes(b'{"plan": {}}\nnot json\n{"key": "0/0", "value": 1}\n')
    with pytest.raises(InputError, match="another prompts file"):
        draw(policy_path, write_rows(PROMPTS), tmp_path / "out.jsonl")
    with pytest.raises(InputError, match="line 2 is damaged"):
        Journal(tmp_path / "out.jsonl", {})


def test_one_journal_serves_one_run(tmp_path):
    with Journal(tmp_path / "out.jsonl", {"a": 1}):
        with pytest.raises(InputError, match="partial is being written by this process already"):
            Journal(tmp_path / "out.jsonl", {"a": 1})


def test_input_and_output_must_differ(policy_path, write_rows):
    prompts = write_rows(PROMPTS)
    with pytest.raises(InputError, match="--output must be another file than --prompts"):
        draw(policy_path, prompts, prompts)


def test_rows_of_a_flat_file_are_one_prompt(write_rows):
    rows = [{"prompt": "a", "response": f"r{k}", "score": k} for k in range(3)]
    (item,) = read_items(write_rows(rows))
    assert item.responses == ["r0", "r1", "r2"] and item.scores == [0.0, 1.0, 2.0]


def test_what_json_lacks_is_written_as_text(tmp_path, policy_path, read_rows):
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    table = pa.table({"prompt": ["a", "b"], "day": [datetime.date(2024, 1, k) for k in (1, 2)]})
    pq.write_table(table, path)
    draw(policy_path, path, tmp_path / "out.jsonl")
    assert [row["day"] for row in read_rows(tmp_path / "out.jsonl")] == ["2024-01-01", "2024-01-02"]
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["prompt"] == "a"


def test_a_cut_sample_is_never_taught_an_end(policy_path, write_rows, read_rows, tmp_path):
    prompts = write_rows([PROMPTS[0] | {"responses": ["mine"]}, *PROMPTS[1:8]])
    output, ranked = tmp_path / "out.jsonl", tmp_path / "ranked.jsonl"
    result = draw(policy_path, prompts, output, max_new_tokens=5, stop=["e"])
    rows = read_rows(output)
    ends = [end for row in rows for end in row["ended"]]
    assert rows[0]["ended"][0] is None and ends.count(None) == 1
    assert 0 < ends.count("length") <= result["cut_at_max_new_tokens"] < len(ends)
    function = tmp_path / "size.py"
    function.write_text("def size(prompt, response):\n    return len(response)\n")
    reward_file(RewardOptions(data=str(output), output=str(ranked), reward=f"{function}:size"))
    assert [row["ended"] for row in read_rows(ranked)] == [row["ended"] for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(policy_path)
    groups, report = load_groups(ranked, tokenizer, min_candidates=1)
    taught = [ids[-1] == tokenizer.eos_token_id for g in groups for ids in g.response_ids]
    assert taught == [end != "length" for end in ends]
    assert len(report.counts[CUT_SAMPLE]) == ends.count("length")
    assert f"{ends.count('length')} responses cut at a limit" in report.as_text()
    scorer = LogprobReward(
        str(policy_path), LoadOptions(device="cpu"), batch_size=1, template=TemplateOptions()
    )
    items = list(read_items(ranked))
    whole = scorer([replace(item, ended=[True] * len(item.ended)) for item in items])
    for item, cut, other in zip(items, scorer(items), whole, strict=True):
        same = [a == pytest.approx(b, abs=1e-5) for a, b in zip(cut, other, strict=True)]
        assert same == [end is not False for end in item.ended]
