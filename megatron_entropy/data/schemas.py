"""Schemas: rows of published data sets, read from JSONL and parquet into one record.

A schema has the columns it needs and a function from a raw row to a `Row`. `auto` takes the first schema whose columns
a file has. Your own schema needs no change here: set `data.format = "package.module:NAME"`, where NAME is a `Schema`,
or register it as an entry point of the group `megatron_entropy.schemas`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_entropy.errors import ConfigError, DataError
from megatron_entropy.plugins import load_plugin

RawRow = Mapping[str, object]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """One row of any schema: the question as a conversation, the ground truth, a worked solution.

    `semantic_entropy`: nats, from the column of that name, which `semantic-entropy` writes.
    """

    messages: tuple[Message, ...]
    answer: str | None
    target: str | None
    semantic_entropy: float | None = None


@dataclass(frozen=True)
class Schema:
    """The columns a data set must have, and the function that reads a row. `ValueError`s of `read` name the row."""

    columns: tuple[str, ...]
    read: Callable[[RawRow], Row]


def load_schema(name: str) -> Schema:
    """Find a schema by a name of `SCHEMAS`, an entry point of `megatron_entropy.schemas`, or `package.module:NAME`.

    Raises:
        ConfigError: an unknown name (the known ones are listed), an import that fails, or not a `Schema`.
    """
    found = load_plugin(name, SCHEMAS, key="data.format", group="megatron_entropy.schemas")
    if not isinstance(found, Schema):
        raise ConfigError(f"data.format: {name!r} must be a Schema, found {type(found).__name__}")
    return found


def read_rows(file: str | Path, *, schema: str = "auto") -> Iterator[Row]:
    """Read the rows of one JSONL (`.jsonl`, `.json`, `.ndjson`) or parquet (`.parquet`) file, in their order.

    Args:
        file: the path.
        schema: see `load_schema`; `auto` detects it from the columns of the first row.

    Raises:
        ConfigError: an unknown schema.
        DataError: a missing, empty or broken file; a missing column; a value of the wrong kind. The message
            names the file, and the line (JSONL) or row (parquet) where there is one.
    """
    chosen = None if schema == "auto" else load_schema(schema)
    path = Path(file)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    empty = True
    for location, raw in _raw_rows(path):
        empty = False
        if chosen is None:
            chosen = _detect_schema(raw, location)
        for column in chosen.columns:
            if column not in raw:
                raise DataError(f"{location}: column {column!r} is missing; found {_column_names(raw)}")
        try:
            yield dataclasses.replace(chosen.read(raw), semantic_entropy=_semantic_entropy(raw))
        except ValueError as error:
            raise DataError(f"{location}: {error}") from error
    if empty:
        raise DataError(f"{path}: the file has no rows")


def _detect_schema(row: RawRow, location: str) -> Schema:
    """The first schema whose columns a file's first row has."""
    for name, schema in SCHEMAS.items():
        if all(column in row for column in schema.columns):
            if name == "gsm8k" and ("solution" in row or "####" not in str(row["answer"])):
                continue
            return schema
    known = "; ".join(f"{name}: {', '.join(schema.columns)}" for name, schema in SCHEMAS.items())
    raise DataError(f"{location}: no schema has the columns {_column_names(row)}; known are {known}")


def _raw_rows(path: Path) -> Iterator[tuple[str, RawRow]]:
    """The rows of a file, each with its location (`file:line`) for error messages."""
    readers = {
        ".jsonl": _json_lines,
        ".json": _json_lines,
        ".ndjson": _json_lines,
        ".parquet": _parquet_rows,
    }
    if path.suffix not in readers:
        raise DataError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; use {', '.join(readers)}")
    return readers[path.suffix](path)


def _json_lines(path: Path) -> Iterator[tuple[str, RawRow]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            location = f"{path}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{location}: not a line of JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{location}: expected one JSON object per line, found {_kind(row)}")
            yield location, row


