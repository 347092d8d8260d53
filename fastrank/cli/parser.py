"""One parser for every command: dataclasses in, checked instances out.

A thin layer on transformers' `HfArgumentParser`, which knows `TrainingArguments` and makes the
options. Added here: a YAML file that the command line overrides, repeated options that make a list,
JSON for dictionaries, the unions that `HfArgumentParser` reads as one of their members only, the
nearest name for a typo, and errors that are one line. A YAML value goes through the same conversion
as the option it stands for, so ``lr: 1e-3`` and ``--lr 1e-3`` cannot differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, Literal, NoReturn, Union

from transformers.hf_argparser import HfArgumentParser, string_to_bool

from fastrank.cli.yaml_file import read_yaml
from fastrank.errors import InputError


def parse(
    dataclass_types: Sequence[type],
    argv: Sequence[str],
    *,
    prog: str,
    positional: str | None = None,
    defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> tuple[Any, ...]:
    """Instances of the dataclasses, filled from ``--config`` and ``argv`` (which wins).

    Args:
        dataclass_types: their fields become options, spelled with underscores or dashes.
        argv: the arguments after the command's name.
        prog: the command as the user calls it, e.g. ``fastrank train``.
        positional: a field that may also be given without its option's name.
        defaults: called with the values that were given; what it returns stands in for the
            dataclasses' own defaults.

    Raises:
        InputError: an unknown option or key, a value of the wrong kind, a required option that is
            absent, a configuration file that cannot be read, or what a dataclass itself refuses.
    """
    parser = CommandParser(dataclass_types, prog, positional)
    parser.forget_defaults()
    given = parser.parse_given(list(argv))
    config = given.pop("config", None)
    values = parser.read_config(config) if config is not None else {}
    values.update(given)
    parser.refuse_empty(values)
    if defaults is not None:
        values = {**defaults(values), **values}
    return tuple(parser.build(kind, values) for kind in dataclass_types)


#: What other trainers call an option, whose name resembles none here or the wrong one.
_ELSEWHERE = {
    "batch_size": "per_device_train_batch_size",
    "beta": """loss_kwargs '{"beta": 0.1}'""",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "max_completion_length": "max_response_length",
    "ref_model": "reference_model",
}


class CommandParser(HfArgumentParser):
    """The options of a command; its help is `fastrank.cli.help`'s."""

    def __init__(self, dataclass_types: Sequence[type], prog: str, positional: str | None) -> None:
        kinds: list[Any] = list(dataclass_types)
        super().__init__(kinds, prog=prog, add_help=False, allow_abbrev=False)
        self._hints: dict[str, Any] = {}
        for kind in dataclass_types:
            self._hints.update(typing.get_type_hints(kind))
        self._names = {f.name for kind in dataclass_types for f in dataclasses.fields(kind)}
        self._aliases = {
            alias.removeprefix("--"): f.name
            for kind in dataclass_types
            for f in dataclasses.fields(kind)
            for alias in f.metadata.get("aliases", ())
        }
        # Our own options are declared by keyword; transformers has some that may be empty.
        every = [field for kind in dataclass_types for field in dataclasses.fields(kind)]
        self._texts = {field.name for field in every if field.kw_only} | {"output_dir"}
        self._one_or_several: set[str] = set()  # a text or a list of texts
        for action in self._actions:
            if action.dest in self._hints and not _is_negation(action):
                _adapt(action, self._hints[action.dest])
                if isinstance(action, _List) and str in _members(self._hints[action.dest]):
                    self._one_or_several.add(action.dest)
        if positional is not None:
            shown = positional.upper()
            self.add_argument(positional, nargs="?", metavar=shown, default=argparse.SUPPRESS)
        self.add_argument(
            "--config",
            metavar="FILE",
            default=argparse.SUPPRESS,
            help="YAML file of options; the command line wins over it",
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(message)

    def forget_defaults(self) -> None:
        """Let a namespace hold only what was given, so that sources can be laid over each other."""
        for action in self._actions:
            action.default = argparse.SUPPRESS
            action.required = False

    def parse_given(self, argv: list[str]) -> dict[str, Any]:
        """The options that ``argv`` names, converted."""
        namespace, rest = self.parse_known_args(self._explicit(argv))
        if rest:
            raise InputError(self._unknown(rest[0]))
        values = vars(namespace)
        for name in self._one_or_several & set(values):
            if len(values[name]) == 1:
                (values[name],) = values[name]
        return values

    def _explicit(self, argv: list[str]) -> list[str]:
        """``argv`` without what argparse reads otherwise than people mean it.

        A negative number with an exponent is no option: ``--x -1e-3`` becomes ``--x=-1e-3``. A flag
        does not take what follows for its value unless it is one: ``--json FILE`` becomes
        ``--json=true FILE``.
        """
        flags = {
            option
            for action in self._actions
            if action.nargs == "?" and action.const is True
            if str not in _members(self._hints[action.dest])
            for option in action.option_strings
        }
        out: list[str] = []
        for i, argument in enumerate(argv):
            after_option = bool(out) and out[-1].startswith("--") and "=" not in out[-1]
            if _NEGATIVE.match(argument) and after_option:
                out[-1] += f"={argument}"
            elif argument in flags and not set(map(str.lower, argv[i + 1 : i + 2])) & _BOOLEANS:
                out.append(f"{argument}=true")
            else:
                out.append(argument)
        return out

    def _unknown(self, argument: str) -> str:
        if not argument.startswith("-"):
            return f"unexpected argument '{argument[:60]}' (see {self.prog} --help)"
        name = argument.split("=")[0].replace("-", "_").lstrip("_")
        near = self._nearest(name)
        hint = f", did you mean --{near}?" if near else f" (see {self.prog} --help)"
        return f"unknown option {argument.split('=')[0][:60]}{hint}"

    def _nearest(self, name: str) -> str | None:
        """The option that an unknown name is likely to mean."""
        usual, _, example = _ELSEWHERE.get(name, "").partition(" ")
        if usual in self._names:
            return f"{usual} {example}".rstrip()
        near = difflib.get_close_matches(name, [*self._names, "config"], 1)
        return near[0] if near else None

    def read_config(self, path: str) -> dict[str, Any]:
        """The options that a YAML file names, converted as on the command line."""
        values: dict[str, Any] = {}
        for key, value in read_yaml(path).items():
            name = key.replace("-", "_")
            name = self._aliases.get(name, name)
            if name not in self._names:
                near = self._nearest(name)
                hint = f", did you mean {near}?" if near else f" (see {self.prog} --help)"
                raise InputError(f"{path}: unknown option {key[:60]}{hint}")
            if name in values:
                raise InputError(f"{path}: {name} is there twice")
            if value is None or value == []:
                if (types.NoneType if value is None else list) not in _kinds(self._hints[name]):
                    got = "null" if value is None else "an empty list"
                    raise InputError(f"{path}: {name} needs a value, got {got}")
                values[name] = value
                continue
            try:
                values.update(self.parse_given(_as_arguments(name, value)))
            except InputError as error:
                raise InputError(f"{path}: {error}") from error
        return values

    def refuse_empty(self, values: Mapping[str, Any]) -> None:
        """Refuse a text without a character: as a path it would be the current folder."""
        for name in self._texts & values.keys():
            texts = values[name] if isinstance(values[name], list) else [values[name]]
            if any(isinstance(text, str) and not text.strip() for text in texts):
                raise InputError(f"--{name} must have a value, got an empty text")

    def build(self, kind: type, values: dict[str, Any]) -> Any:
        """One dataclass from the values that are its own."""
        fields = [field for field in dataclasses.fields(kind) if field.init]
        missing = [
            f"--{field.name}"
            for field in fields
            if field.name not in values
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise InputError(f"expected {' and '.join(missing)} (see {self.prog} --help)")
        own = {field.name: values[field.name] for field in fields if field.name in values}
        try:
            return kind(**own)
        except InputError:
            raise
        except ModuleNotFoundError:  # an extra that is not installed: main names its install line
            raise
        except (ValueError, TypeError, ImportError, OSError) as error:  # a dataclass's own checks
            raise InputError(" ".join(str(error).split())) from error


def _is_negation(action: argparse.Action) -> bool:
    return (
        any(option.startswith("--no_") for option in action.option_strings)
        and isinstance(action.const, bool)
        and action.nargs == 0
    )


def _kinds(hint: Any) -> list[Any]:
    """The types of a hint without their arguments: of ``list[str] | None``, list and NoneType."""
    union = typing.get_origin(hint) in (Union, types.UnionType)
    return [
        typing.get_origin(member) or member
        for member in (typing.get_args(hint) if union else (hint,))
    ]


def _members(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (Union, types.UnionType):
        return tuple(m for m in typing.get_args(hint) if m is not type(None))
    return (hint,)


def _adapt(action: argparse.Action, hint: Any) -> None:
    """Give an option the conversion that its field's whole type asks for."""
    members = _members(hint)
    lists = [m for m in members if m is list or typing.get_origin(m) is list]
    if lists:
        inner = (*typing.get_args(lists[0]), str)[0]
        action.nargs = "+"
        action.type = _choice(_members(inner))
        action.choices = None
        action.__class__ = _List
        return
    if bool in members:
        action.nargs, action.const = "?", True
    converter = _choice(members)
    if converter is not None and not action.choices:
        action.type = converter


def _choice(members: tuple[Any, ...]) -> Callable[[str], Any]:
    """A converter that takes the first member of a union that a text can be."""
    converters = [_converter(member) for member in members if member is not str]
    if str in members:
        converters.append(str)

    def convert(text: str) -> Any:
        problem: Exception | None = None
        for converter in converters:
            try:
                return converter(text)
            except (ValueError, TypeError, RecursionError, argparse.ArgumentTypeError) as error:
                problem = error
        expected = " or ".join(_name(member) for member in members)
        reason = f" ({problem})" if isinstance(problem, json.JSONDecodeError) else ""
        raise argparse.ArgumentTypeError(f"expected {expected}, got '{text[:60]}'{reason}")

    return convert


def _name(member: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if isinstance(member, type) and issubclass(member, Enum):
        return " or ".join(str(item.value) for item in member)
    if member is dict or typing.get_origin(member) is dict or dataclasses.is_dataclass(member):
        return "a JSON object"
    return names.get(member) or str(getattr(member, "__name__", member))


def _converter(member: Any) -> Callable[[str], Any]:
    if member is bool:
        return _bool
    if member is dict or typing.get_origin(member) is dict:
        return _object
    if typing.get_origin(member) is Literal:
        spelled = {str(value).lower(): value for value in typing.get_args(member)}
        return lambda text: _lookup(spelled, text)
    if dataclasses.is_dataclass(member) and isinstance(member, type):
        return lambda text: member(**_object(text))
    converter: Callable[[str], Any] = member
    return converter


def _bool(text: str) -> bool:
    return bool(string_to_bool({"on": "yes", "off": "no"}.get(text.lower(), text)))


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _lookup(spelled: dict[str, Any], text: str) -> Any:
    if text.lower() not in spelled:
        raise ValueError(f"not one of {', '.join(spelled)}")
    return spelled[text.lower()]


class _List(argparse.Action):
    """``--x a b`` and ``--x a --x b`` both give ``["a", "b"]``."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, [*getattr(namespace, self.dest, []), *values])


#: What a flag takes for its value; single letters are rather taken for a file's name.
_BOOLEANS = {"true", "false", "yes", "no", "on", "off", "1", "0"}
_NEGATIVE = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")


def _as_arguments(name: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [f"--{name}={_as_text(name, item)}" for item in value]
    return [f"--{name}={_as_text(name, value)}"]


def _as_text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return json.dumps(value)
    raise InputError(f"{name} must be a list of values, got {json.dumps(value)[:60]} in it")
