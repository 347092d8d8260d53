"""Declaring options: dataclasses whose fields carry their help text, composed by inheritance.

An option is declared once, by `option`, in a small dataclass. A command inherits the small
dataclasses that it needs; where its default or help differs, or where it cannot do without a value,
it says so by `change`, and by nothing else:

    >>> @options
    ... class Output(Options):
    ...     '''Where results go.'''
    ...
    ...     output: str | None = option("File to write.", default=None)
    >>> @options
    ... class SampleOptions(Output):
    ...     '''Options of a command that cannot do without a file.'''
    ...
    ...     output: str = change("JSON Lines file to write.", required=True)
    >>> SampleOptions(output="out.jsonl")
    SampleOptions(output='out.jsonl')

The first line of the docstring of the class that declares an option names its group.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from fastrank.errors import InputError
from fastrank.options.paths import absolute_path

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_: Any) -> Callable[[Any], Any]:
        """Stand in for `typing.dataclass_transform`, which Python 3.10 lacks."""
        return lambda decorated: decorated


Class = TypeVar("Class", bound=type)


def option(
    help: str,
    *,
    default: Any = MISSING,
    default_factory: Any = MISSING,
    aliases: Sequence[str] = (),
) -> Any:
    """Declare an option; without a default it is required. ``aliases`` are other names of it on the
    command line and in its YAML file."""
    spelled = [f"--{alias.replace('_', joint)}" for alias in aliases for joint in "_-"]
    metadata = {"help": help, **({"aliases": spelled} if spelled else {})}
    return dataclasses.field(
        default=default, default_factory=default_factory, metadata=metadata, kw_only=True
    )


@dataclass(frozen=True)
class _Change:
    help: str | None
    default: Any
    required: bool

    def of(self, field: Any) -> Any:
        """The field with the change made to it."""
        metadata = {**field.metadata, **({} if self.help is None else {"help": self.help})}
        default, factory = field.default, field.default_factory
        if self.required or self.default is not MISSING:
            default, factory = self.default, MISSING
        return dataclasses.field(
            default=default, default_factory=factory, metadata=metadata, kw_only=field.kw_only
        )


def change(help: str | None = None, *, default: Any = MISSING, required: bool = False) -> Any:
    """Give an inherited option another help text or default, or make it required.

    The annotation beside it is the option's type in the inheriting class.
    """
    return _Change(help, default, required)


@dataclass_transform(field_specifiers=(option,), kw_only_default=True)
def options(cls: Class) -> Class:
    """Make a class of options a dataclass.

    Raises:
        TypeError: a `change` of an option that no base class declares.
    """
    inherited: dict[str, Any] = {}
    for base in reversed(cls.__mro__[1:]):
        inherited |= getattr(base, "__dataclass_fields__", {})
    for name, value in list(vars(cls).items()):
        if isinstance(value, _Change):
            if name not in inherited:
                raise TypeError(f"{cls.__name__}: no base class declares the option {name}")
            setattr(cls, name, value.of(inherited[name]))
    made: Any = dataclass(cls)
    # A command's help lists its options by base class, in the order of the bases.
    order = [name for base in cls.__bases__ for name in getattr(base, "__dataclass_fields__", ())]
    fields = made.__dataclass_fields__
    made.__dataclass_fields__ = {name: fields[name] for name in dict.fromkeys([*order, *fields])}
    return made


@options
class Options:
    """Base class of every class of options."""

    written: ClassVar[tuple[str, ...]] = ()
    """The options that a class declares and that are paths of files or folders to write."""

    def __post_init__(self) -> None:
        """Check the values; a subclass calls its base class's checks as well."""
        check_values(self)


def values_of(given: Any, kind: type) -> dict[str, Any]:
    """The values of those options of ``given`` that ``kind`` has, by name."""
    return {field.name: getattr(given, field.name) for field in dataclasses.fields(kind)}


def check_values(given: Any) -> None:
    """Check what holds for every option: a number is finite and fits into 64 bits; paths that are
    written become absolute.

    Raises:
        InputError: a number is not, or a path cannot be one.
    """
    for field in dataclasses.fields(given):
        value = getattr(given, field.name, None)
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{field.name} must be a finite number, got {value}")
        if isinstance(value, int) and not -_MOST <= value <= _MOST:
            raise InputError(f"{field.name} must be a number of 64 bits, got {str(value)[:40]}")
    for name in {name for cls in type(given).__mro__ for name in vars(cls).get("written", ())}:
        value = getattr(given, name)
        if value is not None:
            setattr(given, name, str(absolute_path(value)))


#: Larger whole numbers are errors of other kinds wherever they meet a tensor or a file.
_MOST = (1 << 63) - 1


def check_least(given: object, prefix: str = "", **least: int) -> None:
    """Raise `InputError` for an option below its least value; None stands for no value."""
    for name, bound in least.items():
        value = getattr(given, name)
        if value is not None and value < bound:
            raise InputError(f"{prefix}{name} must be at least {bound}, got {value}")
