"""The command-line parser: options, YAML, lists, dictionaries, typos."""

from __future__ import annotations

import dataclasses
import os
import typing
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from transformers import TrainingArguments
from transformers.debug_utils import DebugOption

from fastrank.cli.parser import parse
from fastrank.errors import InputError


@dataclass
class Options:
    data: str = field(metadata={"help": "a file"})
    model: list[str] = field(default_factory=list)
    loss_kwargs: dict[str, Any] = field(default_factory=dict)
    extra_kwargs: dict[str, Any] | str | None = None
    beta: float = field(default=1.0, metadata={"help": "a number"})
    top_k: int | None = None
    shared_prompts: bool = True
    json: bool = False
    tf32: bool | None = None
    pooling: Literal["mean", "sum"] = "mean"
    report_to: None | str | list[str] = "none"

    def __post_init__(self) -> None:
        if self.beta > 100:
            raise ValueError("beta must be at most 100,\ngot " + str(self.beta))


@dataclass
class More:
    seed: int = 42


def run(*argv: str, kinds: tuple[type, ...] = (Options,)) -> Any:
    return parse(kinds, argv, prog="fastrank x", positional="data")[0]


def refused(*argv: str) -> str:
    with pytest.raises(InputError) as caught:
        run(*argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["f"], {"data": "f"}),
        (["--data", "f"], {"data": "f"}),
        (["f", "--model", "a", "--model", "b"], {"model": ["a", "b"]}),
        (["f", "--model", "a", "b"], {"model": ["a", "b"]}),
        (
            ["f", "--model", "a", "b", "--tf32", "1", "--model=c"],
            {"model": ["a", "b", "c"], "tf32": True},
        ),
        (["f", "--loss_kwargs", '{"margin": 1e-1}'], {"loss_kwargs": {"margin": 0.1}}),
        (["f", "--loss-kwargs", "{}"], {"loss_kwargs": {}}),
        (["f", "--extra_kwargs", '{"a": [1]}'], {"extra_kwargs": {"a": [1]}}),
        (["f", "--extra_kwargs", "file.json"], {"extra_kwargs": "file.json"}),
        (["f", "--beta", "-1e-3"], {"beta": -1e-3}),
        (["f", "--top-k", "-5"], {"top_k": -5}),
        (["--json", "f"], {"json": True}),
        (["--json", "false", "f"], {"json": False}),
        (["f", "--no_shared_prompts"], {"shared_prompts": False}),
        (["f", "--no-shared-prompts"], {"shared_prompts": False}),
        (["f", "--shared_prompts", "no"], {"shared_prompts": False}),
        (["--tf32", "f"], {"tf32": True}),
        (["f", "--tf32=false"], {"tf32": False}),
        (["f", "--pooling", "sum"], {"pooling": "sum"}),
        (["f", "--report_to", "wandb"], {"report_to": "wandb"}),
        (["f", "--report_to", "wandb", "tensorboard"], {"report_to": ["wandb", "tensorboard"]}),
        (["f", "--report_to", "a", "--report_to", "b"], {"report_to": ["a", "b"]}),
    ],
)
def test_options(argv: list[str], expected: dict[str, Any]) -> None:
    assert run(*argv) == Options(**{"data": "f", **expected})


def test_several_dataclasses() -> None:
    options, more = parse((Options, More), ["--data", "f", "--seed", "3"], prog="p")
    assert (options, more) == (Options("f"), More(3))


def test_defaults_are_fresh() -> None:
    run("f").model.append("x")
    assert run("f").model == []


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "expected --data (see fastrank x --help)"),
        (["f", "--modle", "a"], "unknown option --modle, did you mean --model?"),
        (["f", "--no-shared-promts"], "did you mean --shared_prompts?"),
        (["f", "--confg", "x"], "unknown option --confg, did you mean --config?"),
        (["f", "--qqqqqq"], "unknown option --qqqqqq (see fastrank x --help)"),
        (["f", "g"], "unexpected argument 'g'"),
        (["f", "--top_k"], "argument --top_k/--top-k: expected one argument"),
        (["f", "--top_k", "1.5"], "expected a whole number, got '1.5'"),
        (["f", "--beta", "much"], "expected a number, got 'much'"),
        (["f", "--json=maybe"], "expected true or false, got 'maybe'"),
        (["f", "--pooling", "min"], "invalid choice: 'min' (choose from"),
        (["f", "--loss_kwargs", "{margin: 1}"], "expected a JSON object, got '{margin: 1}'"),
        (["f", "--loss_kwargs", "[1]"], "expected a JSON object, got '[1]'"),
        (["f", "--beta", "200"], "beta must be at most 100, got 200.0"),
        (["f", "--model"], "argument --model: expected at least one argument"),
    ],
)
def test_refusals(argv: list[str], expected: str) -> None:
    assert expected in refused(*argv)


