"""YAML text as plain values with their lines, and reports of the mistakes in it.

`spec.cortex_yaml` and, for an operator's configuration file, `operator.config.sources` use it.

The text is only composed into nodes, never constructed into objects. Therefore no tag runs any
code, every value has a line, and duplicate keys, dates and tags become mistakes like any other.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

MAX_BYTES = 1 << 20
MAX_DEPTH = 100
MAX_VALUES = 20_000
# The size of the text after its aliases are expanded, in characters. Each value also counts
# `_VALUE_COST` characters for its memory.
MAX_EXPANDED = 8 << 20
_VALUE_COST = 64
_MAX_SHOWN = 60

_TAG = "tag:yaml.org,2002:"
_TRUE = {"true", "yes", "on", "y"}
_NOT_JSON_TAGS = {"timestamp": "a date", "binary": "binary data", "set": "a set", "omap": "an omap"}


@dataclass(frozen=True)
class NotJson:
    """A value of YAML that JSON does not have: its description, and its text in the file."""

    what: str
    text: str = ""


@dataclass(frozen=True)
class Value:
    """A value and its line; in an object the line of its key."""

    data: bool | int | float | str | NotJson | list[Value] | dict[str, Value] | None
    line: int

    def shown(self) -> str:
        """The value for a message."""
        if isinstance(self.data, NotJson):
            text = self.data.text
            return f"{self.data.what} ({shortened(text)})" if text else self.data.what
        if isinstance(self.data, str):
            return quoted(self.data)
        if isinstance(self.data, int | float) and not isinstance(self.data, bool):
            return shortened(str(self.data))
        return self.kind()

    def kind(self) -> str:
        """The kind of the value, without its content, which may be a secret."""
        if isinstance(self.data, NotJson):
            return self.data.what
        if isinstance(self.data, list):
            return "a list" if self.data else "an empty list"
        if isinstance(self.data, dict):
            return "an object"
        words = {None: "nothing", True: "true", False: "false"}
        if self.data is None or isinstance(self.data, bool):
            return words[self.data]
        return "a string" if isinstance(self.data, str) else "a number"


@dataclass(frozen=True)
class Mistake:
    """One mistake in the file."""

    line: int
    text: str


class Report:
    """Collects the mistakes in a file, each with its line."""

    def __init__(self, mistakes: Iterable[Mistake] = ()) -> None:
        self.mistakes = list(mistakes)

    def add(self, line: int, where: str, text: str) -> None:
        """Add a mistake in the field `where`; an empty name is the whole file."""
        self.mistakes.append(Mistake(line, f"{where}: {text}" if where else text))

    def add_wrong_value(self, value: Value, where: str, allowed: str, hint: str = "") -> None:
        """Add a mistake: a value that is not allowed. The message shows the value."""
        self.add(value.line, where, f"found {value.shown()}; allowed: {allowed}{hint}")


def in_file(file: str, mistakes: Iterable[Mistake]) -> list[str]:
    """The mistakes as messages with the file and the line, in the order of the lines."""
    ordered = sorted(mistakes, key=lambda mistake: mistake.line)
    return list(dict.fromkeys(f"{file}:{mistake.line}: {mistake.text}" for mistake in ordered))


def quoted(text: str) -> str:
    """A string in double quotes, after `shortened`."""
    return f'"{shortened(text)}"'


def shortened(text: str) -> str:
    """At most 60 characters of a text, all printable."""
    start = text[: _MAX_SHOWN + 1]
    if not start.isprintable():
        start = start.encode("unicode_escape").decode("ascii")
    return start if len(start) <= _MAX_SHOWN else start[: _MAX_SHOWN - 1] + "…"


def shown_name(key: str) -> str:
    """A key for a message, without a value that may be a secret.

    YAML reads `NAME:value` and `NAME=value` as a key.
    """
    name = re.split("[:=]", key, maxsplit=1)[0]
    return shortened(key) if name == key else f"{shortened(name)}…"


def did_you_mean(found: str, candidates: Iterable[str]) -> str:
    """`; did you mean "definition"?`, or an empty text if no candidate is similar."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    near = difflib.get_close_matches(found[:200].lower(), by_lower, n=1)
    return f"; did you mean {quoted(by_lower[near[0]])}?" if near else ""


