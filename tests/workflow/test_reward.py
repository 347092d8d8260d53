"""`reward_file`: functions that work, raise or return NaN, models, ties, and kills."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import tiny_models
import torch
from chat_templates import CALLS
from chat_templates import answer as said
from killing import run_until_lines
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import fastrank
from fastrank.cli.main import main
from fastrank.data.load import load_groups
from fastrank.data.records import read_records
from fastrank.data.render import PLAIN
from fastrank.errors import InputError
from fastrank.workflow.reward import RewardOptions, reward_file, reward_text

ROWS = [
    {"prompt": "a", "responses": ["x", "yy", "zzz"], "scores": [None, None, None], "id": "first"},
    {"prompt": "b", "responses": ["same", "also"], "scores": [9.0, 9.0]},
    {"prompt": [{"role": "user", "content": "c"}], "responses": ["", "one", None], "note": 1},
    {"prompt": "d", "responses": []},
]

FUNCTIONS = """
import helper

def length(prompt, response):
    return len(response)

def tied(prompt, response):
    return helper.CONSTANT

def asks(prompt, response):
    return float(isinstance(prompt, list))

def raises(prompt, response):
    if response == "also":
        return {}[response]
    return 1

def empty_error(prompt, response):
    raise RuntimeError

def nan(prompt, response):
    return float("nan") if prompt == "b" else 0.0

def text(prompt, response):
    return "3"

def nothing(prompt, response):
    pass

def huge(prompt, response):
    return 1e39 if prompt == "b" else 1

