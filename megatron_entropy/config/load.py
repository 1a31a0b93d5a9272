"""Read TOML files and command-line overrides into one `Config` per stage.

A file describes one training run. A `[[stages]]` list makes it several stages in a row: each is the file's top level
with the stage's own keys laid over it, and starts from the model that the previous one exported. Several files are
merged: the keys of a later one win, also those of a stage with the same name. An override
(`--actor.parallel.tp=2`) applies to every stage, `--stages.NAME.KEY=VALUE` to one. An unknown key is an error that
names the nearest known key.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from megatron_entropy import procedural
from megatron_entropy.config.schema import Config, MethodConfig
from megatron_entropy.errors import ConfigError

LoadMethodConfig = Callable[[str], type[MethodConfig]]
"""From a value of `method.name` to the class of the method's settings; raises ConfigError for an unknown name."""

MAX_FILE_BYTES = 2**24
"""Largest configuration file that is read."""

NAME_CUTOFF = 0.55
"""Similarity (difflib, 0 to 1) from which one key is taken for a misspelling of another."""


def load(
    paths: str | Path | Sequence[str | Path], overrides: Sequence[str], load_method_config: LoadMethodConfig
) -> list[Config]:
    """Read configuration files into the configurations of their stages.

    Args:
        paths: a TOML file, or several, the later over the earlier.
        overrides: `--key.path=value` arguments, values in TOML syntax (bare words are strings).
        load_method_config: returns the settings class of a method by its name.
    Raises:
        ConfigError: a missing file, an unknown key, a wrong type or value; the message names the key to change.
    """
    try:
        return _load([paths] if isinstance(paths, str | Path) else paths, overrides, load_method_config)
    except RecursionError:
        raise ConfigError(f"{paths}: nested too deeply; a key has at most three dots") from None


def _load(paths: Sequence[str | Path], overrides: Sequence[str], load_method_config: LoadMethodConfig) -> list[Config]:
    top: dict[str, Any] = {}
    stages: dict[str, dict[str, Any]] = {}
    for path in paths:
        tree = read_toml(path, usage="the arguments of train are TOML files, then --key.path=value")
        own = tree.pop("stages", [])
        if not isinstance(own, list) or not all(isinstance(stage, dict) for stage in own):
            raise ConfigError(f"{path}: stages must be written as [[stages]] tables")
        top = _merge(top, tree)
        names = [str(stage.get("name", top.get("name", "train"))) for stage in own]
        if len(set(names)) < len(names):
            raise ConfigError(f"{path}: stages need different names, found {', '.join(names)[:200]}")
        for name, stage in zip(names, own, strict=True):
            stages[name] = _merge(stages.get(name, {}), stage)
    for_all, by_stage = _parse_overrides(overrides)
    stages = stages or {str(top.get("name", "train")): {}}
    if unknown := sorted(set(by_stage) - set(stages)):
        raise ConfigError(f"stages.{unknown[0]}: no such stage{suggest(unknown[0], stages)}")
    configs = []
    for name, stage in stages.items():
        merged: dict[str, Any] = {}
        for layer in (top, stage, for_all, by_stage.get(name, {})):
            merged = _merge(merged, layer)
        configs.append(_build(merged, load_method_config))
    built = [config.name for config in configs]
    if len(set(built)) < len(built):
        raise ConfigError(f"stages need different names, found {', '.join(built)}; rename with --stages.NAME.name=...")
    return configs


def read_toml(path: str | Path, *, usage: str) -> dict[str, Any]:
    """Read the content of a TOML file.

    Args:
        path: the file.
        usage: how the file is named, for the message about a missing one.
    Raises:
        ConfigError: not a readable TOML file of at most `MAX_FILE_BYTES`.
    """
    if not os.path.isfile(path):
        found = "not a regular file" if os.path.exists(path) else "no such file"
        raise ConfigError(f"{path}: {found}; {usage}")
    if (size := os.path.getsize(path)) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: {size} bytes are too many for a configuration; at most {MAX_FILE_BYTES}")
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: it is not UTF-8 text: {error.reason}") from None
    except ValueError as error:  # TOMLDecodeError, a number of 5,000 digits
        raise ConfigError(f"{path}: not valid TOML: {' '.join(str(error).split())}") from None


def to_toml(configs: Sequence[Config]) -> str:
    """Write the resolved configuration as TOML that `load` reads back from a file."""
    return tomli_w.dumps({"stages": [config.model_dump(mode="json") for config in configs]})


def write(configs: Sequence[Config], path: Path) -> None:
    """Save the resolved configuration as a file that `load` reads back."""
    path.write_text(to_toml(configs))


def _build(tree: dict[str, Any], load_method_config: LoadMethodConfig) -> Config:
    method = tree.get("method", {})
    if not isinstance(method, dict):
        raise ConfigError(f"method is a table, found {_show(method)}; write method.name = ... or --method.name=...")
    if "name" not in method:
        raise ConfigError(
            'method.name is missing; set it to a method such as "grpo" (see megatron-entropy config method)'
        )
    if not isinstance(method["name"], str):
        raise ConfigError(f'method.name must be a text such as "grpo", found {_show(method["name"])}')
    method_class = load_method_config(method["name"])
    reject_unknown_keys({key: value for key, value in tree.items() if key != "method"}, Config, "")
    reject_unknown_keys(method, method_class, "method.")
    try:
        config = Config.model_validate({**tree, "method": method_class.model_validate(method)})
    except ValidationError as error:
        raise ConfigError(describe_problem(error, "method." if error.title == method_class.__name__ else "")) from None
    return _complete_sources(config)


def _complete_sources(config: Config) -> Config:
    """Write the run's seed and the split into the sources of `data.train` and `data.eval`."""
    completed = {}
    for split in ("train", "eval"):
        try:
            items = getattr(config.data, split)
            completed[split] = [procedural.complete(item, seed=config.seed, split=split) for item in items]
        except ConfigError as error:
            raise ConfigError(f"data.{split}: {error}") from None
    return config.model_copy(update={"data": config.data.model_copy(update=completed)})


def describe_problem(error: ValidationError, prefix: str) -> str:
    """Say in one line what the first problem is that pydantic found, and under which key."""
    first = error.errors()[0]
    key = prefix + ".".join(str(part) for part in first["loc"])
    found = "" if first["type"] == "missing" else f" (got {_show(first['input'])})"
    reason = first["msg"].removeprefix("Value error, ")
    hint = _HINTS.get(first["type"], "").format(key=key)
    return f"{key}: {reason[0].lower()}{reason[1:]}{found}{hint}"


_HINTS = {
    "list_type": '; write {key} = ["a", "b"], or --{key}=a,b',
    "model_type": "; it is a table: set its keys, see megatron-entropy config {key}",
}
"""Type of a pydantic error -> what to write."""


def _show(value: object) -> str:
    """A value for an error message, shortened."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of 5,000 digits, thousands of levels
        return "a value too large to print"
    return text if len(text) <= 120 else f"{text[:120]}..."


def reject_unknown_keys(tree: Mapping[str, Any], section: type[BaseModel], prefix: str) -> None:
    """Check that a table has only the keys of a section.

    Raises:
        ConfigError: an unknown key, at any depth; the message names the nearest known one.
    """
    for key, value in tree.items():
        if key not in section.model_fields:
            raise ConfigError(f"{prefix}{key}: unknown key{suggest_key(key, section, prefix)}")
        inner = section.model_fields[key].annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel) and isinstance(value, dict):
            reject_unknown_keys(value, inner, f"{prefix}{key}.")


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
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


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
