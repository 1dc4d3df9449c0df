"""Nested frozen dataclasses from plain mappings, and back: types, unknown names, overrides.

Knows nothing of the job; `config.py` holds the fields and what values they may have. What is wrong
is said in one line that names the field by its path.
"""

import ast
import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line meant for the user."""


def require(condition: bool, field: str, value: Any, allowed: str) -> None:
    """Raises ConfigError unless `condition`; `allowed` goes on after `must be`."""
    if not condition:
        raise ConfigError(f"{field}={value!r}: must be {allowed}")


def check_known(path: str, name: str, known: Sequence[str] | Mapping[str, Any]) -> None:
    """Raises ConfigError, with the closest known name, unless `name` is known."""
    if name in known:
        return
    close = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"
    raise ConfigError(f"{path}: unknown name{hint}")


def _plain(value: Any) -> Any:
    """ConfigDict, FrozenConfigDict and other mappings as dicts."""
    return dict(value.items()) if hasattr(value, "items") else value


def _convert(kind: Any, value: Any, path: str) -> Any:
    """`value` as the annotated type `kind`, or a ConfigError that names `path`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, path)
    if dataclasses.is_dataclass(kind):
        return build(kind, value, path)
    value = _plain(value)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {str(k): _convert(arguments[1], v, f"{path}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        require(math.isfinite(value), path, value, "a finite number")
        return float(value)
    if kind in (int, bool, str) and type(value) is kind:
        return value
    name = (
        getattr(kind, "__name__", None)
        if origin is None
        else {tuple: "list", Mapping: "mapping"}.get(origin)
    )
    raise ConfigError(f"{path}={value!r}: must be of type {name}, not {type(value).__name__}")


def build(kind: type, value: Any, path: str = "") -> Any:
    """The dataclass `kind` from a mapping (a ConfigDict, a parsed JSON object), checked.

    Raises:
      ConfigError: an unknown or missing name, a wrong type, or what the dataclass itself refuses.
    """
    if dataclasses.is_dataclass(value):
        return value
    value = _plain(value)
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path}={value!r}: must be a section with fields, not {type(value).__name__}"
        )
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    prefix = f"{path}." if path else ""
    for name in value:
        check_known(f"{prefix}{name}", name, fields)
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in value:
            raise ConfigError(f"{prefix}{name}: missing; it has no default")
    return kind(
        **{name: _convert(hints[name], item, f"{prefix}{name}") for name, item in value.items()}
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      ConfigError: not UTF-8, not JSON, or not an object.
      OSError: the file cannot be read.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds one {type(value).__name__}, not a JSON object")
    return value


def to_mapping(config: Any) -> dict[str, Any]:
    """Nested dict of plain values, every default written out; `build` reads it back."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_mapping(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple):
        return [to_mapping(item) for item in config]
    return dict(config) if isinstance(config, Mapping) else config


def override(config: Any, assignments: Sequence[str]) -> Any:
    """`config` with `path=value` assignments applied, e.g. `model.num_layers=4`; values are Python
    literals or text.

    Raises:
      ConfigError: an unknown path, or a value that doesn't fit.
    """
    mapping = to_mapping(config)
    for assignment in assignments:
        path, _, text = assignment.partition("=")
        node, kind = mapping, type(config)
        *parents, leaf = path.split(".")
        for depth, name in enumerate(parents):
            check_known(path, name, node)
            kind = typing.get_type_hints(kind)[name] if dataclasses.is_dataclass(kind) else None
            if not isinstance(node[name], dict):
                section = ".".join(parents[: depth + 1])
                raise ConfigError(
                    f"{path}: {section} is {node[name]!r} and has no fields; set it as a whole"
                )
            node = node[name]
        if dataclasses.is_dataclass(kind):
            check_known(path, leaf, node)
            node[leaf] = _parse(text, typing.get_type_hints(kind)[leaf])
        else:
            node[leaf] = _parse(text, None)
    return build(type(config), mapping)


def _parse(text: str, kind: Any) -> Any:
    """A command line's text as a value: left as it is for strings, a literal otherwise."""
    if kind is str:
        return text
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        return text


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """`path: old -> new` of every leaf in which two `to_mapping` results differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            line
            for key in keys
            for line in differences(
                old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key
            )
        ]
    return [] if old == new else [f"{prefix}: {old!r} -> {new!r}"]
