"""Experiment files: what two readers of YAML could understand differently is a mistake, not a guess.

PyYAML reads YAML 1.1: of a key that stands twice the last wins in silence, ``1:30`` is ninety and ``010`` is eight.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from evolve_dag.errors import ConfigError
from evolve_dag.store.disk import read_bytes

MOST_BYTES = 1_000_000
DEEPEST = 32
"""Levels of mappings and lists; an experiment file has four."""
MOST_VALUES = 10_000
"""Values after aliases are written out: a few anchors can stand for billions."""

_NUMBER = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"
_BREAKS = re.compile(r"[\x85\u2028\u2029]")
_WHOLE = re.compile(r"[-+]?(?:0|[1-9][0-9]*)$")
_REAL = re.compile(
    r"[-+]?(?:(?:0|[1-9][0-9]*)?\.[0-9]+|(?:0|[1-9][0-9]*)\.?)(?:[eE][-+]?[0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)


class _Loader(yaml.SafeLoader):
    """Numbers as JSON writes them (``.5``, ``5.``, ``.inf`` too), and no dates; the rest is text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in _NUMBER]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _WHOLE, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _REAL, list("-+.0123456789"))


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader above would not read as text."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Between other quotes PyYAML makes spaces of these line breaks."""
        style = '"' if _BREAKS.search(data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


def to_yaml(values: Mapping[str, Any]) -> str:
    """JSON values as a file of which :func:`read_mapping` makes the same values."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_mapping(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The mapping of a file, and the mistakes of single keys (``<key>: <what>``, with lines); those keys are left out.

    Raises:
        ConfigError: there is no such file, it cannot be read, or it is no mapping at all.
    """
    try:
        text = read_bytes(path, most=MOST_BYTES).decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file", "check the path given, or the extends: of the file that names it") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", "name a file of text that you may read") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read: not UTF-8 (byte {error.start + 1})", "save it as UTF-8") from None
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}", "check indentation and colons at the place above") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested more than {DEEPEST} deep", "an experiment file has four levels") from None
    start = "start with e.g. `extends: pocket.yaml`"
    if node is None:
        raise ConfigError(f"{path}: an empty file", start)
    reading = _Reading()
    content = reading.value(node, "", ())
    if isinstance(content, dict):
        return content, reading.mistakes
    if reading.mistakes:
        raise ConfigError(f"{path}: {reading.mistakes[0]}", start)
    raise ConfigError(f"{path}: holds a {type(content).__name__}, not a mapping of keys", start)


class _Nothing:
    """In place of a value that is a mistake."""


class _Reading:
    """From YAML's nodes to plain values."""

    def __init__(self) -> None:
        self.mistakes: list[str] = []
        self._values = 0

    def value(self, node: yaml.Node, key: str, above: tuple[yaml.Node, ...]) -> Any:
        """The value of ``node``, which stands under the dotted ``key`` and inside the nodes ``above``."""
        self._values += 1
        if node in above:
            return self._wrong(node, key, "holds itself: an alias (*) inside what it names")
        if len(above) >= DEEPEST:
            return self._wrong(node, key, f"nested more than {DEEPEST} deep")
        if self._values > MOST_VALUES:
            if self._values == MOST_VALUES + 1:
                self._wrong(node, key, f"more than {MOST_VALUES} values, counting what aliases (*) stand for")
            return _Nothing
        inside = (*above, node)
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self._mapping(node, key, inside)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            values = [self.value(inner, f"{key}.{n}" if key else str(n), inside) for n, inner in enumerate(node.value)]
            return [value for value in values if value is not _Nothing]
        return self._scalar(node, key)

    def _mapping(self, node: yaml.MappingNode, key: str, inside: tuple[yaml.Node, ...]) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for name_node, inner in node.value:
            name = name_node.value
            if name_node.tag == "tag:yaml.org,2002:merge":
                for base in self._bases(inner, key, inside):
                    merged = {**base, **merged}
                continue
            if not isinstance(name, str) or name_node.tag != "tag:yaml.org,2002:str":
                self._wrong(name_node, key, "a key must be text" + (f", not {name}" if isinstance(name, str) else ""))
                continue
            dotted = f"{key}.{name}" if key else name
            if name in lines:
                self._wrong(name_node, dotted, f"stands twice: on line {lines[name]} too")
                continue
            lines[name] = _line(name_node)
            value = self.value(inner, dotted, inside)
            if value is not _Nothing:
                own[name] = value
        return {**merged, **own}

    def _bases(self, node: yaml.Node, key: str, inside: tuple[yaml.Node, ...]) -> Iterator[dict[str, Any]]:
        """What ``<<`` brings in, the strongest first."""
        for one in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            value = self.value(one, f"{key}.<<" if key else "<<", inside)
            if isinstance(value, dict):
                yield value
            elif value is not _Nothing:
                self._wrong(node, key, "<< takes a mapping")

    def _scalar(self, node: yaml.Node, key: str) -> Any:
        text, kind = node.value, node.tag.removeprefix("tag:yaml.org,2002:")
        try:
            if kind == "str" and isinstance(text, str):
                return text
            if kind == "null":
                return None
            if kind == "bool":
                return yaml.SafeLoader.bool_values[text.lower()]
            if kind == "int" and _WHOLE.match(text):
                return int(text)
            if kind == "float" and _REAL.match(text):
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except (KeyError, ValueError):  # Python converts 4,300 digits at most
            return self._wrong(node, key, f"a number of {len(text)} digits" if kind == "int" else f"not a {kind}")
        return self._wrong(node, key, f"{node.tag} is not read here" if kind not in ("int", "float") else f"not a {kind}")

    def _wrong(self, node: yaml.Node, key: str, what: str) -> type[_Nothing]:
        self.mistakes.append(f"{key or 'file'}: line {_line(node)}: {what}")
        return _Nothing


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
