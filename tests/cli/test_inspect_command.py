"""``fastrank inspect``: the report, lengths, costs and the plot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastrank.cli.main import main
from fastrank.data import formats, pairs, render, turns
from fastrank.data import report as reports
from fastrank.data.load import load_groups
from fastrank.data.packing import pack
from fastrank.modeling.pretrained import load_tokenizer


def run_json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict:
    assert main([*argv, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def test_report_without_a_tokenizer(oasst_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "inspect", str(oasst_path))
    assert found["records"] == {"read": 212, "kept": 212, "dropped": {}}
    assert found["candidates"] == {"read": 641, "kept": 641, "dropped": {}}
    assert sum(int(n) * k for n, k in found["candidates_per_group"].items()) == 641
    assert "tokens" not in found
    assert main(["inspect", str(oasst_path), "--max_candidates", "2"]) == 0
    text = capsys.readouterr().out
    assert "641 read, 424 kept" in text and "217 dropped beyond max_candidates" in text


def test_token_costs_are_those_of_packs(
    oasst_path: Path, story_model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["inspect", str(oasst_path), "--tokenizer", str(story_model_path)]
    found = run_json(capsys, *argv, "--max_tokens", "5000")
    groups, report = load_groups(oasst_path, load_tokenizer(story_model_path), context_length=512)
    assert found["max_length"] == 512
    assert found["truncated"] == report.as_dict()["truncated"]
    tokens = found["tokens"]
    assert tokens["shared"] == sum(g.num_tokens_shared for g in groups)
    assert tokens["packed"] == sum(g.num_tokens_separate for g in groups)
    assert tokens["padded"] == sum(g.num_candidates * g.longest_sequence for g in groups)
    assert tokens["saved_by_sharing"] == pytest.approx(1 - tokens["shared"] / tokens["padded"])

    packs = pack(groups, max_tokens=5000)
    assert found["packs"]["count"] == len(packs)
    assert found["packs"]["fill"] == pytest.approx(
        sum(p.num_tokens for p in packs) / (len(packs) * 5000)
    )
    whole, _ = load_groups(oasst_path, load_tokenizer(story_model_path))
    lengths = found["lengths"]
    assert lengths["prompt"]["100%"] == max(len(g.prompt_ids) for g in whole)
    assert lengths["response"]["0%"] == min(len(r) for g in whole for r in g.response_ids)
    assert lengths["together"]["100%"] == max(g.longest_sequence for g in whole)


def test_groups_larger_than_a_pack_are_said(
    oasst_path: Path, story_model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["inspect", str(oasst_path), "--tokenizer", str(story_model_path)]
    assert main([*argv, "--max_tokens", "600"]) == 0
    text = capsys.readouterr().out
    groups, _ = load_groups(oasst_path, load_tokenizer(story_model_path), context_length=512)
    large = sum(g.num_tokens_shared > 600 for g in groups)
    assert large and f"{large} groups are larger than a pack" in text


def test_plot(
    oasst_path: Path,
    story_model_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = tmp_path / "small.jsonl"
    small.write_text("".join(oasst_path.read_text().splitlines(keepends=True)[:5]))
    for extra in ([], ["--tokenizer", str(story_model_path)]):
        target = tmp_path / f"plot{len(extra)}.png"
        assert main(["inspect", str(small), "--plot", str(target), *extra]) == 0
        assert target.read_bytes().startswith(b"\x89PNG")
        assert str(target) in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plot0.png", "plot2.png", "small.jsonl"]


def test_dropped_records_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": "p", "responses": ["a", "b"], "scores": [1, 0]},
        {"prompt": "q", "responses": ["a", ""], "scores": [1, 0]},
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = run_json(capsys, "inspect", str(path))
    dropped = {"fewer than 2 candidates": {"count": 1, "lines": [2]}}
    assert found["records"] == {"read": 2, "kept": 1, "dropped": dropped}


def test_an_example_shows_where_the_prompt_ends(
    story_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": "Tell a story."}]
    responses = ["<think>no</think>Once", "<think>yes</think>Once"]
    path.write_text(json.dumps({"prompt": turns, "responses": responses, "scores": [0, 1]}))
    argv = ["inspect", str(path), "--tokenizer", str(story_model_path)]
    found = run_json(capsys, *argv, "--chat_template", "hh")
    assert found["example"] == {
        "name": f"{path}:1",
        "prompt": "\n\nHuman: Tell a story.\n\nAssistant:",
        "response": " <think>yes</think>Once<s>",
    }
    assert found["notes"] == {}
    strip = tmp_path / "strip.jinja"
    strip.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}{{ '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}assistant:{{ ' ' }}{{ open }}{% endif %}"
    )
    argv += ["--chat_template", str(strip), "--chat_template_kwargs", '{"open": "<think>"}']
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "assistant: ┃<think>yes</think>Once" in text
    assert "the chat template would change it (line 1)" in text


def test_template_options_need_a_tokenizer(
    oasst_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(oasst_path), "--chat_template", "hh"]) == 2
    assert "need --tokenizer" in capsys.readouterr().err


SAID = {"role": "assistant", "content": "x"}

TROUBLES = [
    ({"chosen": " x", "rejected": " y", "score_chosen": 1, "score_rejected": 2}, pairs.INVERTED),
    ({"chosen": " x", "rejected": " y", "ended": ["length", "stop"]}, reports.CUT_SAMPLE),
    ({"chosen": " same", "rejected": " same"}, reports.SAME_PAIRS),
    ({"chosen": " long enough to be cut", "rejected": " long enough to be"}, reports.CUT_EQUAL),
    ({"chosen": " x", "rejected": " "}, reports.EMPTY_RESPONSE),
    ({"chosen": "x", "rejected": " y", "prompt": "glued"}, render.GLUED),
    ({"prompt": [{"role": "user", "content": "q"}], "chosen": "x", "rejected": "y"}, render.PLAIN),
    ({"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: b\n\nAssistant: c", "prompt": None,
      "rejected": "\n\nHuman: q\n\nAssistant: d"}, pairs.PARTED_EARLY),
    ({"prompt": None, "chosen": [{"role": "user", "content": "q"}] * 3,
      "rejected": [{"role": "user", "content": "q"}] * 2}, reports.NO_TURN),
    ({"chosen": [SAID, {"role": "user", "content": "y"}, SAID], "rejected": [SAID]},
     turns.SEVERAL),
    ({"chosen": " x", "rejected": " y", "tools": [{"name": "f"}]}, render.NEEDS_TEMPLATE),
]  # fmt: skip


def test_every_trouble_is_named_with_its_line(
    story_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "troubles.jsonl"
    rows = [{"prompt": "Once ", **row} for row, _ in TROUBLES]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    argv = ["inspect", str(file), "--tokenizer", str(story_model_path)]
    argv += ["--max_response_length", "4"]
    found = run_json(capsys, *argv)
    said = found["records"]["dropped"] | found["candidates"]["dropped"]
    said |= found["notes"] | found["counts"]
    for line, (_, trouble) in enumerate(TROUBLES, start=1):
        assert line in said[trouble]["lines"], trouble
    assert found["truncated"]["response"]["lines"] == [4, 10]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert all(trouble in text for _, trouble in TROUBLES)


def test_the_help_lists_formats_and_the_field_map(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--help", "all"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert all(name in said for name in formats.FORMATS)
    assert "prompt=question,system=role" in said and all(n in said for n in formats.column_names())