def test_abbreviations_are_not_taken() -> None:
    assert "unknown option --mod," in refused("f", "--mod", "a")


def _yaml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_yaml(tmp_path: Path) -> None:
    config = _yaml(
        tmp_path,
        "data: f\nmodel: [a, 5]\nloss-kwargs: {margin: 1e-3, deep: {x: true}}\nbeta: 1e-3\n"
        "top_k: null\nshared_prompts: off\npooling: sum\nreport_to: [wandb, tensorboard]\n",
    )
    assert run("--config", config) == Options(
        "f",
        model=["a", "5"],
        loss_kwargs={"margin": 0.001, "deep": {"x": True}},
        beta=0.001,
        shared_prompts=False,
        pooling="sum",
        report_to=["wandb", "tensorboard"],
    )


def test_the_command_line_wins_over_yaml(tmp_path: Path) -> None:
    config = _yaml(tmp_path, "data: f\nmodel: [a, b]\nbeta: 2\nshared_prompts: false\n")
    options = run("--model", "c", "--config", config, "--beta", "1.0", "--shared_prompts")
    # 1.0 is also the default: given explicitly, it still wins.
    assert options == Options("f", model=["c"], beta=1.0, shared_prompts=True)


#: Nine values, each nine times the one before: a billion.
_ALIASES = "loss_kwargs: {a: &a1 [1, 1]" + "".join(
    f", a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(2, 11)
) + "}\n"  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("modl: [a]\n", "config.yaml: unknown option modl, did you mean model?"),
        ("beta: much\n", "config.yaml: argument --beta: expected a number, got 'much'"),
        ("beta: [1\n", "config.yaml: malformed YAML"),
        ("- a\n- b\n", "config.yaml: expected a mapping of options, got list"),
        ("!!python/object/apply:os.system ['true']\n", "expected a mapping of options, got list"),
        ("model: !!python/object/apply:os.system [x]\n", "line 1: tag:yaml.org,2002:python/object"),
        ("beta: !number 3\n", "line 1: !number is no kind of value"),
        ("beta: !!binary Mw==\n", "is no kind of value"),
        ("beta: 2020-99-99\n", "expected a number, got '2020-99-99'"),
        ("top_k: 1:30\n", "expected a whole number, got '1:30'"),  # 90 in YAML 1.1
        ("beta: ~\n", "beta needs a value, got null"),
        ("top_k: []\n", "top_k needs a value, got an empty list"),
        ("data: a\ndata: b\n", "line 2: data is there twice"),
        ("loss-kwargs: {}\nloss_kwargs: {}\n", "loss_kwargs is there twice"),
        ("[a]: b\n", "line 1: a name must be a text"),
        ("model: [a, ~]\n", "model must be a list of values, got null in it"),
        ("model: [a, [b]]\n", 'model must be a list of values, got ["b"] in it'),
        ("loss_kwargs: &a {x: *a}\n", "line 1: deeper nesting than options can have"),
        ("model: &a [*a]\n", "line 1: deeper nesting than options can have"),
        (f"model: {'[' * 5000}\n", "malformed YAML: nested too deeply"),
        (f"model: {'[' * 100}{']' * 100}\n", "deeper nesting than options can have"),
        (_ALIASES, "more values than options can have"),
        (f"data: {'x' * 300_000}\n", "larger than 256 KiB, no file of options"),
        ("loss_kwargs: 3\n", "expected a JSON object, got '3'"),
    ],
)
def test_yaml_refusals(text: str, expected: str, tmp_path: Path) -> None:
    assert expected in refused("f", "--config", _yaml(tmp_path, text))


def test_yaml_that_cannot_be_read(tmp_path: Path) -> None:
    assert "nope.yaml: cannot be read: No such file" in refused("--config", "nope.yaml")
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    message = refused("--config", str(tmp_path / "c.yaml"))
    assert "not UTF-8 text" in message or "malformed YAML" in message
    assert run("f", "--config", _yaml(tmp_path, "")) == Options("f")


