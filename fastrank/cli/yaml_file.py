"""The YAML file of ``--config``: a mapping of options, of bounded size.

A scalar stays the text that it is, for the option's own conversion to read: YAML's dates, its
``no`` for false, ``1:30`` for 90 and ``010`` for 8 are nothing that an option could mean. Only in
mappings (``loss_kwargs``), which become JSON, are numbers and true and false values of their type,
by the rules of YAML 1.2.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from fastrank.errors import InputError
from fastrank.options.paths import file_kind, local_path

if TYPE_CHECKING:
    import yaml

_LARGEST = 1 << 18  # bytes
_MOST_VALUES = 10_000  # aliases count as what they stand for
_DEEPEST = 20

_TAG = "tag:yaml.org,2002:"
_SCALARS = [f"{_TAG}{kind}" for kind in ("str", "int", "float", "bool", "null")]
_FLOAT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
_INT = re.compile(r"^[-+]?\d+$")
_BOOL = re.compile(r"^(true|false)$", re.I)
_NULL = re.compile(r"^(~|null|)$", re.I)


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping that a file holds: of texts, None, lists and mappings of them.

    Raises:
        InputError: the file is no file, too large, malformed, or holds something else.
    """
    import yaml

    text = _text(path)
    try:
        return _Reader(path).mapping(yaml.compose(text, Loader=yaml.BaseLoader))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: malformed YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise InputError(f"{path}: malformed YAML: nested too deeply") from error


def _text(path: str) -> str:
    """The file's text. A pipe or a device is not opened: it could last for ever."""
    file = local_path(path)
    try:
        kind = file_kind(file)
        if kind not in (None, "a file"):
            raise InputError(f"{path}: expected a YAML file, got {kind}")
        with file.open("rb") as opened:
            data = opened.read(_LARGEST + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > _LARGEST:
        raise InputError(f"{path}: larger than {_LARGEST >> 10} KiB, no file of options")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start + 1})") from error


class _Reader:
    def __init__(self, path: str) -> None:
        self.path = path
        self.count = 0

    def mapping(self, node: yaml.Node | None) -> dict[str, Any]:
        """The options, whose values are texts."""
        import yaml

        if node is None or (isinstance(node, yaml.ScalarNode) and self._scalar(node, True) is None):
            return {}
        if not isinstance(node, yaml.MappingNode):
            kind = "list" if isinstance(node, yaml.SequenceNode) else "str"
            raise InputError(f"{self.path}: expected a mapping of options, got {kind}")
        return self._pairs(node, 0, typed=False)

    def _pairs(self, node: yaml.MappingNode, depth: int, *, typed: bool) -> dict[str, Any]:
        import yaml

        found: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._error(key, "a name must be a text")
            if key.value in found:
                raise self._error(key, f"{key.value[:60]} is there twice")
            found[key.value] = self._value(value, depth + 1, typed)
        return found

    def _value(self, node: yaml.Node, depth: int, typed: bool) -> Any:
        import yaml

        self.count += 1
        if self.count > _MOST_VALUES or depth > _DEEPEST:
            what = "more values" if self.count > _MOST_VALUES else "deeper nesting"
            raise self._error(node, f"{what} than options can have")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, typed)
        if node.tag not in (f"{_TAG}map", f"{_TAG}seq"):
            raise self._error(node, f"{node.tag[:60]} is no kind of value")
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, depth + 1, typed) for item in node.value]
        assert isinstance(node, yaml.MappingNode)
        return self._pairs(node, depth, typed=True)

    def _scalar(self, node: yaml.ScalarNode, typed: bool) -> Any:
        text: str = node.value
        if node.tag not in _SCALARS:
            raise self._error(node, f"{node.tag[:60]} is no kind of value")
        if node.style is not None:  # in quotes, or a block
            return text
        if _NULL.match(text):
            return None
        if not typed:
            return text
        if _BOOL.match(text):
            return text.lower() == "true"
        if _INT.match(text) and len(text) < 20:
            return int(text)
        if _FLOAT.match(text) and math.isfinite(float(text)):
            return float(text)
        return text

    def _error(self, node: yaml.Node, problem: str) -> InputError:
        line = node.start_mark.line + 1
        return InputError(f"{self.path}: malformed YAML: line {line}: {problem}")
