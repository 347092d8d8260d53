"""The command table, exit codes, and one line for everything that a user can get wrong."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torchrun

import fastrank
from fastrank.cli.commands import COMMANDS, Command
from fastrank.cli.main import main
from fastrank.errors import InputError, TrainingStopped
from fastrank.options import JsonOptions
from fastrank.options.declare import option, options

GOOD = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 0]}


@pytest.fixture
def refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[str]], str]:
    """Run a command that must fail: exit 2, one line on stderr, nothing on stdout or the disk."""
    monkeypatch.chdir(tmp_path)

    def run(argv: list[str]) -> str:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        code = main(argv)
        out, err = capsys.readouterr()
        assert (code, out) == (2, "")
        assert err.startswith("fastrank") and ": error: " in err
        assert err.count("\n") == 1 and err.endswith("\n") and "Traceback" not in err
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        return err

    return run


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--help"], ["-h"], ["help"]):
        assert main(argv) == 0
    shown = capsys.readouterr().out
    for name, made in COMMANDS.items():
        assert made.__doc__ and f"{name}  " in shown and made.__doc__ in shown
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastrank {fastrank.__version__}\n"


WRONG_COMMANDS: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "expected a command"),
    "unknown command": (["trian"], "unknown command trian, did you mean train?"),
    "shell": (["--print-completion", "ksh"], "must be one of bash, zsh, tcsh"),
    "far from any": (["qqqqqq"], "commands: train"),
    "unknown option first": (["--verbose"], "unknown option --verbose"),
    "no file": (["inspect"], "expected --data"),
    "two files": (["inspect", "a.jsonl", "b.jsonl"], "unexpected argument 'b.jsonl'"),
    "typo": (["inspect", "good.jsonl", "--tokeniser", "x"], "did you mean --tokenizer?"),
    "no value": (["inspect", "good.jsonl", "--plot"], "expected one argument"),
    "not a number": (["inspect", "good.jsonl", "--max_candidates", "many"], "a whole number"),
    "too few": (["inspect", "good.jsonl", "--max_candidates", "1"], "must be at least 2"),
    "format": (["inspect", "good.jsonl", "--format", "rhf"], "did you mean 'rrhf'"),
    "choice": (["inspect", "good.jsonl", "--normalize_rewards", "z"], "invalid choice: 'z'"),
    "limits alone": (["inspect", "good.jsonl", "--max_length", "9"], "need --tokenizer"),
    "negative": (["inspect", "good.jsonl", "--max_tokens", "-1"], "must be at least 2, got -1"),
    "empty data": (["inspect", ""], "--data must have a value, got an empty text"),
    "empty model": (["score", "--model", " ", "--data", "good.jsonl"], "--model must have a value"),
    "empty output": (["train", "--output_dir="], "--output_dir must have a value"),
    "empty stop": (
        ["sample", "--model", "m", "--prompts", "p", "--output", "o", "--stop", ""],
        "--stop must have a value",
    ),
    "no folder": (["inspect", "good.jsonl", "--plot", "no/p.png"], "its folder does not exist"),
    "plot of data": (["inspect", "good.jsonl", "--plot", "good.jsonl"], "must be a .png file, got"),
    "input and output": (
        ["score", "--data", "good.jsonl", "--model", ".", "--output", "good.jsonl", "--overwrite"],
        "--output must be another file than --data",
    ),
    "plot folder": (["inspect", "good.jsonl", "--plot", "."], "expected a file, got a folder"),
    "no config": (["inspect", "good.jsonl", "--config", "c.yaml"], "c.yaml: cannot be read"),
    "config key": (["inspect", "good.jsonl", "--config", "bad.yaml"], "did you mean max_tokens"),
    "no model": (["score", "--data", "good.jsonl"], "expected --model"),
    "model path": (["score", "--data", "good.jsonl", "--model", "./m"], "no such model folder"),
    "model file": (["score", "--data", "good.jsonl", "--model", "good.jsonl"], "got a file"),
    "model folder": (["score", "--data", "good.jsonl", "--model", "."], "it has no config.json"),
    "tokenizer": (["inspect", "good.jsonl", "--tokenizer", "."], "it has no tokenizer_config"),
    "output": (
        ["score", "--data", "good.jsonl", "--model", ".", "--output", "x/y.jsonl"],
        "its folder does not exist",
    ),
    "sizes": (["doctor", "--tokens", "0"], "--tokens must be at least 1, got 0"),
    "missing data": (["inspect", "nope.jsonl"], "nope.jsonl: no such file"),
}


@pytest.mark.parametrize("name", WRONG_COMMANDS)
def test_wrong_commands(name: str, refused: Callable, tmp_path: Path) -> None:
    (tmp_path / "good.jsonl").write_text(json.dumps(GOOD) + "\n")
    (tmp_path / "bad.yaml").write_text("max_token: 3\n")
    argv, expected = WRONG_COMMANDS[name]
    assert expected in refused(argv)


_LINE = json.dumps(GOOD).encode() + b"\n"


def _bad(**fields: object) -> bytes:
    return _LINE + json.dumps({**GOOD, **fields}).encode()


BROKEN_FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("d.jsonl", b"", "the file is empty"),
    "blank": ("d.jsonl", b"\n\n", "the file is empty"),
    "malformed": ("d.jsonl", _LINE + b'{"prompt": ', "line 2: malformed JSON"),
    "cut off": ("d.jsonl", _LINE + _LINE[:-9], "line 2: malformed JSON"),
    "nested": ("d.jsonl", _LINE + b'{"a":' * 50_000, "nested too deeply"),
    "not utf-8": ("d.jsonl", _LINE + b'{"prompt": "\xe9"}', "line 2: not UTF-8"),
    "binary": ("d.jsonl", bytes(range(254, 0, -1)), "line 1: not UTF-8 text"),
    "marked": ("d.jsonl", bytes(range(255, 0, -1)), "not utf-16-le text"),
    "scalar": ("d.jsonl", _LINE + b"3", "line 2: expected a JSON object, got int"),
    "nan": ("d.jsonl", _bad(scores=[float("nan"), 1]), "line 2: scores[0] is nan"),
    "infinite": ("d.jsonl", _bad(scores=[1e999, 1]), "line 2: scores[0] is inf"),
    "text score": ("d.jsonl", _bad(scores=["x", 1]), "line 2: scores[0] is 'x' (str)"),
    "lengths": ("d.jsonl", _bad(scores=[1]), "line 2: scores has 1 entries, responses has 2"),
    "no list": ("d.jsonl", _bad(responses="ab"), "line 2: responses is 'ab' (str)"),
    "no text": ("d.jsonl", _bad(responses=["a", {}]), "expected a message"),
    "prompt": ("d.jsonl", _bad(prompt=1.5), "line 2: prompt is 1.5 (float)"),
    "missing field": ("d.jsonl", _LINE + b'{"prompt": "p"}', "expected a field 'responses'"),
    "fields": ("d.jsonl", b'{"text": "p"}', "line 1: fields of no known format (text)"),
    "no score": ("d.jsonl", b'{"prompt": "p", "response": "r"}', "no score field"),
    "nothing usable": ("d.jsonl", _bad(scores=[None, 1])[len(_LINE) :], "no usable record: 1 read"),
    "surrogate": ("d.jsonl", _bad(prompt="\udcff"), "line 2: prompt holds a lone surrogate"),
    "json list": ("d.json", b"[1]", "record 1: expected a JSON object"),
    "json": ("d.json", b'[{"prompt": "p"', "malformed JSON"),
    "no rows": ("d.json", b"[]", "no records in it"),
    "parquet": ("d.parquet", b"PAR1\x00\x00PAR1", "not a readable Parquet file"),
    "cut parquet": ("d.jsonl", b"PAR1" + bytes(100), "not a readable Parquet file"),
}


@pytest.mark.parametrize(
    ("command", "name"),
    # `score` also takes records with one candidate.
    [("inspect", name) for name in BROKEN_FILES]
    + [("score", name) for name in BROKEN_FILES if name != "nothing usable"],
)
def test_broken_files(
    name: str, command: str, refused: Callable, tmp_path: Path, story_model_path: Path
) -> None:
    file, raw, expected = BROKEN_FILES[name]
    (tmp_path / file).write_bytes(raw)
    argv = {
        "inspect": ["inspect", file, "--plot", "p.png"],
        "score": ["score", "--model", str(story_model_path), "--data", file, "--output", "o"],
    }
    message = refused(argv[command])
    assert expected in message and file in message


def test_a_missing_extra_names_its_install_line(
    refused: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "good.jsonl").write_text(json.dumps(GOOD) + "\n")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = refused(["inspect", "good.jsonl", "--plot", "p.png"])
    assert "needs matplotlib: pip install 'fastrank-lm[train]'" in message
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "needs datasets: pip install 'fastrank-lm[train]'" in refused(["inspect", "."])


@options
class _MadeUp(JsonOptions):
    value: float = option("a number", default=0.0)


def _command(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any], **more: Any) -> None:
    made = Command((_MadeUp,), run, **more)
    monkeypatch.setitem(COMMANDS, "made-up", lambda: made)


def _raise(error: BaseException) -> Callable[..., Any]:
    def run(options: _MadeUp) -> None:
        raise error

    return run


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _command(monkeypatch, lambda options: None)
    assert main(["made-up"]) == 0
    _command(monkeypatch, _raise(TrainingStopped("the loss is not finite")))
    assert main(["made-up"]) == 1
    assert capsys.readouterr().err == "fastrank made-up: stopped: the loss is not finite\n"
    _command(monkeypatch, _raise(InputError("first\n  second")))
    assert main(["made-up"]) == 2
    assert capsys.readouterr().err == "fastrank made-up: error: first second\n"
    _command(monkeypatch, _raise(OSError(28, "No space left on device", "out.jsonl")))
    assert main(["made-up"]) == 2
    expected = "fastrank made-up: error: out.jsonl: No space left on device\n"
    assert capsys.readouterr().err == expected
    _command(monkeypatch, _raise(KeyboardInterrupt()))
    assert main(["made-up"]) == 130
    assert capsys.readouterr().err == "fastrank made-up: interrupted\n"


def test_results(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As text, or as JSON, which has no NaN; a result that failed is exit code 1."""
    _command(
        monkeypatch,
        lambda options: {"got": [options, options.value if options.value != 4 else math.nan]},
        text=lambda result: f"{result['got'][1]}",
        defaults=lambda given: {"value": 3.0},
        failed=lambda result: result["got"][1] > 5,
    )
    assert main(["made-up"]) == 0 and main(["made-up", "--value", "7"]) == 1
    assert capsys.readouterr().out == "3.0\n7.0\n"
    assert main(["made-up", "--value", "4", "--json"]) == 0
    assert capsys.readouterr().out == '{"got": [{"json": true, "value": 4.0}, null]}\n'


