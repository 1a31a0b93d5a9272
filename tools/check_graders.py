#!/usr/bin/env python3
"""Grade published answers again and compare with their published verdicts: `python tools/check_graders.py FILE...`.

FILE (.json, .jsonl, or either with .gz) is one of the `READERS` below; its kind is recognised by its columns. The tool
prints the accuracy of every column as published and as graded here, and each row on which the two differ. Exit code 1:
there is such a row. The files are downloads; none is part of this repository.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_entropy.errors import DataError, UserError
from megatron_entropy.records import Grade
from megatron_entropy.rewards import RewardPool

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A published answer. `extracted`: the published extraction, None if nothing was found or it is not published."""

    row: str
    column: str
    grader: str
    response: str
    answer: str
    correct: bool
    extracted: str | None = None
    has_extracted: bool = False

    def agrees(self, grade: Grade) -> bool:
        """Whether the grade is the published one, and so is the extraction."""
        return grade.correct is self.correct and (not self.has_extracted or grade.extracted == self.extracted)


def gsm8k_solutions(row: Row, name: str) -> Iterator[Case]:
    """Four solutions to each problem; the lines `A: 18` are read as the `#### 18` of GSM8K's own solutions."""

    def marked(solution: str) -> str:
        return re.sub(r"^A: ", "#### ", solution, flags=re.MULTILINE)

    for column, graded in row.items():
        if isinstance(graded, dict):
            for grader in ("gsm8k_strict", "gsm8k_flexible"):
                solution, truth = marked(graded["solution"]), marked(row["ground_truth"])
                yield Case(name, column, grader, solution, truth, graded["is_correct"])


def mmlu_pro_outputs(row: Row, name: str) -> Iterator[Case]:
    """`pred` is the letter that the evaluator found (null: none, where the evaluator guesses)."""
    response = next(row[key] for key in ("model_outputs", "generated_text", "response") if key in row)
    correct = row["pred"] == row["answer"]
    yield Case(name, "pred", "multiple_choice", response, row["answer"], correct, row["pred"], has_extracted=True)


def harness_samples(row: Row, name: str) -> Iterator[Case]:
    """GSM8K samples of lm-evaluation-harness (`--log_samples`), one row for each filter."""
    grader = {"strict-match": "gsm8k_strict", "flexible-extract": "gsm8k_flexible"}.get(row["filter"])
    if grader is None:
        raise DataError(f"{name}: the filter {row['filter']!r} is not strict-match or flexible-extract")
    yield Case(name, row["filter"], grader, row["resps"][0][0], row["target"], bool(row["exact_match"]))


def olympiad_pairs(row: Row, name: str) -> Iterator[Case]:
    """Pairs of a ground truth `GT` and answers `Ans` that are `equal` or not, some with a `precision`."""
    for number, pair in enumerate(row["Ans"]):
        text = pair["answer"]
        precision = pair.get("precision")
        error = ",".join(map(str, precision)) if isinstance(precision, list) else precision and str(precision)
        truth = json.dumps({"final_answer": [row["GT"]], "error": error})
        response = text if "\\boxed" in text else f"\\boxed{{{text}}}"
        yield Case(f"{name}.{number}", "equal", "olympiad", response, truth, pair["equal"])


def qwen_outputs(row: Row, name: str) -> Iterator[Case]:
    """Outputs of Qwen2.5-Math's evaluation: the responses `code` and their `score`."""
    grader = "minerva" if "minerva" in name else "math_equal"
    for number, (response, score) in enumerate(zip(row["code"], row["score"], strict=True)):
        yield Case(f"{name}.{number}", "score", grader, response, str(row["gt"]), bool(score))


def graded_responses(row: Row, name: str) -> Iterator[Case]:
    """Any grader: rows of `grader`, `response`, `answer`, `correct`."""
    yield Case(name, row["grader"], row["grader"], row["response"], row["answer"], row["correct"])


@dataclass(frozen=True)
class Reader:
    """Turns a row with these columns into cases."""

    title: str
    columns: frozenset[str]
    cases: Callable[[Row, str], Iterator[Case]]


READERS = (
    Reader(
        "example_model_solutions.jsonl of GSM8K's release", frozenset({"question", "ground_truth"}), gsm8k_solutions
    ),
    Reader("eval_results of MMLU-Pro's release", frozenset({"pred", "answer", "options"}), mmlu_pro_outputs),
    Reader("samples of lm-evaluation-harness", frozenset({"filter", "resps", "exact_match"}), harness_samples),
    Reader("scoring examples of OlympiadBench's release", frozenset({"GT", "Ans"}), olympiad_pairs),
    Reader("outputs of Qwen2.5-Math's evaluation", frozenset({"code", "score", "gt"}), qwen_outputs),
    Reader("graded responses", frozenset({"grader", "response", "answer", "correct"}), graded_responses),
)


def read_cases(path: Path) -> list[Case]:
    """Read a file of one of the `READERS`; rows are counted from 0.

    Raises:
        DataError: the file is not JSON, or no reader knows its columns.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            text = file.read()
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
        reader = next(reader for reader in READERS if all(reader.columns <= row.keys() for row in rows))
        return [case for number, row in enumerate(rows) for case in reader.cases(row, f"{path.name}:{number}")]
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise DataError(f"{path} cannot be read as graded answers: {error!r}") from error
    except StopIteration:
        known = "; ".join(f"{reader.title} ({', '.join(sorted(reader.columns))})" for reader in READERS)
        raise DataError(f"{path} has other columns than the files known here: {known}") from None


def check(cases: list[Case]) -> bool:
    """Grade the cases of one column and grader, and print the comparison; False: a grade differs."""
    with RewardPool(verifier=cases[0].grader, timeout=30.0, budget=3600.0) as pool:
        grades = pool.grade([(case.response, case.answer) for case in cases])
    published = sum(case.correct for case in cases) / len(cases)
    here = sum(grade.correct is True for grade in grades) / len(cases)
    different = [(case, grade) for case, grade in zip(cases, grades, strict=True) if not case.agrees(grade)]
    print(
        f"{cases[0].column:24} {cases[0].grader:16} {len(cases):6} answers   published {published:8.3%}   "
        f"here {here:8.3%}   different {len(different)}"
    )
    for case, grade in different:
        seen = f", extracted {case.extracted!r}" if case.has_extracted else ""
        print(f"    {case.row}: published {case.correct}{seen}; here {grade}; answer {case.answer[-60:]!r}")
    return not different


def main() -> int:
    """Check the files given on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="graded answers (see READERS)")
    args = parser.parse_args()
    agree = True
    for path in args.files:
        try:
            cases = read_cases(path)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(path)
        columns: dict[tuple[str, str], list[Case]] = {}
        for case in cases:
            columns.setdefault((case.column, case.grader), []).append(case)
        for column in columns.values():
            agree &= check(column)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
