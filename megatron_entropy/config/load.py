"""Configuration: a TOML file, dotted command-line overrides, defaults that are the vetted setting.

`load(path, overrides, method_configs)` reads a file into one `Config` per stage. A file describes one training run;
a `[[stages]]` list makes it several in a row, each stage being the file's top level with the stage's own keys laid
over it, and each starting from the model the one before it exported. Overrides (`--actor.parallel.tp=2`) apply to
every stage, `--stages.NAME.KEY=VALUE` to one.

Unknown keys are errors that name the nearest known key; `check` compares the fields with one another and with the
model's shape before anything starts. Importing this module imports neither torch nor any engine.
"""

from __future__ import annotations

import difflib
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import (
    BaseModel,
    ValidationError,
)

from megatron_entropy.config.schema import Config, MethodConfig
from megatron_entropy.errors import ConfigError


def load(path: str | Path, overrides: Sequence[str], method_configs: Mapping[str, type[MethodConfig]]) -> list[Config]:
    """Read `path` into the configurations of its stages.

    Args:
        path: a TOML file.
        overrides: `--key.path=value` arguments, values in TOML syntax (bare words are strings).
        method_configs: configuration class of each method, by name.
    Raises:
        ConfigError: naming the key to change, for a missing file, an unknown key, a wrong type or value.
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
    for_all, for_one = _parse_overrides(overrides)
    names = [stage.get("name", "train") for stage in stages]
    if len(set(names)) < len(names):
        raise ConfigError(f"{path}: stages need different names, found {', '.join(names)}")
    if unknown := sorted(set(for_one) - set(names)):
        raise ConfigError(f"stages.{unknown[0]}: no such stage{_nearest(unknown[0], names)}")
    configs = []
    for name, stage in zip(names, stages, strict=True):
        merged: dict[str, Any] = {}
        for layer in (tree, stage, for_all, for_one.get(name, {})):
            merged = _merge(merged, layer)
        configs.append(_build(merged, method_configs))
    return configs


def to_toml(configs: Sequence[Config]) -> str:
    """The resolved configuration as text that `load` reads back from a file."""
    return tomli_w.dumps({"stages": [config.model_dump(mode="json") for config in configs]})


def write(configs: Sequence[Config], path: Path) -> None:
    """Save the resolved configuration as a file that `load` reads back."""
    path.write_text(to_toml(configs))


def _build(tree: dict[str, Any], method_configs: Mapping[str, type[MethodConfig]]) -> Config:
    method = tree.get("method")
    if not isinstance(method, dict) or not isinstance(method.get("name"), str):
        raise ConfigError(f"method.name is missing; choose one of {', '.join(sorted(method_configs))}")
    name = method["name"]
    if name not in method_configs:
        raise ConfigError(f"method.name={name!r} is unknown{_nearest(name, method_configs)}")
    method_class = method_configs[name]
    _reject_unknown_keys({k: v for k, v in tree.items() if k != "method"}, Config, "")
    _reject_unknown_keys(method, method_class, "method.")
    try:
        return Config.model_validate({**tree, "method": method_class.model_validate(method)})
    except ValidationError as error:
        first = error.errors()[0]
        prefix = "method." if error.title == method_class.__name__ else ""
        key = prefix + ".".join(str(part) for part in first["loc"])
        given = "" if first["type"] == "missing" else f" (got {first['input']!r})"
        said = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{key}: {said[0].lower()}{said[1:]}{given}") from None


def _reject_unknown_keys(tree: Mapping[str, Any], section: type[BaseModel], prefix: str) -> None:
    for key, value in tree.items():
        if key not in section.model_fields:
            raise ConfigError(f"{prefix}{key}: unknown key{_nearest(key, section.model_fields, prefix)}")
        inner = section.model_fields[key].annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel) and isinstance(value, dict):
            _reject_unknown_keys(value, inner, f"{prefix}{key}.")


def _parse_overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    for_all: dict[str, Any] = {}
    for_one: dict[str, dict[str, Any]] = {}
    for text in overrides:
        key, equals, value = text.removeprefix("--").partition("=")
        if not text.startswith("--") or not equals or not key:
            raise ConfigError(f"{text}: an override is written --key.path=value")
        parts = key.split(".")
        tree = for_all
        if parts[0] == "stages" and len(parts) > 2:
            tree, parts = for_one.setdefault(parts[1], {}), parts[2:]
        for part in parts[:-1]:
            tree = tree.setdefault(part, {})
            if not isinstance(tree, dict):
                raise ConfigError(f"{text}: {part} was given a value of its own before")
        tree[parts[-1]] = _parse_value(value)
    return for_all, for_one


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            changes_method = key == "method" and value.get("name", merged[key].get("name")) != merged[key].get("name")
            merged[key] = dict(value) if changes_method else _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _nearest(key: str, known: typing.Iterable[str], prefix: str = "") -> str:
    names = sorted(known)
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else f"; known are {', '.join(names)}"