NUMBER = 3
"""


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("CONSTANT = 2.5\n")
    path = tmp_path / "rewards.py"
    path.write_text(FUNCTIONS)
    return path


def score(data: Path, output: Path, reward: str, **options):
    return reward_file(RewardOptions(data=str(data), output=str(output), reward=reward, **options))


def test_a_function_scores_every_response(functions, write_rows, read_rows, tmp_path):
    output = tmp_path / "out.jsonl"
    result = score(write_rows(ROWS), output, f"{functions}:length")
    rows = read_rows(output)
    assert [row["scores"] for row in rows] == [[1.0, 2.0, 3.0], [4.0, 4.0], [3.0], []]
    assert [row["responses"] for row in rows][2] == ["one"]
    assert rows[0]["id"] == "first" and rows[2]["note"] == 1
    assert result["mean"] == pytest.approx(17 / 6) and result["range"] == [1.0, 4.0]
    assert result["records_with_an_order"] == 1 and result["records"] == 4
    assert result["mean_of_best"] == pytest.approx(10 / 3)
    assert "1 of 4 records" in reward_text(result)
    assert not list(tmp_path.glob("*.partial"))


def test_messages_reach_the_function_as_messages(functions, write_rows, read_rows, tmp_path):
    score(write_rows(ROWS), tmp_path / "out.jsonl", f"{functions}:asks")
    assert [row["scores"] for row in read_rows(tmp_path / "out.jsonl")] == [
        [0.0] * 3,
        [0.0] * 2,
        [1.0],
        [],
    ]


def test_tied_rewards_are_written_and_counted(functions, write_rows, tmp_path):
    output = tmp_path / "out.jsonl"
    result = score(write_rows(ROWS), output, f"{functions}:tied")
    assert result["records_with_an_order"] == 0 and result["mean"] == 2.5
    assert [record.scores for record in read_records(output)] == [[2.5] * 3, [2.5] * 2]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("raises", r"line 2: response 2: rewards.py:raises raised KeyError: 'also' \(line 15\)"),
        ("nan", "rows.jsonl, line 2: response 1: rewards.py:nan returned nan, expected a finite"),
        ("empty_error", "line 1: response 1: rewards.py:empty_error raised RuntimeError"),
        ("text", "rows.jsonl, line 1: response 1: rewards.py:text returned '3', expected a finite"),
        ("huge", "line 2: response 1: .*:huge gave 1e.39, expected a finite number within"),
        ("nothing", "rows.jsonl, line 1: response 1: rewards.py:nothing returned None"),
        ("NUMBER", "rewards.py: no function 'NUMBER' in it"),
        ("absent", "rewards.py: no function 'absent' in it"),
        ("", "reward must be FILE.py:function"),
    ],
)  # fmt: skip
def test_a_failing_function_is_one_line_and_nothing_half_written(
    functions, write_rows, tmp_path, function, said
):
    data, output = write_rows(ROWS), tmp_path / "out.jsonl"
    with pytest.raises(InputError, match=said) as caught:
        score(data, output, f"{functions}:{function}")
    assert "\n" not in str(caught.value)
    assert not output.exists()


#: What a function may do to the process that calls it, in the body of the function or of the file.
MISDEEDS = [
    ("sys.exit(0)", r"called sys.exit\(0\) \(line \d+\), expected it to return"),
    ("sys.exit('done')", r"called sys.exit\('done'\)"),
    ("raise GeneratorExit", "raised GeneratorExit"),
    ("raise type('Own', (BaseException,), {})('why')", r"raised Own: why \(line \d+\)"),
    ("os.chdir(os.sep)", "changed the working folder to /, expected it to stay"),
]


@pytest.mark.parametrize("where", ["function", "file"])
def test_what_a_function_does_to_the_process_is_one_line(
    where, write_rows, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    data = write_rows(ROWS)
    body = {"function": "    {}\n    return 1", "file": "    return 1\n{}"}[where]
    for number, (deed, message) in enumerate(MISDEEDS):
        file = tmp_path / f"deed_{where}_{number}.py"
        file.write_text(f"import os, sys\ndef f(prompt, response):\n{body.format(deed)}\n")
        arguments = ["reward", "--data", str(data), "--output", "out.jsonl", "--json"]
        assert main([*arguments, "--reward", f"{file}:f"]) == 2
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if not line.startswith("rewarding")]
        assert out == "" and len(lines) == 1 and re.search(message, lines[0]), err
        assert Path.cwd() == tmp_path and not (tmp_path / "out.jsonl").exists()
    file.write_text("def f(prompt, response):\n    raise KeyboardInterrupt\n")
    assert main([*arguments, "--reward", f"{file}:f"]) == 130  # as a person's Ctrl-C in it


def test_what_a_function_prints_does_not_reach_the_result(write_rows, tmp_path, capsys):
    file = tmp_path / "prints.py"
    file.write_text(
        "print('loaded', end='')\n"
        "def f(prompt, response):\n    print(response, end='')\n    return len(response)\n"
    )
    arguments = ["reward", "--data", str(write_rows(ROWS)), "--output", str(tmp_path / "o.jsonl")]
    assert main([*arguments, "--reward", f"{file}:f", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["records"] == 4
    assert "loaded" in err and "zzz" in err


def test_a_file_that_is_there_is_replaced_only_when_asked(functions, write_rows, tmp_path):
    data, output = write_rows(ROWS), tmp_path / "out.jsonl"
    output.write_text("of another command")
    with pytest.raises(InputError, match="out.jsonl is there already: pass --overwrite to replace"):
        score(data, output, f"{functions}:length")
    assert output.read_text() == "of another command"
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(InputError, match="KeyError"):  # stopped half-way
        score(data, output, f"{functions}:raises", overwrite=True)
    source = functions.read_text().replace("return {}[response]", "return 0")
    functions.write_text(source)
    result = score(data, output, f"{functions}:raises", partial="keep")  # its own journal is there
    assert result["records_resumed"] == 1 and output.read_text() != "of another command"


def test_after_a_failure_the_same_command_goes_on_at_that_record(
    functions, write_rows, read_rows, tmp_path
):
    data, output = write_rows(ROWS), tmp_path / "out.jsonl"
    with pytest.raises(InputError, match="1 records are kept in out.jsonl.partial"):
        score(data, output, f"{functions}:raises")
    functions.write_text(FUNCTIONS.replace("{}[response]", "7"))
    with pytest.raises(InputError, match="run with another reward"):
        score(data, output, f"{functions}:raises")
    result = score(data, output, f"{functions}:raises", partial="keep")
    assert result["records_resumed"] == 1
    assert [row["scores"] for row in read_rows(output)] == [[1.0] * 3, [1.0, 7.0], [1.0], []]
    again = score(data, output, f"{functions}:raises", partial="discard", overwrite=True)
    assert again["records_resumed"] == 0


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("absent.py:f", "absent.py: no such reward file"),
        ("absent.py", "reward must be FILE.py:function, got 'absent.py'"),
        ("./absent", "absent: no such model folder"),
    ],
)
def test_a_reward_that_is_not_there(write_rows, tmp_path, reward, said):
    with pytest.raises(InputError, match=said):
        score(write_rows(ROWS), tmp_path / "out.jsonl", reward)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_reward_file_that_cannot_be_run(write_rows, tmp_path):
    (tmp_path / "broken.py").write_text("x = 1\nraise ValueError('no key')\n")
    (tmp_path / "syntax.py").write_text("def f(:\n")
    with pytest.raises(InputError, match=r"broken.py raised ValueError: no key \(line 2\)"):
        score(write_rows(ROWS), tmp_path / "out.jsonl", f"{tmp_path}/broken.py:f")
    with pytest.raises(InputError, match="syntax.py raised SyntaxError"):
        score(write_rows(ROWS), tmp_path / "out.jsonl", f"{tmp_path}/syntax.py:f")


def test_a_classifier_gives_the_label_of_prompt_response_and_eos(write_rows, read_rows, tmp_path):
    path = tiny_models.save_classifier(tmp_path / "rm")
    rows = [
        {"prompt": "q" * (k + 1), "responses": ["r" * (j * 3 + 1) for j in range(k + 1)]}
        for k in range(5)
    ]
    output = tmp_path / "out.jsonl"
    result = score(write_rows(rows), output, str(path), batch_size=4)
    assert result["kind"] == "classifier" and result["unscored"] == 0
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    for row in read_rows(output):
        for response, given in zip(row["responses"], row["scores"], strict=True):
            ids = [*tokenizer.encode(row["prompt"] + response), tokenizer.eos_token_id]
            with torch.no_grad():
                expected = float(model(torch.tensor([ids])).logits)
            assert given == pytest.approx(expected, abs=1e-5)


def test_a_pair_encoder_reads_prompt_and_response_as_a_pair(write_rows, read_rows, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = tiny_models.ascii_tokenizer(cls_token="<s>", sep_token="</s>")
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    path = tmp_path / "bert"
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = BertConfig(
        vocab_size=len(tokenizer), num_attention_heads=2, num_labels=1, pad_token_id=0, **sizes
    )
    BertForSequenceClassification(config).save_pretrained(path)
    rows = [{"prompt": "ab", "responses": ["c", "defg"]}]
    score(write_rows(rows), tmp_path / "out.jsonl", str(path))
    model = BertForSequenceClassification.from_pretrained(path).eval()
    (row,) = read_rows(tmp_path / "out.jsonl")
    loaded = AutoTokenizer.from_pretrained(path)
    for response, given in zip(row["responses"], row["scores"], strict=True):
        inputs = loaded("ab", response, return_tensors="pt")
        assert inputs["input_ids"].shape[1] == 2 + len(response) + 3
        with torch.no_grad():
            assert given == pytest.approx(float(model(**inputs).logits), abs=1e-5)


def test_a_causal_models_reward_is_its_mean_log_probability(
    policy_path, write_rows, read_rows, tmp_path
):
    result = score(write_rows(ROWS), tmp_path / "out.jsonl", str(policy_path))
    assert result["kind"] == "logprob"
    model = AutoModelForCausalLM.from_pretrained(policy_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(policy_path)
    for row in read_rows(tmp_path / "out.jsonl")[:2]:
        for response, given in zip(row["responses"], row["scores"], strict=True):
            prompt = tokenizer.encode(row["prompt"])
            ids = [*prompt, *tokenizer.encode(response), tokenizer.eos_token_id]
            with torch.no_grad():
                logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            labels = torch.tensor(ids[len(prompt) :])
            expected = logp[len(prompt) - 1 : -1].gather(1, labels[:, None]).mean()
            assert given == pytest.approx(float(expected), abs=1e-4)


def test_models_that_are_no_reward_models(policy_path, write_rows, tmp_path):
    two = tiny_models.save_classifier(tmp_path / "two", num_labels=2)
    with pytest.raises(InputError, match="a reward model must have one label, got 2"):
        score(write_rows(ROWS), tmp_path / "out.jsonl", str(two))
    with pytest.raises(InputError, match="1 weights are missing, the first is score.weight"):
        score(write_rows(ROWS), tmp_path / "out.jsonl", str(policy_path), reward_kind="classifier")


def test_a_model_whose_reward_is_nan_is_one_line(write_rows, tmp_path):
    path = tiny_models.save_classifier(tmp_path / "rm")
    model = AutoModelForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        model.score.weight.fill_(math.nan)
    model.save_pretrained(path)
    with pytest.raises(InputError, match="line 1: response 1: .*gave nan, expected a finite"):
        score(write_rows(ROWS), tmp_path / "out.jsonl", str(path))
    assert not (tmp_path / "out.jsonl").exists()


def test_a_killed_run_goes_on_without_calling_the_function_twice(write_rows, read_rows, tmp_path):
    calls = tmp_path / "calls.txt"
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import time\n"
        "def reward(prompt, response):\n"
        f"    with open({str(calls)!r}, 'a') as file:\n"
        "        file.write(prompt + response + '\\n')\n"
        "    time.sleep(0.01)\n"
        "    return len(response)\n"
    )
    rows = [{"prompt": f"p{k}-", "responses": ["a", "bb", "c" * (k % 5 + 3)]} for k in range(60)]
    data = write_rows(rows)
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    score(data, whole, f"{slow}:reward")
    calls.unlink()

    journal = tmp_path / "killed.jsonl.partial"
    arguments = ["reward", "--data", str(data), "--output", str(killed)]
    run_until_lines([*arguments, "--reward", f"{slow}:reward"], journal, lines=9)
    assert not killed.exists()
    result = score(data, killed, f"{slow}:reward")
    assert killed.read_bytes() == whole.read_bytes()
    assert 8 <= result["records_resumed"] < 60
    seen = calls.read_text().splitlines()
    assert len(set(seen)) == 180
    assert len(seen) <= 180 + 3  # only the record in the making is computed again
    assert not journal.exists()


def test_what_a_reward_model_was_given_is_said(policy_path, write_rows, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "a"}], "responses": ["b", "cc"]}, ROWS[0]]
    data, classifier = write_rows(rows), str(tiny_models.save_classifier(tmp_path / "rm"))
    for number, reward in enumerate((str(policy_path), classifier)):
        own = score(data, tmp_path / f"{number}.jsonl", reward)
        assert own["read_as"][PLAIN] == 1 and f"1 records: {PLAIN}" in reward_text(own)
        other = score(data, tmp_path / f"{number}-chat.jsonl", reward, chat_template="chatml")
        assert PLAIN not in other["read_as"] and own["mean"] != other["mean"]
    (tmp_path / "f.py").write_text("def f(p, r):\n    return 1\n")
    assert score(data, tmp_path / "f.jsonl", f"{tmp_path}/f.py:f")["read_as"] == {}
    with pytest.raises(InputError, match="--chat_template is of reward models, got a function"):
        score(data, tmp_path / "g.jsonl", f"{tmp_path}/f.py:f", chat_template="chatml")


WHY = {"role": "user", "content": "why"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
WHOLE = [
    {
        "prompt": [{"role": "user", "content": "hi"}],
        "responses": [[said("a"), WHY, said("b c")], said("d"), [CALL, WHY, said("e")], " "],
    },
    {"prompt": "yo", "responses": [[said("x"), WHY, said("y")], "z"]},
    {"prompt": "no", "responses": ["l ", "m"]},
]


def test_models_read_whole_messages_and_turns_as_training_does(
    policy_path, write_rows, read_rows, tmp_path
):
    template = tmp_path / "calls.jinja"
    template.write_text(CALLS)
    data = write_rows(WHOLE)
    tokenizer = AutoTokenizer.from_pretrained(policy_path)
    tokenizer.chat_template = CALLS
    groups, _ = load_groups(data, tokenizer, format="unscored")
    assert [group.ranked is not None for group in groups] == [True, True, False]
    model = AutoModelForCausalLM.from_pretrained(policy_path, dtype=torch.float32).eval()
    output = tmp_path / "out.jsonl"
    assert score(data, output, str(policy_path), chat_template=str(template))["unscored"] == 0
    rows = read_rows(output)
    for row, own in zip(rows, fastrank.score(model, groups), strict=True):
        assert row["scores"] == pytest.approx(own.tolist(), abs=1e-5)
    # What is written back is what was read, and the same to train on.
    assert rows[0]["responses"] == [WHOLE[0]["responses"][0], "d", WHOLE[0]["responses"][2]]
    again, _ = load_groups(output, tokenizer)
    for one, other in zip(groups, again, strict=True):
        assert all(map(torch.equal, one.marked, other.marked))

    path = tiny_models.save_classifier(tmp_path / "rm")
    score(data, output, str(path), chat_template=str(template), overwrite=True)
    judge = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    for row, group in zip(read_rows(output), groups, strict=True):
        for given, ids in zip(row["scores"], group.response_ids, strict=True):
            with torch.no_grad():
                expected = float(judge(torch.cat([group.prompt_ids, ids])[None]).logits)
            assert given == pytest.approx(expected, abs=1e-5)


def test_a_function_is_given_texts_alone(functions, write_rows, tmp_path):
    output = tmp_path / "out.jsonl"
    for row, what in (
        (WHOLE[1], "response 1 is messages of several turns, and a reward function"),
        (WHOLE[0] | {"responses": ["a", CALL]}, "response 2 is a message with tool_calls, and"),
    ):
        data = write_rows([WHOLE[2], row])
        with pytest.raises(InputError, match=f"line 2: {what}.*--reward MODEL") as error:
            score(data, output, f"{functions}:length")
        assert "\n" not in str(error.value) and not output.exists()
        for left in tmp_path.glob("*out*partial*"):
            left.unlink()


def test_a_reward_stands_beside_its_response_where_another_has_nothing_left(
    policy_path, write_rows, read_rows, tmp_path
):
    template = tmp_path / "calls.jinja"
    template.write_text(CALLS)
    long = {"role": "user", "content": "long " * 40}
    row = {"prompt": "hi", "responses": [[long, said("a")], [said("b"), WHY, said("c")], "d"]}
    result = score(
        write_rows([row]), tmp_path / "out.jsonl", str(policy_path), chat_template=str(template)
    )
    (row,) = read_rows(tmp_path / "out.jsonl")
    assert result["unscored"] == 1
    assert row["scores"][0] is None and None not in row["scores"][1:]