def join(where: str, key: str) -> str:
    """The dotted name of a field inside another."""
    return f"{where}.{key}" if where else key


def read_nodes(text: str) -> tuple[Value | None, list[Mistake]]:
    """The document as values, or None without one; and the mistakes at the level of YAML."""
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        return None, [Mistake(1, "the file is larger than 1 MiB")]
    root = _compose(text)
    if root is None or isinstance(root, Mistake):
        return None, [root] if root is not None else []
    builder = _Builder()
    try:
        return builder.value(root, root.start_mark.line + 1, "", 0), builder.mistakes
    except _TooLarge as error:
        return None, [*builder.mistakes, error.mistake]


def _compose(text: str) -> Node | Mistake | None:
    try:
        excess = _excess(text)
        if excess is not None:
            return Mistake(1, excess)
        yaml = YAML(typ="safe", pure=True)
        # YAML 1.2 allows them, and a warning would put a user's text into the log.
        yaml.composer.warn_double_anchors = False
        root: Node | None = yaml.compose(text)
    except YAMLError as error:
        return _syntax(error, text)
    except RecursionError:
        return Mistake(1, _TOO_DEEP)
    except Exception as error:  # ruamel does not catch the errors of chr, int and the like
        return Mistake(1, f"cannot be read as YAML: {_one_line(str(error))}")
    return root


