"""Describe every configuration key: type, default and meaning, as a console table, Markdown or a TOML template."""

from __future__ import annotations

import json
import textwrap
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_entropy.config.load import description, suggest
from megatron_entropy.config.schema import Config, MethodConfig
from megatron_entropy.config.types import MAX_COUNT
from megatron_entropy.errors import ConfigError

_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclass(frozen=True)
class Key:
    """One key of a table.

    `default`: in TOML syntax, None for a required key. `unused_with`: the default of another key that makes it
    ineffective.
    """

    name: str
    type: str
    default: str | None
    meaning: str
    unused_with: str = ""


@dataclass(frozen=True)
class Table:
    """One table of the file. `name`: dotted, empty for the top level. `title`: for a heading."""

    name: str
    title: str
    meaning: str
    keys: tuple[Key, ...]

    def path(self, key: Key) -> str:
        """Dotted name of a key, as overrides spell it."""
        return f"{self.name}.{key.name}" if self.name else key.name


def list_tables(method_configs: Mapping[str, type[MethodConfig]]) -> list[Table]:
    """List all tables: those of every run, then for each method a `method` table of the keys that it uses."""
    tables = list(_walk(Config, ""))
    for name, config in method_configs.items():
        table, unused = next(_walk(config, "method")), config.model_construct(name=name).unused_keys()
        never = {key for base in config.__mro__ for key in base.__dict__.get("unused", ())}
        keys = tuple(
            replace(key, default=json.dumps(name))
            if key.name == "name"
            else replace(key, unused_with=unused.get(key.name, ""))
            for key in table.keys
            if key.name not in never
        )
        tables.append(replace(table, title=f"method, name = {json.dumps(name)}", keys=keys))
    return tables


def select(tables: Sequence[Table], prefix: str) -> list[Table]:
    """Keep the keys at or below a dotted name; the empty prefix keeps all.

    Raises:
        ConfigError: no key has this prefix.
    """
    if not prefix:
        return list(tables)
    selected = []
    for table in tables:
        keys = tuple(key for key in table.keys if f"{table.path(key)}.".startswith(f"{prefix}."))
        if keys:
            selected.append(replace(table, keys=keys))
    if not selected:
        known = {table.path(key) for table in tables for key in table.keys} | {table.name for table in tables}
        known = {name for name in known if name.count(".") == prefix.count(".")}  # a key is misspelt, not misplaced
        raise ConfigError(f"{prefix}: no such key{suggest(prefix, known - {''})}")
    return selected


def to_markdown(tables: Iterable[Table]) -> str:
    """One section with a Markdown table for each table of the file."""
    lines = []
    for table in tables:
        lines += [f"## {table.title}", "", table.meaning, "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for key in table.keys:
            default = "required" if key.default is None else f"`{key.default}`"
            lines.append(f"| `{table.path(key)}` | {key.type} | {default} | {key.meaning} |")
        lines.append("")
    return "\n".join(lines)


def to_toml(tables: Iterable[Table]) -> str:
    """A configuration file with every default; required keys, and keys without effect, are commented out."""
    lines = []
    for table in tables:
        if table.name:
            lines += [
                "",
                *textwrap.wrap(table.meaning, 110, initial_indent="# ", subsequent_indent="# "),
                f"[{table.name}]",
            ]
        for key in table.keys:
            lines += textwrap.wrap(f"{key.type}. {key.meaning}", 110, initial_indent="# ", subsequent_indent="# ")
            if key.default is None:
                lines.append(f"# {key.name} =  (required)")
            elif key.unused_with:
                lines.append(f"# {key.name} = {key.default}  (no effect with {key.unused_with})")
            else:
                lines.append(f"{key.name} = {key.default}")
    return "\n".join(lines)


def _walk(section: type[BaseModel], name: str) -> Iterator[Table]:
    """The table of `section`, then those below it."""
    keys, inner = [], []
    for key, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if kind is not MethodConfig:
                inner.append((kind, f"{name}.{key}" if name else key))
            continue
        default = None if field.is_required() else json.dumps(field.default)
        keys.append(Key(key, _type_text(field), default, _meaning(section, key)))
    if keys:
        yield Table(name, name or "Top level", " ".join((section.__doc__ or "").split()), tuple(keys))
    for kind, path in inner:
        yield from _walk(kind, path)


def _meaning(section: type[BaseModel], key: str) -> str:
    """The docstring of a key; a class that only changes the default takes it from its base class."""
    for base in section.__mro__:
        if issubclass(base, BaseModel) and key in base.model_fields and (text := description(base.model_fields[key])):
            return text
    return ""


def _type_text(field: FieldInfo) -> str:
    text = _name_type(field.annotation)
    bounds = [
        (_BOUNDS[name], getattr(item, name))
        for item in field.metadata
        for name in _BOUNDS
        if getattr(item, name, MAX_COUNT) != MAX_COUNT
    ]
    return " ".join([text, " and ".join(f"{sign} {value}" for sign, value in bounds)]).strip()


def _name_type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " or ".join(json.dumps(value) for value in arguments)
    if origin is Annotated:
        return _name_type(arguments[0])
    if origin is tuple:
        return f"{len(arguments)} x {_name_type(arguments[0])}"
    if origin is list:
        return f"list of {_name_type(arguments[0])}"
    if origin is dict:
        return "table"
    if arguments:
        return " or ".join(_name_type(argument) for argument in arguments)
    return annotation.__name__
