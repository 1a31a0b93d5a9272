"""Grade samples with the graders of their benchmarks, also again and without an engine."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from megatron_entropy.benchmarks.folder import EvalFolder, EvalRecord
from megatron_entropy.benchmarks.golds import gold_for
from megatron_entropy.benchmarks.samples import SampleRow, read_rows, repair_rows, write_rows
from megatron_entropy.config.schema import RewardConfig
from megatron_entropy.records import Grade
from megatron_entropy.rewards.client import open_grader

ROWS_AT_A_TIME = 1024
"""Rows in one call of the graders."""
NO_BUDGET = 1e9
"""Seconds for a call: each response has its time limit, and none is left without a grade because others are slow."""
MAX_SHOWN = 3
"""Damaged lines of a file that are named."""


class Graders:
    """Grades responses with several graders, here or on a reward server; each starts with its first response.

    Args:
        names: verifiers.
        config: workers and limits of each, or the server.
    Raises:
        ConfigError: an unknown grader.
    """

    def __init__(self, names: Sequence[str], config: RewardConfig) -> None:
        self._graders = {name: open_grader(config, verifier=name, budget=NO_BUDGET) for name in dict.fromkeys(names)}

    def grade(self, wanted: Sequence[tuple[str, str, Sequence[str]]]) -> list[dict[str, Grade]]:
        """Grade responses.

        Args:
            wanted: response, gold of the question and the names of the graders of each.
        Returns:
            The grades of each response by the name of the grader.
        Raises:
            Fault: a reward server or the workers failed.
        """
        grades: list[dict[str, Grade]] = [{} for _ in wanted]
        for name, grader in self._graders.items():
            indices = [index for index, (_, _, names) in enumerate(wanted) if name in names]
            pairs = [(response, gold_for(name, gold)) for response, gold, names in wanted if name in names]
            for index, grade in zip(indices, grader.grade(pairs), strict=True):
                grades[index][name] = grade
        return [{name: found[name] for name in names} for found, (_, _, names) in zip(grades, wanted, strict=True)]

    def grade_rows(self, rows: Sequence[SampleRow], names: Sequence[str]) -> Iterator[SampleRow]:
        """Return the rows with the grades of these graders, in their order."""
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            batch = rows[start : start + ROWS_AT_A_TIME]
            grades = self.grade([(row.response, row.answer, names) for row in batch])
            for row, new in zip(batch, grades, strict=True):
                yield replace(row, grades=new)

    def close(self) -> None:
        """Stop the workers."""
        for grader in self._graders.values():
            grader.close()


def report_damage(damaged: Sequence[str], consequence: str) -> None:
    """Say in one line which lines of a file are damaged, and the consequence."""
    if damaged:
        more = f" and {len(damaged) - MAX_SHOWN} more" if len(damaged) > MAX_SHOWN else ""
        shown = "; ".join(damaged[:MAX_SHOWN])
        print(f"damaged lines: {len(damaged)} ({shown}{more}); {consequence}", file=sys.stderr)


def restore_rows(folder: EvalFolder, benchmark: str, names: Sequence[str], graders: Graders) -> list[SampleRow]:
    """Read the rows of a stopped evaluation so that they can be continued.

    Damaged lines and a last line that was cut short are taken out of the file. Rows that lack a grade, because a
    reward server failed or a grader is new, are graded.

    Args:
        folder: of the evaluation.
        benchmark: its name.
        names: the benchmark's graders.
        graders: with these among them.
    Returns:
        The rows that the file then has.
    Raises:
        DataError, Fault: the file cannot be read or written, or grading fails.
    """
    path = folder.rows(benchmark)
    stored = repair_rows(path)
    report_damage(stored.damaged, "their samples are drawn again")
    lacking = [row for row in stored.rows if not set(names) <= set(row.grades)]
    if not lacking:
        return stored.rows
    graded = {row.key: row for row in graders.grade_rows(lacking, names)}
    rows = [graded.get(row.key, row) for row in stored.rows]
    write_rows(path, rows)
    return rows


@dataclass(frozen=True)
class Regraded:
    """What grading again changed in one benchmark: its rows, and by grader the number of grades that differ."""

    rows: int
    changed: dict[str, int]


def regrade(folder: EvalFolder, record: EvalRecord, config: RewardConfig) -> dict[str, Regraded]:
    """Grade all samples of a folder again and replace its files; each file changes in one step.

    Args:
        folder: of a finished or stopped evaluation.
        record: names the graders of each benchmark.
        config: workers and limits of each grader, or the server.
    Returns:
        What changed, by benchmark.
    Raises:
        ConfigError: an unknown grader.
        DataError, Fault: a file cannot be read or written, or grading fails; the old file stays.
    """
    changes: dict[str, Regraded] = {}
    names = [name for benchmark in record.benchmarks.values() for name in benchmark.graders]
    with closing(Graders(names, config)) as graders:
        for benchmark, asked in record.benchmarks.items():
            path = folder.rows(benchmark)
            stored = read_rows(path)
            report_damage(stored.damaged, "they are left out; the evaluation draws their samples again")
            rows = list(graders.grade_rows(stored.rows, asked.graders))
            changes[benchmark] = Regraded(len(rows), _count_changes(stored.rows, rows, asked.graders))
            if rows != stored.rows or stored.damaged:
                write_rows(path, rows)
    return changes


def _count_changes(before: Sequence[SampleRow], after: Sequence[SampleRow], names: Sequence[str]) -> dict[str, int]:
    return {
        name: sum(old.grades.get(name) != new.grades[name] for old, new in zip(before, after, strict=True))
        for name in names
    }