def _excess(text: str) -> str | None:
    """The limit that a text exceeds, or None.

    Composing is slow, and its time grows with the square of the depth of nested brackets. This scan
    stops at the limits.
    """
    depth = 0
    for count, event in enumerate(YAML(typ="safe", pure=True).parse(text)):
        if isinstance(event, CollectionStartEvent):
            depth += 1
        elif isinstance(event, CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            return _TOO_DEEP
        if count > MAX_VALUES:
            return f"more than {MAX_VALUES:,} values"
    return None


_TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep, or an alias contains itself"


class _TooLarge(Exception):
    def __init__(self, mistake: Mistake) -> None:
        super().__init__(mistake.text)
        self.mistake = mistake


class _Builder:
    """Turns nodes into values; raises `_TooLarge` if aliases expand beyond `MAX_EXPANDED`."""

    def __init__(self) -> None:
        self.mistakes: list[Mistake] = []
        self._budget = MAX_EXPANDED

    def value(self, node: Node, line: int, where: str, depth: int) -> Value:
        self._budget -= _VALUE_COST + (len(node.value) if isinstance(node, ScalarNode) else 0)
        if self._budget < 0:
            raise _TooLarge(Mistake(line, "too large once its aliases are expanded"))
        if depth > MAX_DEPTH:
            raise _TooLarge(Mistake(line, _TOO_DEEP))
        tag = str(node.tag).removeprefix(_TAG)
        if isinstance(node, ScalarNode):
            return Value(_scalar(tag, node.value), line)
        if isinstance(node, SequenceNode) and tag == "seq":
            return Value(
                [
                    self.value(
                        n, n.start_mark.line + 1, f"{where}[{i}]" if where else "", depth + 1
                    )
                    for i, n in enumerate(node.value)
                ],
                line,
            )
        if isinstance(node, MappingNode) and tag == "map":
            return Value(self._mapping(node, where, depth), line)
        return Value(_not_json(tag, ""), line)

    def _mapping(self, node: MappingNode, where: str, depth: int) -> dict[str, Value]:
        found: dict[str, Value] = {}
        merged: dict[str, Value] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if str(key_node.tag) == f"{_TAG}merge":
                merged = {**self._merged(value_node, line, where, depth), **merged}
                continue
            is_scalar = isinstance(key_node, ScalarNode)
            key = _scalar(str(key_node.tag).removeprefix(_TAG), key_node.value) if is_scalar else ()
            if not isinstance(key, str):
                shown = shortened(key_node.value) if is_scalar else "a list or an object"
                self._mistake(line, where, f"the key {shown} is not a string; put it in quotes")
                continue
            name = join(where, shortened(key))
            if key in found:
                self._mistake(line, name, f"given twice, first on line {found[key].line}")
                continue
            found[key] = self.value(value_node, line, name, depth + 1)
        return {**merged, **found}

    def _merged(self, node: Node, line: int, where: str, depth: int) -> dict[str, Value]:
        nodes: Iterable[Node] = node.value if isinstance(node, SequenceNode) else [node]
        merged: dict[str, Value] = {}
        for one in nodes:
            value = self.value(one, line, where, depth + 1)
            if isinstance(value.data, dict):
                merged = {**value.data, **merged}
            else:
                self._mistake(line, join(where, "<<"), f"found {value.kind()}; allowed: an object")
        return merged

    def _mistake(self, line: int, where: str, text: str) -> None:
        self.mistakes.append(Mistake(line, f"{where}: {text}" if where else text))


def _scalar(tag: str, text: str) -> _Scalar:
    convert = _SCALARS.get(tag)
    try:
        return convert(text) if convert else _not_json(tag, text)
    except ValueError:
        return NotJson("an invalid number", text)


def _unicode(text: str) -> str | NotJson:
    try:
        # A pair of escaped surrogates, as in JSON, is one character.
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        return NotJson("text with half a character (a lone surrogate)")


def _integer(text: str) -> int:
    text = text.replace("_", "")
    digits = text.lstrip("+-").lower()
    base = {"0x": 16, "0o": 8, "0b": 2}.get(digits[:2], 10)
    value = int(digits, base)
    str(value)  # beyond the interpreter's limit of digits, it cannot be encoded as JSON either
    return -value if text.startswith("-") else value


def _float(text: str) -> float:
    text = text.replace("_", "").lower()
    if text.lstrip("+-") == ".inf":
        return -math.inf if text.startswith("-") else math.inf
    return math.nan if text == ".nan" else float(text)


def _not_json(tag: str, text: str) -> NotJson:
    if tag not in _NOT_JSON_TAGS:
        return NotJson("a tag", tag)
    return NotJson(_NOT_JSON_TAGS[tag], "" if tag == "binary" else text)


def _syntax(error: YAMLError, text: str) -> Mistake:
    if isinstance(error, ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return Mistake(line, f"cannot be read as YAML: {error.reason}")
    if not isinstance(error, MarkedYAMLError):
        return Mistake(1, f"cannot be read as YAML: {_one_line(str(error))}")
    mark = error.problem_mark or error.context_mark
    words = [w for w in (error.context, error.problem) if isinstance(w, str)]
    for start, instead in _QUOTE_HINTS.items():
        words = [instead if word.startswith(start) else word for word in words]
    line = mark.line + 1 if mark is not None else 1
    return Mistake(line, f"cannot be read as YAML: {_one_line(', '.join(words))}")


# The user meant a text, which may be a secret: the message does not show it.
_QUOTE_HINTS = {
    "found undefined alias": "found undefined alias; put a value that begins with * in quotes",
    "found undefined tag handle": (
        "found undefined tag handle; put a value that begins with ! in quotes"
    ),
}


def _one_line(text: str) -> str:
    return " ".join(text.split())


_Scalar = bool | int | float | str | NotJson | None
_SCALARS: dict[str, Callable[[str], _Scalar]] = {
    "null": lambda _: None,
    "str": _unicode,
    "value": _unicode,
    "merge": _unicode,
    "bool": lambda text: text.lower() in _TRUE,
    "int": _integer,
    "float": _float,
}
