#!/usr/bin/env python3
"""Compare our metrics with the expected numbers of lighteval's and NeMo-Skills' own tests.

    python tools/check_metrics.py FOLDER

FOLDER holds lighteval's `tests/unit/metrics/test_cases/*.json` and, as `nemo_skills_metrics.json`, NeMo-Skills'
`tests/data/eval_outputs/eval-results/metrics.json-test`. For each expected value the tool prints its name, the
expected value and ours, and it exits with code 1 if one differs.

lighteval's cases are graded by our verifiers. Where a verifier reads a text in another way than lighteval's regular
expressions, the case is graded again by those, and the line says so: the metric is the same, the grading is not.
NeMo-Skills' numbers come without the outputs. The tool searches verdicts that have the expected pass@k and averages,
and says whether all other numbers (spread over runs, majority votes, missing answers) are ours too for one set of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_entropy.evaluation import metrics
from megatron_entropy.rewards.multiple_choice import multiple_choice
from megatron_entropy.rewards.symbolic import math_verify

Case = dict[str, Any]
Line = tuple[str, float, float, str]
"""Name, expected value, ours, remark."""
Answers = list[str | None]
EXACT = 1e-12
NOT_COVERED = (
    "NeMo-Skills: arena-hard (Elo), ifeval (several instructions a question), rm_best and rm_majority (a reward model "
    "chooses), precision, recall and f1 of answer-judge, token counts and seconds (of outputs that are not published)"
)


def main() -> int:
    """Print every comparison; return 1 if one differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    logging.disable(logging.WARNING)
    lines = []
    for path in sorted(parser.parse_args().folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if "test_cases" in content:
            lines += [line for case in content["test_cases"] for line in compare_lighteval(path.stem, case)]
        else:
            lines += [line for name in content for line in compare_nemo(name, content[name])]
    for name, expected, ours, remark in lines:
        print(f"{name:<100} {expected:<22.16g} {ours:<22.16g} {remark}")
    wrong = sum(remark == "DIFFERENT" for *_, remark in lines)
    regraded = sum("regular expressions" in remark for *_, remark in lines)
    print(f"{len(lines)} values, {wrong} different; {regraded} need lighteval's own regular expressions")
    print(f"not covered: {NOT_COVERED}")
    return 1 if wrong or not lines else 0


def compare_lighteval(file: str, case: Case) -> Iterator[Line]:
    """Yield name, expected value, our value and a remark for each value of a case."""
    ours, again = (score(case, [grade(case, text) for text in case["model_response"]["text"]]) for grade in GRADINGS)
    for key, expected in case["expected_output"].items():
        remark = agreement(expected, ours[key])
        if remark == "DIFFERENT" and agreement(expected, again[key]) != "DIFFERENT":
            ours[key], remark = again[key], "graded by lighteval's regular expressions"
        yield f"{file}: {case['name']}: {key}", expected, ours[key], remark


def agreement(expected: float, ours: float) -> str:
    """Say how two values agree; lighteval writes some expected values with two digits, cut off."""
    if abs(expected - ours) <= EXACT:
        return "equal"
    is_cut = math.isfinite(ours) and expected == int(ours * 100 + EXACT) / 100
    return "equal to two digits" if is_cut else "DIFFERENT"


def score(case: Case, correct: Sequence[bool]) -> dict[str, float]:
    """Compute the values of a case from the verdicts on its samples."""
    name, parameters = case["metric_class"], case["metric_params"]
    keys, k = list(case["expected_output"]), parameters.get("k")
    if name.startswith("g_pass_at_k"):
        values = {key: metrics.g_pass_at_k(correct, k, float(key.rpartition("_")[2])) for key in keys[:-1]}
        return values | {keys[-1]: metrics.mg_pass_at_k(correct, k)}
    if "pass_at_k" in name:
        return {keys[0]: metrics.pass_at_k(correct[: parameters["n"]], k)}
    if name == "maj_at_k":
        return {keys[0]: metrics.maj_at_k(case["model_response"]["text"], correct, k)}
    return {keys[0]: metrics.avg_at_k(correct, k or 1)}


def gold(case: Case) -> str:
    """Return the first gold answer, the only one that lighteval's sampling metrics use."""
    index = case["doc"]["gold_index"]
    return case["doc"]["choices"][index if isinstance(index, int) else index[0]]


def grade_by_ours(case: Case, text: str) -> bool:
    """Grade by our verifiers."""
    name = case["metric_class"]
    if "math" in name or "latex" in name or name == "expr_gold_metric":
        try:
            return bool(math_verify(text, gold(case)).correct)
        except ValueError:
            return False
    if "gpqa" in name or "letters" in name:
        return bool(multiple_choice(text, gold(case)).correct)
    return text.strip() == gold(case).strip()


def grade_by_lighteval(case: Case, text: str) -> bool:
    """Grade as the case's extraction settings do: numbers only, LaTeX, or letters of the choices."""
    name = case["metric_class"]
    if "gpqa" in name or "letters" in name:
        letters = "ABCDEFGHIJ"[: len(case["doc"]["choices"])]
        found = re.findall(rf"[Aa]nswer:.{{0,50}}?\b([{letters}])\b", text) or re.findall(rf"^([{letters}])\b", text)
        return bool(found) and found[-1] == gold(case)
    if not ("math" in name or "latex" in name or name == "expr_gold_metric"):
        return grade_by_ours(case, text)
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    expressions, latex = ExprExtractionConfig(), LatexExtractionConfig(boxed_match_priority=0)
    no_limit: dict[str, Any] = {"parsing_timeout": None}
    targets = (latex,) if "latex" in name else (expressions,)
    truth = parse(gold(case), targets, **no_limit)
    found = parse(text, (expressions, latex), **no_limit)
    return bool(truth and found) and verify(truth, found, timeout_seconds=None)


GRADINGS: tuple[Callable[[Case, str], bool], ...] = (grade_by_ours, grade_by_lighteval)


STATISTICS = {"std_dev_across_runs": "std_runs", "std_err_across_runs": "std_err_runs"}
STATISTICS |= {"avg_sample_std_dev": "mean_sample_std"}


def compare_nemo(name: str, expected: dict[str, dict[str, Any]]) -> Iterator[Line]:
    """Yield the comparisons of one benchmark, on the first verdicts and answers with which all numbers agree."""
    runs = max(int(key[5:]) for key in expected if re.fullmatch(r"pass@\d+", key))
    spread = expected.get(f"pass@1[avg-of-{runs}]", {})
    names = [key.removesuffix("_statistics") for key in spread if key.endswith("_statistics") and "tokens" not in key]
    for score_name in [name for name in names if name in expected["pass@1"]]:
        wanted = wanted_values(expected, score_name, runs)
        ours: dict[str, float] = {}
        for correct in possible_verdicts(wanted, expected["pass@1"]["num_entries"], runs):
            ours = our_values(correct, [[None] * runs] * len(correct))
            if all(agreement(wanted[key], ours[key]) == "equal" for key in wanted if key.startswith(("pass", "avg"))):
                answers = possible_answers(wanted, correct)
                ours = our_values(correct, answers)
                break
        for key, value in wanted.items():
            found = ours.get(key, math.nan)
            yield f"NeMo-Skills {name}: {score_name} {key}", value, found, agreement(value, found)


def wanted_values(expected: dict[str, dict[str, Any]], score_name: str, runs: int) -> dict[str, float]:
    """Return the expected numbers of one score, as fractions."""
    values = {f"pass@{k}": expected[f"pass@{k}"][score_name] / 100 for k in range(1, runs + 1)}
    for k in range(2, runs + 1):
        row, majority = expected[f"pass@1[avg-of-{k}]"], expected.get(f"majority@{k}", {})
        values[f"avg-of-{k}"] = row[score_name] / 100
        values |= {f"avg-of-{k} {key}": row[f"{score_name}_statistics"][key] for key in STATISTICS}
        if majority:
            values[f"majority@{k}"] = majority[score_name] / 100
            values[f"no_answer@{k}"] = row["no_answer" if "no_answer" in row else "invalid_judgements"] / 100
    return values


def our_values(correct: Sequence[Sequence[bool]], answers: Sequence[Sequence[str | None]]) -> dict[str, float]:
    """Compute the same numbers by our functions."""
    runs, rows = len(correct[0]), list(zip(answers, correct, strict=True))
    values = {f"pass@{k}": mean([metrics.pass_at_k(row, k) for row in correct]) for k in range(1, runs + 1)}
    for k in range(2, runs + 1):
        spread = metrics.run_statistics([row[:k] for row in correct])
        values[f"avg-of-{k}"] = mean([metrics.avg_at_k(row, k) for row in correct])
        values |= {f"avg-of-{k} {key}": getattr(spread, field) for key, field in STATISTICS.items()}
        values[f"majority@{k}"] = mean([metrics.maj_at_k(*row, k, ties="average") for row in rows])
        values[f"no_answer@{k}"] = mean([list(row[:k]).count(None) / k for row in answers])
    return values


def mean(values: Sequence[float]) -> float:
    """Return the mean, rounded once."""
    return math.fsum(values) / len(values)


def possible_verdicts(wanted: dict[str, float], questions: int, runs: int) -> Iterator[list[tuple[bool, ...]]]:
    """Yield all verdicts [questions][runs], up to the order of questions, with the expected pass@k and averages."""
    hits = range(runs + 1)
    pass_at = [[metrics.pass_at_k([i < c for i in range(runs)], k) for c in hits] for k in hits[1:]]
    totals = [questions, *(questions * wanted[f"pass@{k}"] for k in hits[1:])]
    histogram = np.rint(np.linalg.solve([[1.0] * (runs + 1), *pass_at], totals)).astype(int)
    patterns = [[row for row in itertools.product((False, True), repeat=runs) if sum(row) == c] for c in hits]
    sums = [questions * k * wanted[f"avg-of-{k}"] for k in hits[2:]]
    choices = [itertools.combinations_with_replacement(patterns[c], histogram[c]) for c in hits]
    for groups in itertools.product(*choices):
        table = list(itertools.chain(*groups))
        if np.rint(sums).tolist() == list(itertools.accumulate(map(sum, zip(*table, strict=True))))[1:]:
            yield table


def possible_answers(wanted: dict[str, float], correct: Sequence[Sequence[bool]]) -> list[Answers]:
    """Return answers with the expected votes: right answers are equal, each wrong one is missing or any other text."""
    keys = [key for key in wanted if key.startswith(("majority", "no_answer"))]
    reached: dict[tuple[float, ...], list[Answers]] = {(0.0,) * len(keys): []}
    for row in correct:
        options = {}
        for labels in itertools.product((None, *"abcd"[: row.count(False)]), repeat=row.count(False)):
            wrong = iter(labels)
            answers = ["right" if verdict else next(wrong) for verdict in row]
            values = our_values([row], [answers])
            options[tuple(values[key] for key in keys)] = answers
        reached = {
            tuple(round(a + b, 9) for a, b in zip(total, added, strict=True)): [*rows, answers]
            for total, rows in reached.items()
            for added, answers in options.items()
        }
    goal = [len(correct) * wanted[key] for key in keys]
    found = [rows for total, rows in reached.items() if np.allclose(total, goal, atol=1e-6)]
    return found[0] if found else [[None] * len(row) for row in correct]


if __name__ == "__main__":
    sys.exit(main())
