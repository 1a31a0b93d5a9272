"""The task of the comparison has the properties it claims, and the page follows from the numbers.

Covered: solutions are correct except for slips, which only products have; words are single tokens; curves are read at
the common budget; verdicts follow the differences of paired seeds; the command line still loads its settings. Not
covered: the comparison itself, which takes an hour.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import compare_page
import compare_runs
import make_compare as task
import pytest
from make_arithmetic import evaluate, make_tokenizer

from megatron_entropy.rewards import load_verifier

REPOSITORY = Path(__file__).parents[2]
LINE = re.compile(r"(\d)([-+*])(\d)=(\d)((?: [a-z]+)*)")


def problems(count, slip):
    rng = random.Random(0)
    return [task.solve(task.draw_question(rng, task.OPERANDS), rng, slip=slip) for _ in range(count)]


@pytest.mark.parametrize("slip", [0.0, 0.75])
def test_only_products_slip_and_only_wait_repeats_a_step(slip):
    wrong = products = 0
    for problem in problems(500, slip):
        *lines, last = problem.solution.split("\n")
        value, rest = problem.question[0], problem.question[1:]
        for line in lines:
            left, sign, right, result, words = LINE.fullmatch(line).groups()
            assert (left, sign + right) == (value, rest[:2])
            is_wrong = int(result) != evaluate(int(left), sign, int(right))
            assert not is_wrong or sign == "*"
            products += sign == "*"
            wrong += is_wrong
            assert {f" {word}" for word in words.split()} <= set(task.WORDS)
            if not words.endswith(task.REDO):
                value, rest = result, rest[2:]
        assert rest == "" and last == f"#{value}"
        if not slip:
            assert load_verifier("final_marker")(problem.solution, problem.answer).correct
    assert abs(wrong / products - slip) < 0.06  # four standard errors of about 700 products


def test_words_are_single_tokens_and_answers_fit(tmp_path):
    tokenizer = make_tokenizer([task.ALPHABET + 20 * "".join(task.WORDS)], task.VOCAB_SIZE, tmp_path)
    assert all(len(tokenizer.encode(word)) == 1 for word in task.WORDS)
    lengths = [len(tokenizer.encode(problem.solution)) + 1 for problem in problems(3000, 0.75)]
    assert max(lengths) <= 72 and min(lengths) < 20  # compare.toml's limit


def test_files_hold_different_questions():
    files = task.make_problems({"eval": 50, "rl": 50, "sft": 200}, seed=1, slip=0.75)
    questions = [problem.question for file in files.values() for problem in file]
    assert len(set(questions)) == len(questions) == 300
    assert files == task.make_problems({"eval": 50, "rl": 50, "sft": 200}, seed=1, slip=0.75)


def write_run(folder, accuracies, entropies, tokens):
    folder.mkdir(parents=True)
    rows = [
        {"stage": "rl", "step": 5 * number, "eval/accuracy": accuracy, "eval/entropy": entropy, "eval/length": 30.0}
        | {f"eval/pass_at_{k}": accuracy for k in (1, 2, 4, 8)}
        | ({"rollout/tokens": tokens} if number else {})
        for number, (accuracy, entropy) in enumerate(zip(accuracies, entropies, strict=True))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "completed.json").write_text(json.dumps({"seconds": 60.0, "budget": 100}))
    return compare_runs.Curve.of_run(folder)


@pytest.fixture
def curves(tmp_path):
    grpo = {s: write_run(tmp_path / f"grpo{s}", [0.4, 0.6, 0.8], [0.5, 0.3, 0.2], 100) for s in (1, 2)}
    sent = {
        1: write_run(tmp_path / "sent1", [0.4, 0.5, 0.79], [0.5, 0.45, 0.4], 200),
        2: write_run(tmp_path / "sent2", [0.4, 0.5, 0.79], [0.5, 0.2, 0.1], 200),
    }
    return {"grpo": grpo, "sent": sent}


def test_curves_are_read_at_the_common_budget(curves):
    assert compare_page.final(curves, "grpo", 100, "accuracy") == {1: pytest.approx(0.6), 2: pytest.approx(0.6)}
    assert compare_page.final(curves, "sent", 100, "accuracy") == {1: pytest.approx(0.45), 2: pytest.approx(0.45)}
    assert compare_page.final(curves, "grpo", 150, "entropy")[1] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("budget", "relation", "quantity", "verdict"),
    [
        (100, "higher", "entropy", "yes"),  # +0.175 and +0.05
        (200, "higher", "entropy", "on average"),  # +0.25 and 0.0 at 0.45 and 0.2 against 0.2
        (200, "lower", "entropy", "no"),
        (100, "no lower", "accuracy", "no"),  # -15 points
        (400, "no lower", "accuracy", "yes"),  # -1 point
    ],
)
def test_verdicts_follow_paired_seeds(curves, budget, relation, quantity, verdict):
    assert compare_page.judge(compare_page.Check("sent", relation, quantity, "grpo"), curves, budget)[1] == verdict


def test_page_lists_the_methods_that_were_not_run(curves, tmp_path):
    compare_page.write_page(tmp_path / "page", curves, 100, "python tools/compare.py")
    text = (tmp_path / "page" / "README.md").read_text()
    assert "Not run: SFT, CurioSFT, DAPO" in text and "| not run" in text
    assert {path.name for path in (tmp_path / "page").iterdir()} >= {"rl.png", "results.json"}


def test_command_without_runs_writes_no_page(tmp_path):
    command = [
        sys.executable,
        REPOSITORY / "tools" / "compare.py",
        "--page-only",
        "--out",
        tmp_path,
        "--page",
        tmp_path,
    ]
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})
    assert list(tmp_path.iterdir()) == []