def _parquet_rows(path: Path) -> Iterator[tuple[str, RawRow]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {' '.join(str(error).split())}") from error


def _column_names(row: RawRow) -> str:
    return ", ".join(row) or "no columns"


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "nothing"}
    return names.get(type(value), f"{type(value).__name__} {value!r}"[:40])


def _text(row: RawRow, column: str) -> str:
    """The text of a column; numbers become text (AIME's answers are integers)."""
    value = row[column]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(int(value)) if float(value).is_integer() else str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"column {column!r} must hold a text, found {_kind(value) if value else 'nothing'}")
    return value


def _optional_text(row: RawRow, column: str) -> str | None:
    value = row.get(column)
    return None if value is None or value == "" else _text(row, column)


def _semantic_entropy(row: RawRow) -> float | None:
    value = row.get("semantic_entropy")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"column 'semantic_entropy' must hold a number of at least 0, found {value!r}")
    return float(value)


def _messages(row: RawRow, column: str) -> tuple[Message, ...]:
    """The conversation of a column, which may also be only the text of the user's turn."""
    value = row[column]
    if isinstance(value, str) and value.strip():
        return (Message("user", value),)
    if not isinstance(value, list) or not value:
        raise ValueError(f"column {column!r} must hold a list of {{role, content}}, found {_kind(value)}")
    messages = []
    for turn in value:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"column {column!r} must hold {{role, content}} with two texts, found {_kind(turn)}")
        messages.append(Message(role, content))
    return tuple(messages)


def _user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def _ground_truth(row: RawRow) -> str:
    model = row["reward_model"]
    if not isinstance(model, dict) or "ground_truth" not in model:
        raise ValueError(f"column 'reward_model' must hold {{ground_truth}}, found {_kind(model)}")
    return _text(model, "ground_truth")


def _openr1(row: RawRow) -> Row:
    answer = _ground_truth(row) if row.get("reward_model") else _optional_text(row, "answer")
    target = row["target"]
    if isinstance(target, list):
        turns = [turn.get("content") if isinstance(turn, dict) else None for turn in target]
        if not turns or not all(isinstance(turn, str) for turn in turns):
            raise ValueError("column 'target' must hold a list of {content} with a text each")
        target = "".join(str(turn) for turn in turns)
    if not isinstance(target, str) or not target:
        raise ValueError(f"column 'target' must hold a text or a list of {{content}}, found {_kind(target)}")
    return Row(_messages(row, "prompt"), answer, target)


def _dapo(row: RawRow) -> Row:
    return Row(_messages(row, "prompt"), _ground_truth(row), None)


def _gsm8k(row: RawRow) -> Row:
    solution = _text(row, "answer")
    _, marker, answer = solution.rpartition("####")
    if not marker:
        raise ValueError("column 'answer' must end in '#### <number>'")
    return Row(_user(_text(row, "question")), answer.strip(), solution)


def _plain(row: RawRow) -> Row:
    return Row(_user(_text(row, "question")), _text(row, "answer"), _optional_text(row, "solution"))


def _math(row: RawRow) -> Row:
    return Row(_user(_text(row, "problem")), _text(row, "answer"), _optional_text(row, "solution"))


def _aime(row: RawRow) -> Row:
    return Row(_user(_text(row, "Problem")), _text(row, "Answer"), _optional_text(row, "Solution"))


SCHEMAS: dict[str, Schema] = {
    "openr1": Schema(("prompt", "target"), _openr1),  # OpenR1-Math, LUFFY, CurioSFT
    "dapo": Schema(("prompt", "reward_model"), _dapo),  # DAPO-Math-17k
    "gsm8k": Schema(("question", "answer"), _gsm8k),  # the answer ends in "#### 42"
    "plain": Schema(("question", "answer"), _plain),  # this project's; `solution` is optional
    "math": Schema(("problem", "answer"), _math),  # MATH-500; `solution` is optional
    "aime": Schema(("Problem", "Answer"), _aime),
}
