"""Readers: raw rows of JSONL, JSON, CSV and parquet files, each with its location for error messages.

JSONL, JSON and CSV files may be compressed by gzip (`.jsonl.gz`).
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, cast

from megatron_entropy.errors import DataError
from megatron_entropy.files import json_problem

RawRow = Mapping[str, object]
"""A row of a file: values by the names of the file's columns."""

MAX_LINE_BYTES = 2**28
"""Longest line that is read."""
MAX_ARRAY_BYTES = 2**30
"""Largest `.json` file that holds an array (uncompressed): it is read as a whole."""


def read_raw_rows(path: Path) -> Iterator[tuple[str, RawRow]]:
    """Read the rows of a file in their order, each with its location, such as `train.jsonl:7`.

    Raises:
        DataError: a missing file, a suffix without reader, a file that is not of its kind, or a row that is not an
            object.
    """
    suffix = path.with_suffix("").suffix + path.suffix if path.suffix == ".gz" else path.suffix
    if suffix not in READERS:
        raise DataError(f"{path}: cannot read {suffix or 'a file without suffix'}; use {', '.join(READERS)}")
    if not os.path.isfile(path):
        raise DataError(f"{path}: {'not a regular file' if os.path.lexists(path) else 'no such file'}")
    try:
        yield from READERS[suffix](path)
    except (OSError, EOFError, zlib.error) as error:  # the last two: a damaged .gz file
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def kind_of(value: object) -> str:
    """Name a value in the words of an error message."""
    if isinstance(value, bool | int | float):
        return f"the {type(value).__name__} {value}"
    if isinstance(value, str) and not value.strip():
        return "only white space" if value else "an empty text"
    names = {dict: "an object", list: "a list", str: "a text", type(None): "nothing"}
    return names.get(type(value), type(value).__name__)


def column_names(columns: Iterable[str]) -> str:
    """List the columns of a row for an error message, shortened."""
    names = list(columns)
    shown = [name if name.isprintable() and len(name) < 60 else f"{name[:60]!a}" for name in names[:20]]
    return (", ".join(shown) or "no columns") + (", ..." if len(names) > 20 else "")


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _json(path: Path) -> Iterator[tuple[str, RawRow]]:
    """An array of objects, or one object per line."""
    with _open(path) as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    return _json_array(path) if start.startswith(b"[") else _json_lines(path)


def _json_array(path: Path) -> Iterator[tuple[str, RawRow]]:
    chunks, size = [], 0
    with _open(path) as file:
        while chunk := file.read(2**20):
            chunks.append(chunk)
            if (size := size + len(chunk)) > MAX_ARRAY_BYTES:
                raise DataError(
                    f"{path}: more than {MAX_ARRAY_BYTES} bytes are too many for one JSON array; write one object per "
                    "line (.jsonl)"
                )
    rows = _parse(b"".join(chunks), str(path), "not a JSON array")
    assert isinstance(rows, list), "it starts with a bracket"
    for number, row in enumerate(rows, start=1):
        location = f"{path} item {number}"
        if not isinstance(row, dict):
            raise DataError(f"{location}: expected a JSON object, found {kind_of(row)}")
        yield location, row


def _json_lines(path: Path) -> Iterator[tuple[str, RawRow]]:
    for location, line in _lines(path):
        if not line.strip():
            continue
        row = _parse(line, location, "not a line of JSON")
        if not isinstance(row, dict):
            raise DataError(f"{location}: expected one JSON object per line, found {kind_of(row)}")
        yield location, row


def _parse(text: bytes, location: str, problem: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location}: {problem}: {json_problem(error)}") from error


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    with _open(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if len(line) == MAX_LINE_BYTES:
                raise DataError(f"{path}:{number}: the line is longer than {MAX_LINE_BYTES} bytes")
            yield f"{path}:{number}", line


def _csv_rows(path: Path) -> Iterator[tuple[str, RawRow]]:
    """Rows below a line with the names of the columns: commas, double quotes, UTF-8."""
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader((line.decode("utf-8-sig") for _, line in _lines(path)), strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) < len(names) or "" in names:
            raise DataError(f"{path}:1: the first line must name each column once, found {column_names(names)}")
        for values in reader:
            if len(values) not in (0, len(names)):  # 0: an empty line
                raise DataError(f"{path}:{reader.line_num}: {len(values)} values for {len(names)} columns")
            if values:
                yield f"{path}:{reader.line_num}", dict(zip(names, values, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}:{reader.line_num}: not valid CSV: {error}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, RawRow]]:
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except Exception as error:  # whatever pyarrow and the conversion to Python objects raise on foreign bytes
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{path}: not a readable parquet file (after row {number}): {reason}") from error


READERS: dict[str, Callable[[Path], Iterator[tuple[str, RawRow]]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".jsonl.gz": _json_lines,
    ".json.gz": _json,
    ".csv.gz": _csv_rows,
}
"""Suffix -> reader."""
