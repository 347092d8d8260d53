"""Fields that are there are read, or mapped, or an error names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastrank.cli.main import main
from fastrank.data import formats
from fastrank.data.formats import PROMPT_LIKE
from fastrank.data.records import read_records
from fastrank.errors import InputError
from fastrank.workflow.items import read_items

PAIR = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
ORCA = {"system": "Be kind.", "question": "What is the sky?", **PAIR}
ASKED = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What is the sky?"},
]
BOTH = [PAIR["chosen"], PAIR["rejected"]]
LISTS = {"responses": ["a", "b"], "scores": [1, 0]}


def file(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "columns", "prompt", "responses", "scores"),
    [
        (ORCA, None, ASKED, BOTH, [1, 0]),
        (ORCA | {"system": ""}, None, ASKED[1:], BOTH, [1, 0]),
        (ORCA | {"system": None}, None, "What is the sky?", BOTH, [1, 0]),
        (PAIR | {"instruction": "Q"}, None, "Q", BOTH, [1, 0]),
        (PAIR | {"query": "Q", "input": " "}, None, "Q", BOTH, [1, 0]),
        (PAIR, None, "The sky is ", ["blue.", "green."], [1, 0]),
        (ORCA, "prompt=question,system=system", ASKED, BOTH, [1, 0]),
        (PAIR | {"ask": "Q"}, {"prompt": "ask"}, "Q", BOTH, [1, 0]),
        (PAIR | {"prompt": "Q", "context": "C"}, "context=", "Q", BOTH, [1, 0]),
        (PAIR | {"prompt": "Q: C?", "context": "C"}, None, "Q: C?", BOTH, [1, 0]),
        (
            {"q": "Q", "good": "G", "bad": "B", "prompt": "no"},
            "prompt=q, chosen=good, rejected=bad",
            "Q",
            ["G", "B"],
            [1, 0],
        ),
        (
            {"prompt": "Q", "chosen": "B", "rejected": "G"},
            "chosen=rejected,rejected=chosen",
            "Q",
            ["G", "B"],
            [1, 0],
        ),
        (
            {"q": "Q", "a": ["a", "b"], "r": [1, 0]},
            "prompt=q,responses=a,scores=r",
            "Q",
            ["a", "b"],
            [1, 0],
        ),
        (
            {"q": "Q", "a": ["a", "b"], "r": [0, 2]},
            "prompt=q,responses=a,ranks=r",
            "Q",
            ["a", "b"],
            [2, 0],
        ),
        (LISTS | {"prompt": ASKED, "system": "Be kind."}, None, ASKED, ["a", "b"], [1, 0]),
        (LISTS | {"prompt": ASKED[1:], "system": "Be kind."}, None, ASKED, ["a", "b"], [1, 0]),
        (LISTS | {"query": "Q"}, None, "Q", ["a", "b"], [1, 0]),
        (
            {"prompt": "Q", "chosen": "a", "rejected": ["b", "c"]},
            None,
            "Q",
            ["a", "b", "c"],
            [1, 0, 0],
        ),
        (
            {"prompt": "Q ", "chosen": ["Q a", "Q b"], "rejected": ["Q c"]},
            None,
            "Q ",
            ["a", "b", "c"],
            [1, 1, 0],
        ),
    ],
)
def test_what_is_read(
    row: dict[str, Any],
    columns: Any,
    prompt: Any,
    responses: list[str],
    scores: list[float],
    tmp_path: Path,
) -> None:
    [record] = read_records(file(tmp_path, row), columns=columns)
    assert (record.prompt, record.responses, record.scores) == (prompt, responses, scores)
    assert record.source == row  # written back as it came
    [item] = read_items(file(tmp_path, row), columns=columns)
    assert (item.prompt, item.responses) == (prompt, responses)


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        (
            PAIR | {"prompt": "Q"},
            "prompt=qestion",
            "names the field 'qestion'; it has: chosen, rej",
        ),
        (PAIR | {"prompt": "Q"}, "context=", "names the field 'context'"),
        (PAIR, "prompt", "columns must be like prompt=question"),
        (PAIR, "=chosen", "columns must be like prompt=question"),
        (PAIR, "promt=chosen", "no format has 'promt'; known: all_generated_responses"),
        (PAIR, "prompt=chosen,prompt=rejected", "a name is mapped twice"),
        (
            PAIR | {"instruction": "Q", "input": "I"},
            None,
            "'input' looks like a part of the prompt",
        ),
        (
            LISTS | {"prompt": ASKED, "system": "No."},
            None,
            "'system' and the prompt's system message",
        ),
        (LISTS | {"prompt": "Q", "system": 3}, None, "system is 3"),
        ({"prompt": None, "chosen": ["a"], "rejected": ["b"]}, None, "need a field 'prompt'"),
        (LISTS | {"q": "Q"}, None, "--columns maps names, e.g. prompt=question"),
        *(
            (LISTS | {"prompt": "Q", name: "unread"}, None, f"the field '{name}'")
            for name in PROMPT_LIKE
            if name not in ("query",)
        ),
    ],
)
def test_what_is_refused(row: dict[str, Any], columns: Any, expected: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        list(read_records(file(tmp_path, row), columns=columns))
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_an_unread_field_of_a_later_row_is_refused(tmp_path: Path) -> None:
    rows = [LISTS | {"prompt": "Q", "context": ""}, LISTS | {"prompt": "Q", "context": "C"}]
    with pytest.raises(InputError, match="line 2.*'context'|:2.*'context'"):
        list(read_records(file(tmp_path, *rows)))


def test_a_prompt_alone_has_its_system_message_and_no_unread_field(tmp_path: Path) -> None:
    path = file(tmp_path, {"q": "What is the sky?", "role": "Be kind.", "id": 1})
    [item] = read_items(path, columns="prompt=q,system=role")
    assert item.prompt == ASKED and item.extra == {"id": 1}
    assert item.as_row() == {
        "id": 1, "prompt": ASKED, "responses": [], "scores": [], "sources": []
    }  # fmt: skip
    left = file(tmp_path, {"prompt": "Q", "context": "C", "note": "N"})
    # What training would refuse is not written either.
    assert [item.extra for item in read_items(left, columns="context=,note=")] == [{"note": "N"}]
    with pytest.raises(InputError, match="'context' looks like"):
        list(read_items(file(tmp_path, {"prompt": "Q", "context": "C"})))


def test_every_field_of_every_format_can_be_mapped() -> None:
    names = formats.column_names()
    assert all(set(known.fields) <= set(names) for known in formats.FORMATS.values())


def test_commands_take_a_field_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = file(tmp_path, ORCA | {"context": "C"})
    assert main(["inspect", str(path)]) == 2
    assert "--columns context=" in capsys.readouterr().err
    assert main(["inspect", str(path), "--columns", "context=,prompt=question", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["records"]["kept"] == 1
