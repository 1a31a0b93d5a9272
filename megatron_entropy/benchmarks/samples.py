"""The samples of an evaluation: one file a benchmark, one JSON object a line, and nothing of a finished line is lost.

Lines are appended whole and forced to disk. A process that dies can leave one line that is cut short, which
`repair_rows` drops. A line that was damaged afterwards is reported with its number, and its sample is drawn again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from megatron_entropy.errors import DataError, Fault
from megatron_entropy.files import atomic_writer
from megatron_entropy.records import Grade

DECIMALS = 4
"""Of a stored entropy."""


@dataclass(frozen=True)
class SampleRow:
    """One graded answer to one question.

    `question`: its id, unique in the benchmark. `sample`: 0 .. n-1. `permutation`: of multiple choice options, position
    -> original index. `answer`: the ground truth that the graders read. `length`: generated tokens, the end token
    included. `finish_reason`: `stop` or `length`. `entropy`: nats of each generated token over the full vocabulary at
    the sampling temperature, None where it was not measured. `grades`: by the name of the grader.
    """

    benchmark: str
    question: str
    sample: int
    seed: int
    permutation: tuple[int, ...] | None
    category: str
    answer: str
    response: str
    length: int
    finish_reason: str
    entropy: tuple[float, ...] | None
    grades: dict[str, Grade]

    @property
    def key(self) -> tuple[str, int]:
        """What the row is of, within its benchmark: question and sample."""
        return self.question, self.sample


@dataclass(frozen=True)
class StoredRows:
    """The rows of a file in its order, and a line for each damaged one (`gsm8k.jsonl:7: ...`).

    `end`: bytes up to the end of the last whole line; what follows was being written when a process died.
    """

    rows: list[SampleRow]
    damaged: list[str]
    end: int


_ROW = TypeAdapter(SampleRow)


def read_rows(path: Path) -> StoredRows:
    """Read the rows of a file; a file that does not exist has none.

    Of several rows of one sample the first counts and the others are damaged lines.

    Raises:
        DataError: the file cannot be read.
    """
    rows: dict[tuple[str, int], SampleRow] = {}
    damaged: list[str] = []
    end = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                try:
                    row = _ROW.validate_json(line, strict=True)
                except ValidationError as error:
                    damaged.append(f"{path.name}:{number}: {_problem(error)}")
                    continue
                if row.key in rows:
                    damaged.append(f"{path.name}:{number}: a second row of question {row.question}, {row.sample}")
                rows.setdefault(row.key, row)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    return StoredRows(list(rows.values()), damaged, end)


def _problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]


def repair_rows(path: Path) -> StoredRows:
    """Read the rows of a file and take damaged lines and a last line that was cut short out of it.

    Raises:
        DataError: the file cannot be read.
        Fault: it cannot be written.
    """
    stored = read_rows(path)
    if stored.damaged:
        write_rows(path, stored.rows)
    elif path.exists() and path.stat().st_size > stored.end:
        try:
            os.truncate(path, stored.end)
        except OSError as error:
            raise _not_written(path, error) from None
    return stored


def append_rows(path: Path, rows: Iterable[SampleRow]) -> None:
    """Append rows and force them to disk; after an error the file ends where it did before.

    Raises:
        Fault: the file cannot be written, for example because the disk is full.
    """
    text = "".join(map(_line, rows)).encode()
    try:
        with path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                written = 0
                while written < len(text):  # the system may take a part, for example up to the end of the disk
                    written += file.write(text[written:])
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        raise _not_written(path, error) from None


def write_rows(path: Path, rows: Iterable[SampleRow]) -> None:
    """Replace a file by these rows in one step.

    Raises:
        Fault: the file cannot be written; the old one stays.
    """
    try:
        with atomic_writer(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(map(_line, rows))
    except OSError as error:
        raise _not_written(path, error) from None


def _line(row: SampleRow) -> str:
    return json.dumps(asdict(row), ensure_ascii=False, allow_nan=False) + "\n"


def _not_written(path: Path, error: OSError) -> Fault:
    return Fault(
        f"{path}: cannot be written: {error.strerror or error}; the samples in it are kept: make room or fix that, and "
        "repeat the command to go on"
    )


def round_entropy(entropy: Iterable[float]) -> tuple[float, ...]:
    """Round entropies in nats to what a row stores.

    Raises:
        Fault: one of them is NaN or infinite.
    """
    rounded = tuple(round(float(value), DECIMALS) + 0.0 for value in entropy)
    if not all(map(math.isfinite, rounded)):
        raise Fault("an engine returned an entropy that is not finite; the model's weights or its dtype are broken")
    return rounded
