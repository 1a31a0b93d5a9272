"""Schemas: rows of published data sets as one record.

A schema has the columns it needs and a function from a raw row to a `Row`. `auto` takes the first schema whose columns
a file has. Your own schema needs no change here: set `data.format = "package.module:NAME"`, where NAME is a `Schema`,
or register it as an entry point of the group `megatron_entropy.schemas`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_entropy import procedural
from megatron_entropy.data.readers import RawRow, column_names, kind_of, read_raw_rows
from megatron_entropy.errors import ConfigError, DataError
from megatron_entropy.plugins import load_plugin


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
    """The columns a data set must have, and the function that reads a row.

    `ValueError`s of `read` name the row. `optional`: further columns that `read` looks for.
    """

    columns: tuple[str, ...]
    read: Callable[[RawRow], Row]
    optional: tuple[str, ...] = ()


def load_schema(name: str) -> Schema:
    """Find a schema by a name of `SCHEMAS`, an entry point of `megatron_entropy.schemas`, or `package.module:NAME`.

    Raises:
        ConfigError: an unknown name (the known ones are listed), an import that fails, or not a `Schema`.
    """
    found = load_plugin(name, SCHEMAS, key="data.format", group="megatron_entropy.schemas")
    if not isinstance(found, Schema):
        raise ConfigError(f"data.format: {name!r} must be a Schema, found {type(found).__name__}")
    return found


def read_rows(file: str | Path, *, schema: str = "auto", columns: Mapping[str, str] | None = None) -> Iterator[Row]:
    """Read the rows of one file, in their order; see `readers.READERS` for the kinds of files.

    Args:
        file: the path, or a source of `procedural`, whose rows have no schema.
        schema: see `load_schema`; `auto` detects it from the columns of the first row.
        columns: name of a column in the schema -> its name in the file, for the columns that differ.

    Raises:
        ConfigError: an unknown schema, or a name in `columns` that the schema does not have.
        DataError: a missing, empty or broken file; a missing column; a value of the wrong kind. The message
            names the file, and the line or row where there is one.
    """
    if procedural.is_source(file):
        for question, truth in procedural.questions(str(file)):
            yield Row(_user(question), truth, None)
        return
    chosen = None if schema == "auto" else load_schema(schema)
    columns = columns or {}
    _check_mapped_columns(columns, schema, SCHEMAS.values() if chosen is None else [chosen])
    empty = True
    for location, in_file in read_raw_rows(Path(file)):
        empty = False
        raw = _rename(in_file, columns, location) if columns else in_file
        if chosen is None:
            chosen = _detect_schema(raw, location)
        for column in chosen.columns:
            if column not in raw:
                raise DataError(
                    f"{location}: column {column!r} is missing; found {column_names(in_file)}; "
                    f"data.columns.{column} names it where it has another name"
                )
        try:
            row = dataclasses.replace(chosen.read(raw), semantic_entropy=_semantic_entropy(raw))
            _check_unicode(row)
        except ValueError as error:
            raise DataError(f"{location}: {error}") from error
        except Exception as error:  # a schema from outside may raise anything
            raise DataError(f"{location}: data.format={schema!r} cannot read it: {error!r}") from error
        yield row
    if empty:
        raise DataError(f"{file}: the file has no rows")


def _check_mapped_columns(columns: Mapping[str, str], name: str, schemas: Iterable[Schema]) -> None:
    known = list(dict.fromkeys(column for schema in schemas for column in (*schema.columns, *schema.optional)))
    known.append("semantic_entropy")
    for column in columns:
        if column not in known:
            raise ConfigError(
                f"data.columns.{column}: data.format={name!r} has no such column; it has {', '.join(known)}"
            )


def _rename(row: RawRow, columns: Mapping[str, str], location: str) -> RawRow:
    """The row under the names of the schema."""
    for ours, theirs in columns.items():
        if theirs not in row:
            raise DataError(
                f"{location}: column {theirs!r} is missing, which data.columns.{ours} names; found {column_names(row)}"
            )
    kept = {name: value for name, value in row.items() if name not in columns.values()}
    return {**kept, **{ours: row[theirs] for ours, theirs in columns.items()}}


def _detect_schema(row: RawRow, location: str) -> Schema:
    """The first schema whose columns a file's first row has."""
    for name, schema in SCHEMAS.items():
        if all(column in row for column in schema.columns):
            if name == "gsm8k" and ("solution" in row or "####" not in str(row["answer"])):
                continue
            return schema
    known = "; ".join(f"{name}: {', '.join(schema.columns)}" for name, schema in SCHEMAS.items())
    raise DataError(
        f"{location}: no schema has the columns {column_names(row)}; known are {known}; "
        'data.columns.question = "NAME" reads a column with another name'
    )


