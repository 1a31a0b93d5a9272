"""Procedural questions of the package reasoning-gym (https://github.com/open-thought/reasoning-gym).

A source is a text in `data.train` or `data.eval`: `reasoning-gym:chain_sum,basic_arithmetic?size=500&seed=3`. Its
questions are a function of that text alone, once `complete` has written seed and split into it. A ground truth names
the data set and the index of its question, from which `entry_of` makes the entry again that reasoning-gym's scorer
reads.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

from megatron_entropy.errors import ConfigError, DataError, MissingPackageError

PREFIX = "reasoning-gym:"
SPLITS = ("train", "eval", "all")
DEFAULT_SIZE = 500
MAX_SIZE = 10**6
EVAL_SHARE = 64  # of 256 values of a hash's first byte
CANDIDATES = 10
"""Questions made for each one that a source asks for, at most."""
INSTRUCTION = "\n\nGive the final answer between <answer> and </answer>."
UNSTABLE = frozenset(
    "codeio intermediate_integration isomorphic_strings knight_swap list_functions polynomial_multiplication "
    "ransom_note word_ladder".split()
)
"""Data sets that differ between two processes with the same seed (measured with 0.1.25): no rank would agree."""


@dataclass(frozen=True)
class Source:
    """What a source's text says.

    `size`: questions of each data set. `seed`: reasoning-gym's, None before `complete`. `split`: questions fall into
    `train` or `eval` by a hash of their text, so no question is in both; `all` takes both. `instruction`: whether
    `INSTRUCTION` follows each question. `options`: settings of the data sets.
    """

    names: tuple[str, ...]
    size: int = DEFAULT_SIZE
    seed: int | None = None
    split: str | None = None
    instruction: bool = True
    options: tuple[tuple[str, Any], ...] = ()


def is_source(text: object) -> bool:
    """Whether an item of `data.train` or `data.eval` is a source of this module, not a file."""
    return str(text).startswith(PREFIX)


def parse(text: str) -> Source:
    """Read `reasoning-gym:NAME[,NAME...][?KEY=VALUE[&KEY=VALUE...]]`; values are JSON, or else texts.

    Raises:
        ConfigError: no name, a setting without value, or a wrong value of `size`, `seed`, `split` or `instruction`.
    """
    listed, _, query = text.removeprefix(PREFIX).partition("?")
    names = tuple(name.strip() for name in listed.split(",") if name.strip())
    settings = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if not equals or not key or key in settings:
            raise ConfigError(f"{text}: expected KEY=VALUE, each key once, found {part!r}")
        settings[key] = _value(value)
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            f"{text}: expected names of data sets, each once: {PREFIX}chain_sum,basic_arithmetic?size=500"
        )
    own = {key: settings.pop(key) for key in ("size", "seed", "split", "instruction") if key in settings}
    source = Source(names, **own, options=tuple(settings.items()))
    _check(text, source)
    return source


def complete(text: str, *, seed: int, split: str) -> str:
    """Write a seed and a split into a source that has none; the text of a file is returned as it is.

    Raises:
        ConfigError: see `parse`.
    """
    if not is_source(text):
        return text
    source = parse(text)
    missing = [f"seed={seed}"] * (source.seed is None) + [f"split={split}"] * (source.split is None)
    return "&".join([text if "?" in text else f"{text}?", *missing]).replace("?&", "?")


def questions(text: str) -> Iterator[tuple[str, str]]:
    """Make the questions of a source: (question, ground truth), the data sets taking turns.

    Questions are different from one another. The ground truth is what `entry_of` reads.

    Raises:
        ConfigError: see `parse`; an unknown data set or setting, or a value that the data set refuses.
        DataError: a data set has fewer different questions than `size`, or fails.
        MissingPackageError: reasoning-gym is not installed.
    """
    source = parse(text)
    if source.seed is None:
        raise ConfigError(f"{text}: add seed=NUMBER to the source; only a configuration has a seed of its own")
    for name in source.names:
        _check_name(text, name, source.options)
    turns = zip(*(_of_one(text, name, source) for name in source.names), strict=True)
    yield from itertools.chain.from_iterable(turns)


def entry_of(truth: str) -> tuple[Any, dict[str, Any]]:
    """Make the data set and the entry that a ground truth names.

    Raises:
        ValueError: not a ground truth of `questions`, or one of another version of reasoning-gym.
        MissingPackageError: reasoning-gym is not installed.
    """
    load_package()
    try:
        named = json.loads(truth)
        name, index, options = named["dataset"], named["index"], json.dumps(named["options"], sort_keys=True)
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"the ground truth {truth[:40]!r} is not one of reasoning-gym") from None
    data_set, entry = _entry(name, options, index)
    if entry["answer"] != named["answer"]:
        raise ValueError(f"reasoning-gym's {name} has another answer now; another version made the ground truth")
    return data_set, entry


def load_package() -> ModuleType:
    """Import reasoning-gym's table of data sets, which takes about a second.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of cellpylib, which it imports
            import reasoning_gym
            import reasoning_gym.factory
    except ImportError as error:
        raise MissingPackageError(
            f"reasoning-gym cannot be imported ({error}): pip install 'megatron-entropy[reasoning-gym]'"
        ) from error
    return reasoning_gym.factory


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _check(text: str, source: Source) -> None:
    for key, value, low in (("size", source.size, 1), ("seed", source.seed, 0)):
        if value is not None and (type(value) is not int or not low <= value <= (MAX_SIZE if low else 2**32)):
            raise ConfigError(f"{text}: {key} must be an integer of at least {low}, found {value!r}")
    if source.split not in (*SPLITS, None):
        raise ConfigError(f"{text}: split must be one of {', '.join(SPLITS)}, found {source.split!r}")
    if type(source.instruction) is not bool:
        raise ConfigError(f"{text}: instruction must be true or false, found {source.instruction!r}")


