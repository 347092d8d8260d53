"""The pages: what they show, nothing in them fetched or run, and how a browser sees them."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastrank.cli.main import main
from fastrank.data.records import read_records
from fastrank.visual import shown_groups
from fastrank.visual.pages import reward_bins, write_data_page, write_run_report
from fastrank.visual.shown_groups import FILE, ShownGroup, SpreadSample, read_groups, write_groups
from fastrank.visual.svg import histogram, line_chart

EVIL = (
    "</title></script><script>document.title='run'</script><img src=x onerror=alert(1)>\"'&\udcff"
)
ROWS = [
    *(
        {"step": s, "loss": 3.0 / s, "rank_loss": 1.0 / s, "rewards/accuracies": 0.5}
        for s in (1, 2, 3)
    ),
    {"step": 0, "eval_loss": 3.0, "eval_rewards/accuracies": 0.5},
    {"step": 3, "eval_loss": 1.0, "eval_rewards/accuracies": 0.9, "eval_rank_loss": None},
]
GROUPS = [
    ShownGroup("first prompt", ["bad", "good", "middle"], [0.0, 2.0, 1.0],
               before=[-1.0, -3.0, -2.0], after=[-3.0, -1.0, -2.0], name="d.jsonl:1"),
    ShownGroup("second", ["a", "b"], [1.0, 0.0], before=[-1.0, -2.0], after=[-2.0, -1.0]),
    ShownGroup(EVIL, [EVIL, "ruled out"], [1.0, 1.0], before=[-1.0, None], after=[-1.0, None],
               name=EVIL),
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run's folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    summary = {
        "before": {"eval": {"loss": 3.0}},
        "after": {"eval": {"loss": 1.0, "rank/ndcg": 0.9}},
        "about": {"run": EVIL, "loss": "RRHF()"},
        "rewards": {"edges": [0.0, 1.0, 2.0], "counts": {"training": [3, 1], "held out": [0, 2]}},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    write_groups(GROUPS, folder / FILE)
    return folder


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, Any]]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append((tag, dict(attrs)))


def tags(text: str) -> list[tuple[str, dict[str, Any]]]:
    parser = _Tags()
    parser.feed(text)
    return parser.seen


def test_texts_are_texts_and_nothing_is_fetched(run: Path, tmp_path: Path) -> None:
    data = write_data_page(tmp_path / "data.html", EVIL, GROUPS, 3, EVIL)
    for page in (write_run_report(run, ROWS), data):
        seen = tags(page.read_text(encoding="utf-8"))
        names = [name for name, _ in seen]
        assert names.count("script") == 1 and "img" not in names and "link" not in names
        assert not any(a.startswith("on") or a in ("src", "href") for _, own in seen for a in own)
        (policy,) = (own["content"] for _, own in seen if "http-equiv" in own)
        assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy
    assert not list(tmp_path.rglob("*.partial"))


def test_candidates_stand_in_the_order_of_the_model(run: Path) -> None:
    text = write_run_report(run, ROWS).read_text(encoding="utf-8")
    first = re.findall(r"<details.*?</details>", text, re.S)[0]
    assert re.findall(r'class="text">(\w+)<', first) == "bad middle good good middle bad".split()
    assert re.findall(r"--t:([\d.]+)", first) == "0.000 0.500 1.000 1.000 0.500 0.000".split()
    assert "0% of the pairs in order before, 100% of the pairs in order after" in first
    assert re.findall(r'data-change="([-\d.]+)"', text) == ["1", "-1", "0"]
    assert "score −∞" in text and text.count("<svg") == 5 - 1  # no margins were logged
    assert "<td>rank/ndcg</td><td>–</td><td>0.9000</td>" in text


def test_a_run_that_goes_on_and_one_that_is_damaged(run: Path) -> None:
    (run / "summary.json").unlink()
    assert "Held-out prompts" in write_run_report(run, ROWS).read_text(encoding="utf-8")
    (run / FILE).unlink()
    assert "Held-out prompts" not in write_run_report(run, []).read_text(encoding="utf-8")
    (run / "summary.json").write_text("{")
    assert main(["view", str(run)]) == 2


def test_charts() -> None:
    """Two points make no line, three do; every point tells its value; no values, no chart."""
    two = line_chart("t", [("a<", "a", [(0, 1.0), (9, 2.0)])])
    assert "polyline" not in two and two.count("<circle") == 2 and "a&lt;, step 9: 2" in two
    three = line_chart("t", [("a", "a", [(0, 1.0), (5, 1.5), (10, 2.0)])], limits=(0.0, 2.0))
    assert 'points="52.0,108.0 230.0,59.0 408.0,10.0"' in three
    assert line_chart("t", [("a", "a", [])]) == "" and "nan" not in line_chart(
        "t", [("a", "a", [(0, 5.0)])]
    )
    bars = histogram("t", [0.0, 1.0, 2.0], [("x", "a", [3, 1]), ("y", "b", [0, 0])])
    assert bars.count("<rect") == 4 and "75.0% from 0 to 1" in bars
    assert histogram("t", [0.0, 1.0], [("x", "a", [0])]) == ""
    edges, counts = reward_bins({"a": [0.0, 0.5, 1.0], "b": [1.0]})
    assert (edges[0], edges[-1]) == (0.0, 1.0) and sum(counts["a"]) == 3 and counts["b"][-1] == 1
    assert sum(reward_bins({"a": [2.0, 2.0]})[1]["a"]) == 2


def test_a_sample_of_a_stream_is_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown_groups, "MOST", 8)
    sample, made = SpreadSample(), []
    for number in range(50):
        sample.add(lambda number=number: made.append(number) or ShownGroup(str(number), [], []))
    kept = [int(group.prompt) for group in sample.groups]
    assert kept == list(range(0, 50, 8)) and sample.total == 50 and len(made) < 50
    assert shown_groups.chosen_positions(20) == [0, 2, 5, 7, 10, 12, 15, 17]
    assert shown_groups.chosen_positions(3) == [0, 1, 2] and shown_groups.chosen_positions(0) == []


def test_view(run: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command: a run, a data file of any format, and what it refuses."""
    monkeypatch.chdir(tmp_path)
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert main(["view", str(run), "--open"]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n" and opened[0].startswith(
        "file:///"
    )
    rows = [
        {"prompt": [{"role": "user", "content": "<b>Why?"}], "chosen": "<i>so", "rejected": "no"}
    ] * 3
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["view", "pairs.jsonl", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert Path(result.pop("page")).name == "pairs.html" and result == {"prompts": 3, "shown": 3}
    text = (tmp_path / "pairs.html").read_text()
    assert "user: &lt;b&gt;Why?" in text and re.findall(r"reward (\d)", text)[:2] == ["1", "0"]
    assert main(["view", "pairs.jsonl"]) == 0  # its own page is replaced
    (tmp_path / "run" / "mine.html").write_text("<html>written by hand")
    for argv, message in (
        (["view", "pairs.jsonl", "--output", "run/mine.html"], "is no page of fastrank"),
        (["view", "nowhere.jsonl"], "nowhere.jsonl"),
        (["view", "pairs.jsonl", "--output", "x.txt"], "must end in .html, got "),
        (["view", "pairs.jsonl", "--output", "no/x.html"], "does not exist"),
        (["view", str(run), "--format", "rrhf"], "--format is of data files"),
    ):
        assert main(argv) == 2 and message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pairs.html", "pairs.jsonl", "run"]


def test_view_of_a_trainer_of_ones_own(tmp_path: Path, capsys: Any) -> None:
    """Its log is in its checkpoints; the last one is shown, or said to be damaged."""
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        log = [{"step": s, "loss": 2.0 - s, "epoch": 0.1} for s in range(1, step + 1)]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
        os.utime(folder / "trainer_state.json", (9 - step, 9 - step))  # of a copied folder
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        assert main(["view", str(folder), "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown == {"page": str(folder / "report.html"), "log_rows": 2}
        assert "<circle" in (folder / "report.html").read_text()
    for damaged in ("{", "[]", '{"log_history": [{"loss": 1}]}', '{"log_history": 1}'):
        (tmp_path / "checkpoint-2" / "trainer_state.json").write_text(damaged)
        assert main(["view", str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "checkpoint-2/trainer_state.json: no state of a run: " in line


def _chromium(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs chromium")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,1600"]
    return subprocess.run(
        [program, *options, *arguments], capture_output=True, timeout=120, check=True
    )


@pytest.mark.slow
def test_in_a_browser(run: Path, tmp_path: Path) -> None:
    """The page's own script runs under its policy, a text's does not, and colours are on screen."""
    page = write_run_report(run, ROWS).absolute().as_uri()
    dom = _chromium("--dump-dom", page).stdout.decode()
    assert re.search(r'id="count">3 of 3 prompts<', dom)
    assert "<title>&lt;/title&gt;" in dom
    picture = tmp_path / "page.png"
    _chromium(f"--screenshot={picture}", page)
    raw = picture.read_bytes()
    width, height, depth, kind = struct.unpack(">IIBB", raw[16:26])
    assert (width, height, depth) == (1200, 1600, 8) and kind in (2, 6)
    data, at = b"", 8
    while at < len(raw):
        (size,) = struct.unpack(">I", raw[at : at + 4])
        data += raw[at + 8 : at + 8 + size] if raw[at + 4 : at + 8] == b"IDAT" else b""
        at += 12 + size
    assert len(set(zlib.decompress(data))) > 100  # not a blank page


def test_groups_survive_the_file(tmp_path: Path) -> None:
    write_groups(GROUPS, tmp_path / FILE)
    assert read_groups(tmp_path / FILE) == GROUPS and read_groups(tmp_path / "none") == []


def test_messages_are_shown_with_all_that_they_say() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "clock"}}]}
    talk = [call, {"role": "tool", "content": "noon"}, {"role": "assistant", "content": "It is."}]
    row = {"prompt": [{"role": "user", "content": "hi"}], "responses": [talk, call, "text"]}
    [record] = read_records([row | {"scores": [2, 1, 0]}])
    shown = shown_groups.of_record(record, "data.jsonl")
    assert shown.prompt == "user: hi" and shown.responses[2] == "text"
    assert shown.responses[0].endswith("\n\ntool: noon\n\nassistant: It is.")
    assert all('"name": "clock"' in text for text in shown.responses[:2])
