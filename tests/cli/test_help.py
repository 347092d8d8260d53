"""Help: short pages that need no torch, all options on demand, and completion by the shell."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from fastrank.cli.commands import COMMANDS
from fastrank.cli.help import CHOSEN, KEPT, PAGES, WHOLE, page_of, wants_help
from fastrank.cli.main import main
from fastrank.data.formats import FORMATS


def test_the_kept_pages_are_those_of_the_declarations() -> None:
    kept = json.loads(PAGES.read_text(encoding="utf-8"))
    for name in KEPT:
        made = json.loads(json.dumps(page_of(name, COMMANDS[name](), everything=False)))
        assert kept[name] == made, "write it anew: python -m fastrank.cli.help"
    assert kept.keys() == set(KEPT)


@pytest.mark.parametrize("name", COMMANDS)
def test_pages(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([name, "--help"]) == 0
    short = capsys.readouterr().out
    lines = short.splitlines()
    assert short.startswith(f"usage: fastrank {name}") and "--config" in short
    assert (
        len(lines) <= (60 if name not in WHOLE else 75)
        and max(map(len, lines)) <= 80
        and "\x1b" not in short
    )
    assert 1 <= len(CHOSEN[name]) <= 5 and set(CHOSEN[name]) <= set(lines)
    assert main([name, "--help=all"]) == 0
    shown = capsys.readouterr().out.split()
    for kind in COMMANDS[name]().options:
        for field in dataclasses.fields(kind):
            if field.init:
                assert f"--{field.name}" in shown
    chosen = " ".join(CHOSEN[name].values()).split()
    assert len(chosen) == len(set(chosen)) <= 30
    assert all(f"--{option}" in short.split() for option in chosen)


def test_training_has_25_options_with_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "25 options" in shown and len(CHOSEN["train"]) == 5
    assert "The initial learning rate of AdamW. [1e-05]" in shown
    assert "When to evaluate: no, steps or epoch. [epoch]" in shown
    main(["score", "--help", "all"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: by its fields)" in shown and "(none, group). [none]" in shown


def test_the_help_of_inspect_lists_formats_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in FORMATS)
    assert "human_ref_A" in shown and "responses_and_scores" in shown


def test_what_asks_for_help() -> None:
    assert wants_help(["--loss", "pro"]) is None
    assert wants_help(["--loss", "pro", "-h"]) == wants_help(["--help"]) == "short"
    for argv in (["--help", "all"], ["--help=all"], ["--help-all"], ["--help_all"]):
        assert wants_help(argv) == "all"


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, time; from fastrank.cli.main import main; "
        "[main(argv) for argv in (['--help'], ['train', '-h'], ['iterate', '-h'])]; "
        "heavy = {'torch', 'transformers', 'triton', 'matplotlib', 'datasets', 'numpy'}; "
        "assert not heavy & set(sys.modules) and time.process_time() < 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_bash_completes_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-completion", "bash"]) == 0
    script = capsys.readouterr().out

    def completed(*words: str) -> list[str]:
        call = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; "
        call += f"_shtab_fastrank fastrank {words[-1]} {words[-2]}; echo ${{COMPREPLY[@]}}"
        run = subprocess.run(
            ["bash"], input=f"{script}\n{call}\n", capture_output=True, text=True, check=True
        )
        return run.stdout.split()

    assert completed("fastrank", "ins") == ["inspect"]
    assert "--learning_rate" in completed("fastrank", "train", "--learn")
    assert "--num_beam_groups" in completed("fastrank", "sample", "--num_b")