def test_yaml_scalars_are_the_texts_they_are(tmp_path: Path) -> None:
    """No octal numbers, dates or sexagesimal times, as on the command line."""
    config = _yaml(tmp_path, "data: 2020-01-01\nmodel: [010, 1:30, no, '~']\nreport_to: on\n")
    options = run("--config", config)
    assert options.data == "2020-01-01" and options.model == ["010", "1:30", "no", "~"]
    assert options.report_to == "on"
    typed = _yaml(tmp_path, "loss_kwargs: {a: 1, b: 1e-3, c: True, d: ~, e: no, f: '1', g: .nan}")
    assert run("f", "--config", typed).loss_kwargs == {
        **{"a": 1, "b": 0.001, "c": True, "d": None, "e": "no", "f": "1", "g": ".nan"}
    }


def test_yaml_is_a_file_and_no_device_or_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opened, it would wait for a writer
    assert "expected a YAML file, got a pipe" in refused("f", "--config", str(tmp_path / "pipe"))
    assert "got a device" in refused("f", "--config", "/dev/zero")
    assert "expected a YAML file, got a folder" in refused("f", "--config", str(tmp_path))


def test_json_that_nests_too_deeply_is_one_line() -> None:
    assert "expected a JSON object" in refused("f", "--loss_kwargs", '{"a":' + "[" * 50_000)


# Every TrainingArguments option, by the type of its field. A field that needs a particular text:
SAMPLES: dict[str, tuple[str, Any]] = {
    "trackio_static_space_id": ("false", False),
    "include_num_input_tokens_seen": ("non_padding", "non_padding"),
    "parallelism_config": ('{"tp_size": 1}', None),
    "debug": ("underflow_overflow", DebugOption.UNDERFLOW_OVERFLOW),
    "include_for_metrics": ("inputs", ["inputs"]),
    # Fields of text with a list of choices that the type does not show.
    "log_level": ("debug", "debug"),
    "log_level_replica": ("debug", "debug"),
    "dataloader_multiprocessing_context": ("spawn", "spawn"),
    "train_sampling_strategy": ("sequential", "sequential"),
    "ddp_backend": ("gloo", "gloo"),
}


def _sample(name: str, hint: Any) -> tuple[str, Any]:
    """A text for the option, and the value that it should become."""
    if name in SAMPLES:
        return SAMPLES[name]
    members = typing.get_args(hint) or (hint,)
    enums = [m for m in members if isinstance(m, type) and issubclass(m, Enum)]
    if enums:
        return next((str(item.value), item.value) for item in enums[0])
    if any(m is dict or typing.get_origin(m) is dict for m in members):
        return '{"a": 1}', {"a": 1}
    if bool in members:
        return "true", True
    for kind, text in ((float, "1e-3"), (int, "7")):
        if kind in members:
            return text, kind(text)
    if typing.get_origin(hint) is list or str not in members:
        return "word", ["word"]
    return "word", "word"


HINTS = typing.get_type_hints(TrainingArguments)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(TrainingArguments) if f.init])
def test_every_training_argument(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each option reaches the dataclass with the right type, from both sources."""
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)
    text, expected = _sample(name, HINTS[name])
    for argv in ([f"--{name}", text], [f"--{name.replace('_', '-')}={text}"]):
        (arguments,) = parse((TrainingArguments,), argv, prog="p")
        value = getattr(arguments, name)
        if name == "parallelism_config":
            assert value.tp_size == 1
            continue
        assert value == expected
        assert isinstance(expected, str) or type(value) is type(expected)
    quoted = f"'{text}'" if text.startswith("{") or text == "word" else text
    config = _yaml(tmp_path, f"{name}: {quoted}\n")
    (arguments,) = parse((TrainingArguments,), ["--config", config], prog="p")
    assert getattr(arguments, name) == value


def test_training_arguments_are_checked_by_themselves() -> None:
    argv = ["--output_dir", "o", "--load_best_model_at_end", "--eval_strategy", "steps",
            "--save_strategy", "epoch", "--use_cpu"]  # fmt: skip
    with pytest.raises(InputError, match="requires the save and eval strategy to match"):
        parse((TrainingArguments,), argv, prog="p")