@pytest.mark.parametrize("error", [ValueError("x"), ModuleNotFoundError("x", name="unheard")])
def test_defects_keep_their_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    _command(monkeypatch, _raise(error))
    with pytest.raises(type(error)):
        main(["made-up"])


def test_an_interrupt_that_a_module_turned_into_its_own_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(options: _MadeUp) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise TypeError("incompatible function arguments") from None

    _command(monkeypatch, run)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        assert main(["made-up"]) == 130
        assert capsys.readouterr().err == "fastrank: interrupted, which ended as TypeError\n"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    rows = [json.dumps({**GOOD, "prompt": str(i), "scores": [i, None]}) for i in range(3)]
    (tmp_path / "d.jsonl").write_text("\n".join([json.dumps(GOOD), *rows]))
    code = "import sys; from fastrank.cli.main import main; sys.exit(main(sys.argv[1:]))"
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-u", "-c", code, "inspect", str(tmp_path / "d.jsonl")],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert (process.returncode, process.stderr) == (141, "")


def test_processes_beside_the_first_wait_with_their_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For the launcher to end them, if the first one has it too; then it is said after all."""
    waited: list[tuple[float, str]] = []
    monkeypatch.setattr("time.sleep", lambda s: waited.append((s, capsys.readouterr().err)))
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main(["train", "--nonsense", "1"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert waited == ([] if rank == "0" else [(6.0, "")])


@pytest.mark.slow
def test_what_every_process_would_say_is_said_once() -> None:
    done = subprocess.run(
        torchrun.command(2, "-m", "fastrank", "train", "--loss", "nonsense"),
        env=torchrun.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("fastrank train: error: ") == 1, done.stderr
