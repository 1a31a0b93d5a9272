"""Read a TOML file and command-line overrides into one `Config` per stage.

A file describes one training run. A `[[stages]]` list makes it several stages in a row: each is the file's top level
with the stage's own keys laid over it, and starts from the model that the previous one exported. An override
(`--actor.parallel.tp=2`) applies to every stage, `--stages.NAME.KEY=VALUE` to one. An unknown key is an error that
names the nearest known key.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from megatron_entropy.config.schema import Config, MethodConfig
from megatron_entropy.errors import ConfigError

LoadMethodConfig = Callable[[str], type[MethodConfig]]
"""From a value of `method.name` to the class of the method's settings; raises ConfigError for an unknown name."""

NAME_CUTOFF = 0.55
"""Similarity (difflib, 0 to 1) from which one key is taken for a misspelling of another."""


def load(path: str | Path, overrides: Sequence[str], load_method_config: LoadMethodConfig) -> list[Config]:
    """Read `path` into the configurations of its stages.

    Args:
        path: a TOML file.
        overrides: `--key.path=value` arguments, values in TOML syntax (bare words are strings).
        load_method_config: returns the settings class of a method by its name.
    Raises:
        ConfigError: a missing file, an unknown key, a wrong type or value; the message names the key to change.
    """
    try:
        tree = tomllib.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    stages = tree.pop("stages", [{}])
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ConfigError(f"{path}: stages must be written as [[stages]] tables")
    for_all, by_stage = _parse_overrides(overrides)
    names = [stage.get("name", "train") for stage in stages]
    if len(set(names)) < len(names):
        raise ConfigError(f"{path}: stages need different names, found {', '.join(names)}")
    if unknown := sorted(set(by_stage) - set(names)):
        raise ConfigError(f"stages.{unknown[0]}: no such stage{suggest(unknown[0], names)}")
    configs = []
    for name, stage in zip(names, stages, strict=True):
        merged: dict[str, Any] = {}
        for layer in (tree, stage, for_all, by_stage.get(name, {})):
            merged = _merge(merged, layer)
        configs.append(_build(merged, load_method_config))
    return configs


def to_toml(configs: Sequence[Config]) -> str:
    """Write the resolved configuration as TOML that `load` reads back from a file."""
    return tomli_w.dumps({"stages": [config.model_dump(mode="json") for config in configs]})


def write(configs: Sequence[Config], path: Path) -> None:
    """Save the resolved configuration as a file that `load` reads back."""
    path.write_text(to_toml(configs))


def _build(tree: dict[str, Any], load_method_config: LoadMethodConfig) -> Config:
    method = tree.get("method")
    if not isinstance(method, dict) or not isinstance(method.get("name"), str):
        raise ConfigError(
            'method.name is missing; set it to a method such as "grpo" (see megatron-entropy config method)'
        )
    method_class = load_method_config(method["name"])
    _reject_unknown_keys({key: value for key, value in tree.items() if key != "method"}, Config, "")
    _reject_unknown_keys(method, method_class, "method.")
    try:
        return Config.model_validate({**tree, "method": method_class.model_validate(method)})
    except ValidationError as error:
        first = error.errors()[0]
        prefix = "method." if error.title == method_class.__name__ else ""
        key = prefix + ".".join(str(part) for part in first["loc"])
        found = "" if first["type"] == "missing" else f" (got {first['input']!r})"
        reason = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{key}: {reason[0].lower()}{reason[1:]}{found}") from None


def _reject_unknown_keys(tree: Mapping[str, Any], section: type[BaseModel], prefix: str) -> None:
    for key, value in tree.items():
        if key not in section.model_fields:
            raise ConfigError(f"{prefix}{key}: unknown key{suggest_key(key, section, prefix)}")
        inner = section.model_fields[key].annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel) and isinstance(value, dict):
            _reject_unknown_keys(value, inner, f"{prefix}{key}.")


def _parse_overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    for_all: dict[str, Any] = {}
    by_stage: dict[str, dict[str, Any]] = {}
    for text in overrides:
        key, equals, value = text.removeprefix("--").partition("=")
        if not text.startswith("--") or not equals or not key:
            raise ConfigError(f"{text}: an override is written --key.path=value")
        parts = key.split(".")
        tree = for_all
        if parts[0] == "stages" and len(parts) > 2:
            tree, parts = by_stage.setdefault(parts[1], {}), parts[2:]
        for part in parts[:-1]:
            tree = tree.setdefault(part, {})
            if not isinstance(tree, dict):
                raise ConfigError(f"{text}: {part} already has a value from an earlier override")
        tree[parts[-1]] = _parse_value(value)
    return for_all, by_stage


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _merge(base: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            changes_method = key == "method" and value.get("name", merged[key].get("name")) != merged[key].get("name")
            merged[key] = dict(value) if changes_method else _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def suggest(name: str, known: Iterable[str], *, prefix: str = "", cutoff: float = 0.5) -> str:
    """End an error message about an unknown name: with the nearest known name, or with all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return f"; did you mean {prefix}{close[0]}?" if close else f"; known are {', '.join(names)}"


def suggest_key(key: str, section: type[BaseModel], prefix: str) -> str:
    """End an error message about an unknown key of `section`.

    Suggests the key with the nearest name, else the one key with a word of the unknown key in its description.
    """
    fields = section.model_fields
    if not difflib.get_close_matches(key, fields, n=1, cutoff=NAME_CUTOFF):
        words = {word for word in key.split("_") if len(word) > 3}
        mentions = [
            name for name, field in fields.items() if words & set(re.findall(r"\w+", description(field).lower()))
        ]
        if len(mentions) == 1:
            return f"; did you mean {prefix}{mentions[0]}?"
    return suggest(key, fields, prefix=prefix, cutoff=NAME_CUTOFF)


def description(field: FieldInfo) -> str:
    """What a key means: its attribute docstring, or the class docstring of a table; a single line."""
    kind = field.annotation
    is_table = isinstance(kind, type) and issubclass(kind, BaseModel)
    return " ".join((field.description or (kind.__doc__ if is_table else "") or "").split())
