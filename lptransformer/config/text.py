"""YAML and JSON text to plain data and back, with what is wrong in it said in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from lptransformer.errors import ConfigError, UserError


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, a date is text, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what _Loader reads: text that looks like a number gets quotes."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, flow_style=True)


_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:timestamp"]
    for first, pairs in _Loader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, what: str) -> Any:
    """The value of a YAML text. Raises ConfigError that starts with `what` (a file, or a key of the command line)."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        if "alias" in f"{getattr(error, 'context', '')} {problem}":
            problem += "; text that begins with * has to be in quotes"
        raise ConfigError(f"{what}{line}: not valid YAML: {problem}") from None


def dump_yaml(value: Any) -> str:
    """YAML that `parse_yaml` reads back as the same value; every list is on one line."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=10**6, allow_unicode=True)


def read_text(path: str | Path, what: str, error_type: type[UserError] = ConfigError) -> str:
    """A text file in UTF-8. Raises `error_type` with a message that starts with `what`."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise error_type(f"{what}: {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        if (inside := Path(path) / "config.yaml").is_file():
            message = f"{what}: {path} is a run folder, with its configuration in {inside}"
            raise error_type(message, change={str(path): str(inside)}) from None
        raise error_type(f"{what}: cannot read {path}: {error.strerror}") from None


def read_json(path: str | Path, what: str, error_type: type[UserError] = ConfigError) -> dict[str, Any]:
    """A JSON file that holds one mapping. Raises `error_type` with a message that starts with `what`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"{key} is given twice")
        return dict(pairs)

    try:
        value = json.loads(read_text(path, what, error_type), object_pairs_hook=unique)
    except ValueError as error:
        raise error_type(f"{what}: {path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise error_type(f"{what}: {path} must hold a mapping, not {value!r:.80}")
    return value
