"""Suites: a built-in one by its name, or a TOML file that changes built-in benchmarks and declares others."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from pydantic import ValidationError

from megatron_entropy.benchmarks.catalog import BENCHMARKS, SUITES
from megatron_entropy.benchmarks.golds import GOLDS
from megatron_entropy.benchmarks.questions import Benchmark, Columns
from megatron_entropy.config.load import describe_problem, read_toml, reject_unknown_keys, suggest
from megatron_entropy.config.types import NonNegativeInt, PathText, Section, TextList
from megatron_entropy.errors import ConfigError
from megatron_entropy.rewards.registry import load_verifier

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
DEFAULT_GRADERS = {"math": ("math_verify",), "choice": ("choice",)}


class ColumnsSection(Section):
    """Names of the columns in a file, where they differ from the known ones."""

    question: str = ""
    """The question: a text, or a list of {role, content}."""
    answer: str = ""
    """The gold; for multiple choice the label, the number from 0 or the text of the correct option."""
    choices: str = ""
    """All options of a multiple choice question."""
    options: TextList = []
    """Columns that hold one option each, in place of `choices`."""
    index: str = ""
    """Number of the correct option, from 0."""
    category: str = ""
    """Subject, level or type."""
    context: str = ""
    """Text before the question."""
    id: str = ""
    """What tells questions apart; without it, the row's number."""


class BenchmarkSection(Section):
    """A benchmark of a suite: a built-in one with changes, or one of your own."""

    name: str
    """A built-in name, or a new one, which needs `data`."""
    kind: Literal["", "math", "choice"] = ""
    """Free answers or multiple choice. Empty: that of the built-in benchmark, `math` for a new one."""
    data: PathText = ""
    """JSONL, JSON, CSV or parquet file, or `hf://ORG/NAME[/CONFIG][:SPLIT]`. Empty: found by the name."""
    columns: ColumnsSection = ColumnsSection()
    gold: str = ""
    """How the gold is read: `text`, `aime`, `number`, `gsm8k` or `olympiad`. Empty: that of the built-in benchmark,
    `text` for a new one."""
    graders: TextList = []
    """Verifiers, the one of the main score first. Empty: those of the built-in benchmark and the preset."""
    prompt: str = ""
    """User message with `{question}` and, for multiple choice, `{letters}`. Empty: the preset's."""
    shuffle: Literal["", "no", "per_question", "simple_evals"] = ""
    """Order of the options: as in the file, drawn for each question, or as simple-evals draws it. Empty: that of the
    built-in benchmark, `no` for a new one."""
    samples: NonNegativeInt = 0
    """Answers to each question. 0: the preset's number."""
    limit: NonNegativeInt = 0
    """Only the first rows. 0: all."""


class SuiteFile(Section):
    """A suite file."""

    benchmarks: list[BenchmarkSection]
    """One `[[benchmarks]]` table each."""


def load_suite(name: str) -> tuple[Benchmark, ...]:
    """Return the benchmarks of a suite.

    Args:
        name: of `SUITES` or of one benchmark, or a TOML file.
    Raises:
        ConfigError: an unknown name, a file that cannot be read, or a wrong key or value in it.
    """
    if name in SUITES:
        return tuple(BENCHMARKS[benchmark] for benchmark in SUITES[name])
    if name in BENCHMARKS:
        return (BENCHMARKS[name],)
    if not name.endswith(".toml"):
        raise ConfigError(f"--suite {name}: no such suite{suggest(name, [*SUITES, *BENCHMARKS, 'FILE.toml'])}")
    tree = read_toml(name, usage="--suite takes math, ood, a benchmark or a TOML file")
    tables = tree.get("benchmarks")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{name}: a suite has at least one [[benchmarks]] table")
    try:
        for number, table in enumerate(tables):
            reject_unknown_keys(table, BenchmarkSection, f"benchmarks.{number}.")
        reject_unknown_keys(tree, SuiteFile, "")
        sections = SuiteFile.model_validate(tree).benchmarks
        benchmarks = tuple(_benchmark(section) for section in sections)
    except ValidationError as error:
        raise ConfigError(f"{name}: {describe_problem(error, '')}") from None
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    names = [benchmark.name for benchmark in benchmarks]
    if len(set(names)) < len(names):
        raise ConfigError(f"{name}: benchmarks need different names, found {', '.join(names)[:200]}")
    return benchmarks


def _benchmark(section: BenchmarkSection) -> Benchmark:
    known = BENCHMARKS.get(section.name)
    _check(section, known)
    kind = section.kind or (known.kind if known else "math")
    base = known or Benchmark(section.name, kind, DEFAULT_GRADERS[kind])
    for grader in section.graders:
        load_verifier(grader)
    changes = {
        "data": section.data,
        "gold": GOLDS[section.gold] if section.gold else None,
        "graders": tuple(section.graders),
        "fixed_graders": bool(section.graders),
        "prompt": section.prompt,
        "shuffle": section.shuffle,
        "samples": section.samples,
        "limit": section.limit,
    }
    columns = _columns(base.columns, section.columns)
    return dataclasses.replace(base, columns=columns, **{key: value for key, value in changes.items() if value})


def _check(section: BenchmarkSection, known: Benchmark | None) -> None:
    where = f"benchmarks.{section.name}"
    if not NAME.fullmatch(section.name):
        raise ConfigError(f"benchmarks.name: at most 64 letters, digits, dots, _ and -, found {section.name[:80]!r}")
    if known is None and not section.data:
        raise ConfigError(
            f"{where}: not a built-in benchmark, so it needs data = FILE{suggest(section.name, BENCHMARKS)}"
        )
    if known is not None and section.kind not in ("", known.kind):
        raise ConfigError(f"{where}.kind: {section.name} is {known.kind!r}, found {section.kind!r}")
    if section.gold and section.gold not in GOLDS:
        raise ConfigError(f"{where}.gold: unknown {section.gold!r}{suggest(section.gold, GOLDS)}")
    if section.prompt and "{question}" not in section.prompt:
        raise ConfigError(f"{where}.prompt: it must contain {{question}}, found {section.prompt[:80]!r}")
    kind = section.kind or (known.kind if known else "math")
    if kind == "choice" and section.gold:
        raise ConfigError(f"{where}.gold: has no effect on multiple choice; remove it")
    if kind == "math" and (section.shuffle or section.columns.choices or section.columns.options):
        raise ConfigError(f'{where}: choices, options and shuffle need kind = "choice"')


def _columns(base: Columns, section: ColumnsSection) -> Columns:
    """The columns with those that a suite file names in place of the known ones."""
    named: dict[str, tuple[str, ...]] = {}
    for key in type(section).model_fields:
        value = getattr(section, key)
        if value:
            named[key] = (value,) if isinstance(value, str) else tuple(value)
    if section.choices:
        named["options"] = ()
    return dataclasses.replace(base, **named)
