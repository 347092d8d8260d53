"""Runs random command lines and YAML files: ``fuzz_commands.py FOLDER SEED LINES FILES``.

FOLDER has a model (``model``) and records (``d.jsonl``). Each line runs in a forked child of a
process that has imported everything, so that a start costs little and no line's state reaches
another; a child that takes too long is killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import time
import typing
from pathlib import Path
from typing import Any

import torch

from fastrank.cli.commands import COMMANDS
from fastrank.cli.main import main

PATIENCE = 60.0  # seconds for one line, on a busy machine
#: Bounds that keep a line that turns out to be in order short.
SHORT: dict[str, list[str]] = {
    "train": [
        *("--max_steps", "1", "--eval_groups", "2", "--eval_strategy", "no"),
        *("--save_strategy", "no", "--disable_tqdm", "true"),
    ],
    "iterate": ["--max_steps", "1", "--rounds", "1", "--max_new_tokens", "1"],
    "sample": ["--max_new_tokens", "1", "--num_responses", "2"],
    "evaluate": ["--max_new_tokens", "1"],
    "bench": ["--workload", "nope"],
}
USUAL: dict[str, list[list[str]]] = {
    "train": [[], ["--model", "model", "--data", "d.jsonl"]],
    "sample": [["--model", "model", "--prompts", "d.jsonl", "--output", "o"]],
    "reward": [["--data", "d.jsonl", "--output", "o", "--reward", "r.py:f"]],
    "iterate": [["--model", "model", "--prompts", "d.jsonl", "--reward", "r.py:f"]],
    "evaluate": [["--model", "model", "--prompts", "d.jsonl"], ["--model", "model"]],
    "score": [["--model", "model", "--data", "d.jsonl"]],
    "inspect": [["d.jsonl"], ["d.jsonl", "--tokenizer", "model"]],
    "bench": [[]],
    "doctor": [[]],
}
#: Compilers and servers.
LEFT_OUT = ("torch_compile", "push_to_hub", "hub_", "trackio", "dataloader_num_workers", "dataset_")
VALUES = [
    *("", " ", "0", "1", "2", "-1", "0.5", "1e-3", "nan", "inf", "-inf", "1e400", "9" * 30, "010"),
    *("true", "false", "null", "none", "auto", "yes", "x", "-", "--", "=", "é\u202e", "a" * 5000),
    *("{}", "[]", "{", "[" * 9000, '{"a": 1}', '{"a": NaN}', '{"margin": 1e999}', "{'a': 1}"),
    *("d.jsonl", "model", ".", "no/such", "~nosuchuser/x", "pipe", "null.dev", "r.py:f", "r.py:g"),
    *("r.py:", ":f", "no.py:f", "steps", "epoch", "cpu", "cuda:99", "float32", "bf16", "rrhf,pro"),
    *("nobody/nothing", "d.jsonl:train", "*.jsonl", "a=b", "prompt=x,y=prompt", "one\ntwo", "a\0b"),
]

PLAIN = ["0", "1", "2", "0.5", "true", "false", "none", "x", "d.jsonl"]


def options_of(name: str) -> dict[str, list[str]]:
    """Values of its type for every option of a command."""
    found = {}
    for kind in COMMANDS[name]().options:
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if field.init and not field.name.startswith(LEFT_OUT):
                found[field.name] = _typed(hints[field.name])
    return found


def _typed(hint: Any) -> list[str]:
    members = typing.get_args(hint) or (hint,)
    if typing.get_origin(hint) is typing.Literal:
        return [str(member) for member in members]
    literals = [m for m in members if typing.get_origin(m) is typing.Literal]
    if literals:
        return _typed(literals[0])
    for kind, texts in (
        (bool, ["true", "false"]),
        (int, ["0", "1", "2", "3", "7", "-1"]),
        (float, ["0", "0.5", "1", "2.5", "-0.5", "1e30"]),
    ):
        if kind in members:
            return texts
    return [*PLAIN, "d.jsonl", "model", "r.py:f", "p.png", "no", "steps", "epoch"]


def random_line(rng: random.Random, names: dict[str, dict[str, list[str]]]) -> list[str]:
    name = rng.choice(list(COMMANDS))
    line = [name, *rng.choice(USUAL.get(name, [[]])), *SHORT.get(name, [])]
    for _ in range(rng.choice([1, 1, 2, 4])):
        chosen = rng.choice(list(names[name]))
        option = f"--{chosen}"
        if rng.random() < 0.04:
            option = rng.choice([option + "x", option[:-1], option.replace("_", "-"), "-" + option])
        value = rng.choice(VALUES if rng.random() < 0.25 else names[name][chosen])
        written = rng.choice([[option, value], [f"{option}={value}"]])
        line += written if rng.random() < 0.95 else [option]
    if rng.random() < 0.05:
        line.insert(rng.randint(0, len(line)), rng.choice(VALUES))
    return line


def random_yaml(rng: random.Random, names: list[str]) -> bytes:
    def value(depth: int) -> str:
        kind = rng.random()
        if depth > 3 or kind < 0.6:
            scalar = rng.choice(
                PLAIN
                if rng.random() < 0.4
                else [*VALUES, "2020-01-01", "2020-99-99", "1:30", "0x1F", ".inf", "~"]
            )
            tag = rng.choice(
                [*[""] * 12, "!!int ", "!!timestamp ", "!!binary ", "!x ", "&a ", "*a "]
            )
            return tag + rng.choice([scalar, json.dumps(scalar), f"'{scalar}'"])
        items = [value(depth + 1) for _ in range(rng.randint(0, 3))]
        if kind < 0.8:
            return "[" + ", ".join(items) + "]"
        return "{" + ", ".join(f"k{i}: {item}" for i, item in enumerate(items)) + "}"

    lines = [f"{rng.choice(names)}: {value(0)}" for _ in range(rng.randint(1, 5))]
    data = bytearray("\n".join(lines).encode())
    for _ in range(rng.choice([0, 0, 1, 5])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def run(line: list[str], folder: Path) -> dict[str, Any]:
    """Exit code, lines of stderr that are no bars or warnings, and seconds."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    (folder / "o").unlink(missing_ok=True)
    log = folder.parent / "log"
    begun = time.monotonic()
    child = os.fork()
    if not child:
        code = 70
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(out, 2)
            os.chdir(folder)
            torch.set_num_threads(1)
            code = main(line)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - begun
        if done:
            break
        if seconds > PATIENCE:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            break
        time.sleep(0.005)
    said = log.read_text(errors="replace").splitlines()
    return {
        "line": line,
        "code": os.waitstatus_to_exitcode(status),
        "errors": [text for text in said if ": error: " in text],
        "traceback": "Traceback" in "\n".join(said),
        "last": said[-1:],
        "seconds": seconds,
    }


def fuzz(folder: Path, seed: int, lines: int, files: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    os.mkfifo(folder / "pipe")
    (folder / "null.dev").symlink_to("/dev/null")
    (folder / "r.py").write_text("def f(prompt, response):\n    return len(response)\n")
    names = {name: options_of(name) for name in COMMANDS}
    found = [run(random_line(rng, names), folder) for _ in range(lines)]
    for _ in range(files):
        name = rng.choice(["train", "inspect", "score"])
        (folder / "c.yaml").write_bytes(random_yaml(rng, list(names[name])))
        text = repr((folder / "c.yaml").read_bytes())
        line = [name, *USUAL[name][-1], *SHORT.get(name, []), "--config", "c.yaml"]
        found.append(run(line, folder) | {"yaml": text})
    return found


if __name__ == "__main__":
    place, *numbers = sys.argv[1:]
    result = fuzz(Path(place), *map(int, numbers))
    Path(place).with_name("found.json").write_text(json.dumps(result))
