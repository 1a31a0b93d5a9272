"""Read a run folder piece by piece: metrics from an offset on, dumps by an index of their lines.

Nothing is loaded as a whole, and nothing that is damaged stops the reading: damaged lines are counted, a last line
without its end is read again later. Indices of dumps are built when they are needed, as far as they are needed.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from megatron_entropy.errors import DataError
from megatron_entropy.monitor.dump_rows import DumpRow
from megatron_entropy.monitor.history import read_stages
from megatron_entropy.monitor.run_folder import RunFolder

Kind = Literal["train", "eval"]
MAX_LINE = 64 * 2**20
"""Bytes of a line; longer ones count as damaged."""
METRICS_CHUNK = 4 * 2**20
"""Bytes of metrics that one request returns."""
SECONDS = 0.4
"""Time that one request spends on searching; the next one continues."""
MAX_INDICES = 256


class NotFoundError(Exception):
    """A dump or row that is not there."""


class Entry(NamedTuple):
    """What the index knows of a row. `question`: digest of its text."""

    offset: int
    size: int
    group: int
    verdict: str
    entropy: float | None
    length: int | None
    question: str


@dataclass(frozen=True)
class Filter:
    """Which rows are shown; the empty text and None mean all. `question`: digest of a text (`question_digest`)."""

    verdict: str = ""
    min_length: int | None = None
    max_length: int | None = None
    min_entropy: float | None = None
    max_entropy: float | None = None
    question: str = ""
    text: str = ""

    def accepts(self, entry: Entry) -> bool:
        """Whether a row passes everything but the search for a text."""
        return (
            self.verdict in ("", entry.verdict)
            and self.question in ("", entry.question)
            and _is_within(entry.length, self.min_length, self.max_length)
            and _is_within(entry.entropy, self.min_entropy, self.max_entropy)
        )


def _is_within(value: float | None, low: float | None, high: float | None) -> bool:
    if low is None and high is None:
        return True
    return value is not None and (low is None or value >= low) and (high is None or value <= high)


def question_digest(text: str) -> str:
    """Return a short name of a question, the same in every run."""
    return blake2b(text.encode("utf-8", "replace"), digest_size=8).hexdigest()


class Page(NamedTuple):
    """Numbers of the rows found, and the row to continue from; None at the end."""

    rows: list[int]
    next: int | None


class DumpIndex:
    """Offsets of a dump's rows, built line by line when rows are asked for; safe for several threads.

    `damaged`: lines that are no row. `complete`: the whole file is indexed, but for a last line without its end that is
    no row yet.
    """

    def __init__(self, path: Path) -> None:
        status = path.stat()
        self.path = path
        self.entries: list[Entry] = []
        self.damaged = 0
        self.complete = False
        self._end = 0
        self._size, self._inode = status.st_size, status.st_ino
        self._lock = threading.RLock()

    def follows(self) -> bool:
        """Whether the index is still of this file, which may have grown."""
        status = self.path.stat()
        if status.st_ino != self._inode or status.st_size < self._end:
            return False
        if status.st_size != self._size:
            self._size, self.complete = status.st_size, False
        return True

    def find(self, wanted: Filter, start: int, count: int, seconds: float = SECONDS) -> Page:
        """Return up to `count` rows from row `start` on that pass the filter, as many as are found in time."""
        deadline, rows, row = time.monotonic() + seconds, [], start
        text = wanted.text.casefold()
        with self._lock, self.path.open("rb") as file:
            while self._index_up_to(file, row, deadline):
                if len(rows) == count or time.monotonic() > deadline:
                    return Page(rows, row)
                if wanted.accepts(self.entries[row]) and (not text or self._holds(file, row, text)):
                    rows.append(row)
                row += 1
        return Page(rows, None if self.complete else row)

    def group_of(self, row: int) -> list[int]:
        """Return the numbers of the rows that are of one group with `row`, in order.

        Raises:
            NotFoundError: there is no such row.
        """
        with self._lock, self.path.open("rb") as file:
            if row < 0 or not self._index_up_to(file, row):
                raise NotFoundError(f"{self.path.name} has no row {row}")
            group, first, end = self.entries[row].group, row, row + 1
            while first and self.entries[first - 1].group == group:
                first -= 1
            while self._index_up_to(file, end) and self.entries[end].group == group:
                end += 1
            return list(range(first, end))

    def read(self, rows: Sequence[int]) -> list[DumpRow]:
        """Return rows that are indexed.

        Raises:
            NotFoundError: the file has changed since.
        """
        with self._lock, self.path.open("rb") as file:
            try:
                return [self._read(file, row) for row in rows]
            except ValueError:
                raise NotFoundError(f"{self.path.name} has changed; load the page again") from None

    def _read(self, file: BinaryIO, row: int) -> DumpRow:
        file.seek(self.entries[row].offset)
        return DumpRow.model_validate_json(file.read(self.entries[row].size))

    def _holds(self, file: BinaryIO, row: int, text: str) -> bool:
        found = self._read(file, row)
        return text in found.response.casefold() or text in found.question.casefold()

    def _index_up_to(self, file: BinaryIO, row: int, deadline: float = math.inf) -> bool:
        """Index lines until `row` is there; False at the end of the file, or when time is up."""
        file.seek(self._end)
        while row >= len(self.entries) and not self.complete and time.monotonic() < deadline:
            line = file.readline(MAX_LINE)
            end = file.tell()
            while len(line) >= MAX_LINE and not line.endswith(b"\n"):  # too long: on to its end
                line = line[:1] + file.readline(MAX_LINE)
                end = file.tell()
            try:
                self._add(self._end, line)
            except ValueError:
                if not line.endswith(b"\n"):
                    self.complete = True
                    break
                self.damaged += bool(line.strip())
            self._end = end
        return row < len(self.entries)

    def _add(self, offset: int, line: bytes) -> None:
        row = DumpRow.model_validate_json(line)
        last = self.entries[-1] if self.entries else None
        question = question_digest(row.question)
        group = row.group
        if group is None:  # a dump of another version: neighbours with one question are a group
            group = 0 if last is None else last.group + (last.question != question)
        self.entries.append(Entry(offset, len(line), group, row.verdict, row.entropy, row.length, question))


class RunReader:
    """What the explorer reads of one run.

    Raises:
        DataError: the folder is not that of a run.
    """

    def __init__(self, root: Path) -> None:
        self.folder = RunFolder(root)
        self.root = root.resolve()
        if not (self.folder.metrics.is_file() or self.folder.config.is_file()):
            raise DataError(f"{root}: no metrics.jsonl and no config.toml here; name the folder of a run")
        self._indices: OrderedDict[Path, DumpIndex] = OrderedDict()
        self._lock = threading.Lock()

    def stages(self) -> list[dict[str, Any]]:
        """See `read_stages`."""
        return read_stages(self.folder)

    def metrics(self, offset: int, file: int) -> dict[str, Any]:
        """Return rows of metrics from a byte offset on.

        Args:
            file: as the last answer named it. A resumed run replaces the file; then the rows start again.
        Returns:
            `rows`, `offset` and `file` for the next call, `reset` when earlier rows no longer count, `more` when others
            follow at once, the number of `damaged` lines, and `age`, the seconds since the last change.
        """
        try:
            with self.folder.metrics.open("rb") as stream:
                status = os.fstat(stream.fileno())
                reset = offset > status.st_size or (file != status.st_ino and offset > 0)
                stream.seek(0 if reset else offset)
                start = stream.tell()
                content = stream.read(METRICS_CHUNK)
        except FileNotFoundError:
            return {"rows": [], "offset": 0, "file": 0, "reset": offset > 0, "more": False, "damaged": 0, "age": None}
        whole = content[: content.rfind(b"\n") + 1]
        more = len(content) == METRICS_CHUNK
        if more and not whole:
            whole = content  # a line of 4 MiB is none of metrics
        rows = [_metrics_row(line) for line in whole.split(b"\n") if line.strip()]
        return {
            "rows": [row for row in rows if row],
            "offset": start + len(whole),
            "file": status.st_ino,
            "reset": reset,
            "more": more,
            "damaged": sum(row is None for row in rows),
            "age": max(0.0, time.time() - status.st_mtime),
        }

    def dumps(self) -> list[dict[str, Any]]:
        """Return kind, stage and step of every dump, in order."""
        found = []
        for kind, example in (("train", self.folder.rollouts("x", 0)), ("eval", self.folder.evaluation("x", 0))):
            for file in example.parents[1].glob("*/step_*.jsonl"):
                step = file.stem.removeprefix("step_")
                if step.isascii() and step.isdecimal() and len(step) < 12:
                    found.append({"kind": kind, "stage": file.parent.name, "step": int(step)})
        return sorted(found, key=lambda dump: (dump["stage"], dump["step"], dump["kind"]))

    def index(self, kind: Kind, stage: str, step: int) -> DumpIndex:
        """Return the index of a dump; what was indexed before is kept.

        Raises:
            NotFoundError: there is no such dump inside the run folder.
        """
        path = (self.folder.rollouts if kind == "train" else self.folder.evaluation)(stage, step)
        is_name = Path(stage).name == stage and "\0" not in stage
        if not (is_name and path.resolve().is_relative_to(self.root) and path.is_file()):
            raise NotFoundError(f"no dump {kind}/{stage[:64]}/{step}")
        with self._lock:
            index = self._indices.pop(path, None)
            if index is None or not index.follows():
                index = DumpIndex(path)
            self._indices[path] = index
            while len(self._indices) > MAX_INDICES:
                self._indices.popitem(last=False)
            return index


def _metrics_row(line: bytes) -> dict[str, Any] | None:
    """The row of a line, numbers that JSON lacks as None; None for a damaged line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("stage"), str):
        return None
    if type(row.get("step")) is not int or not 0 <= row["step"] < 2**53:
        return None
    return {
        name: value if name in ("stage", "step") or (type(value) in (int, float) and abs(value) < 1e300) else None
        for name, value in row.items()
    }