def _check_name(text: str, name: str, options: tuple[tuple[str, Any], ...]) -> None:
    data_sets = {key: value for key, value in load_package().DATASETS.items() if key != "composite"}
    if name not in data_sets:
        raise ConfigError(f"{text}: reasoning-gym has no data set {name!r}{_nearest(name, data_sets)}")
    if name in UNSTABLE:
        raise ConfigError(
            f"{text}: reasoning-gym's {name} makes other questions in every process, so ranks and a resumed run would "
            "not agree; choose another data set"
        )
    known = {field.name: field for field in fields(data_sets[name][1])}
    for key, _ in options:
        if key not in known:
            raise ConfigError(f"{text}: {name} has no setting {key!r}{_nearest(key, known)}")


def _nearest(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(sorted(known))}"


def _of_one(text: str, name: str, source: Source) -> Iterator[tuple[str, str]]:
    """The first `size` different questions of one data set that fall into the split."""
    candidates = CANDIDATES * source.size
    options = dict(source.options) | {"seed": source.seed, "size": candidates}
    as_text = json.dumps(options, sort_keys=True)
    seen: set[bytes] = set()
    try:
        for index in range(candidates):
            entry = _entry(name, as_text, index)[1]
            digest = hashlib.sha256(entry["question"].encode()).digest()
            if digest in seen or not _falls_into(digest, source.split):
                continue
            seen.add(digest)
            truth = {"answer": entry["answer"], "dataset": name, "index": index, "options": options}
            yield entry["question"] + INSTRUCTION * source.instruction, json.dumps(truth)
            if len(seen) == source.size:
                return
    except (GeneratorExit, MemoryError):
        raise
    except _Refused as error:
        raise ConfigError(f"{text}: reasoning-gym's {name} refuses its settings: {error}") from error
    except Exception as error:  # whatever a data set raises
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{text}: reasoning-gym's {name} fails: {type(error).__name__}: {reason}") from error
    raise DataError(
        f"{text}: {name} has only {len(seen)} different questions of split {source.split} among {candidates}; lower "
        "size"
    )


def _falls_into(digest: bytes, split: str | None) -> bool:
    return split not in ("train", "eval") or (digest[0] < EVAL_SHARE) == (split == "eval")


class _Refused(ValueError):
    """A data set does not accept its settings."""


@functools.lru_cache(maxsize=64)
def _data_set(name: str, options: str) -> Any:
    try:
        return load_package().create_dataset(name, **json.loads(options))
    except Exception as error:  # AssertionError, TypeError, whatever else a configuration raises
        raise _Refused(" ".join(str(error).split())[:200] or type(error).__name__) from error


@functools.lru_cache(maxsize=256)
def _entry(name: str, options: str, index: int) -> tuple[Any, dict[str, Any]]:
    data_set = _data_set(name, options)
    return data_set, data_set[index]