def _check_unicode(row: Row) -> None:
    """Refuse half of a surrogate pair (JSON's escape of D800 to DFFF alone), which no tokenizer can read.

    Raises:
        ValueError: the row contains one.
    """
    messages = (text for message in row.messages for text in (message.role, message.content))
    for text in (*messages, row.answer or "", row.target or ""):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a text is not valid Unicode: character {error.start} is {text[error.start]!a}") from None


def _text(row: RawRow, column: str) -> str:
    """The text of a column; numbers become text (AIME's answers are integers)."""
    value = row[column]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"column {column!r} must hold a text or a finite number, found {kind_of(value)}")
    return value


def _optional_text(row: RawRow, column: str) -> str | None:
    value = row.get(column)
    return None if value is None or value == "" else _text(row, column)


def _semantic_entropy(row: RawRow) -> float | None:
    value = row.get("semantic_entropy")
    if value is None or value == "":
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]  # text in CSV files
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"column 'semantic_entropy' must hold a number of at least 0, found {kind_of(value)}")
    return number


def _messages(row: RawRow, column: str) -> tuple[Message, ...]:
    """The conversation of a column, which may also be only the text of the user's turn."""
    value = row[column]
    if isinstance(value, str) and value.strip():
        return (Message("user", value),)
    if not isinstance(value, list) or not value:
        raise ValueError(f"column {column!r} must hold a list of {{role, content}}, found {kind_of(value)}")
    messages = []
    for turn in value:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"column {column!r} must hold {{role, content}} with two texts, found {kind_of(turn)}")
        messages.append(Message(role, content))
    return tuple(messages)


def _user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def _ground_truth(row: RawRow) -> str:
    model = row["reward_model"]
    if not isinstance(model, dict) or "ground_truth" not in model:
        raise ValueError(f"column 'reward_model' must hold {{ground_truth}}, found {kind_of(model)}")
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
        raise ValueError(f"column 'target' must hold a text or a list of {{content}}, found {kind_of(target)}")
    return Row(_messages(row, "prompt"), answer, target)


def _dapo(row: RawRow) -> Row:
    return Row(_messages(row, "prompt"), _ground_truth(row), None)


def _gsm8k(row: RawRow) -> Row:
    solution = _text(row, "answer")
    _, marker, answer = solution.rpartition("####")
    if not marker or not answer.strip():
        raise ValueError("column 'answer' must end in '#### <number>'")
    return Row(_user(_text(row, "question")), answer.strip(), solution)


def _plain(row: RawRow) -> Row:
    return Row(_user(_text(row, "question")), _text(row, "answer"), _optional_text(row, "solution"))


def _math(row: RawRow) -> Row:
    return Row(_user(_text(row, "problem")), _text(row, "answer"), _optional_text(row, "solution"))


def _aime(row: RawRow) -> Row:
    return Row(_user(_text(row, "Problem")), _text(row, "Answer"), _optional_text(row, "Solution"))


SCHEMAS: dict[str, Schema] = {
    "openr1": Schema(("prompt", "target"), _openr1, ("reward_model", "answer")),  # OpenR1-Math, LUFFY, CurioSFT
    "dapo": Schema(("prompt", "reward_model"), _dapo),  # DAPO-Math-17k
    "gsm8k": Schema(("question", "answer"), _gsm8k),  # the answer ends in "#### 42"
    "plain": Schema(("question", "answer"), _plain, ("solution",)),  # this project's; `solution` is optional
    "math": Schema(("problem", "answer"), _math, ("solution",)),  # MATH-500; `solution` is optional
    "aime": Schema(("Problem", "Answer"), _aime, ("Solution",)),
}
