"""The graders of benchmarks agree with the code they reproduce, and hostile answers end quickly.

Shown: cases of each released grader with its quirks, equality with the released regular expressions on random texts,
ground truths that cannot be read, hostile answers, and `tools/check_graders.py` on graded rows. Not shown: published
accuracies, which need the downloaded outputs (`tools/check_graders.py FILE`).
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import check_graders
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_entropy.rewards import VERIFIERS
from megatron_entropy.rewards.registry import INLINE
from megatron_entropy.rewards.worker import call_verifier

GRADERS = ("gsm8k_strict", "gsm8k_flexible", "multiple_choice", "gpqa", "opencompass_v2", "minerva")


def boxed(answer: str) -> str:
    return rf"So the result is $\boxed{{{answer}}}$."


@pytest.mark.parametrize(
    ("response", "answer", "strict", "flexible"),
    [
        ("3 + 4 = 7\n#### 7", "7", True, True),
        ("#### 1,234", "so\n#### 1234", True, True),
        ("#### 1234.", "#### 1,234", True, True),
        ("#### 7 apples and 3 pears", "7", True, False),
        ("#### 7\n#### 8", "7", True, False),  # the first marker, the last number
        ("the answer is $7", "7", False, True),
        ("####7", "7", False, True),
        ("#### $7", "7", False, True),
        ("#### 7.0", "7", False, False),  # texts are compared
        ("#### -7", "-7", True, True),
        ("seven", "7", False, False),
        ("it is 7 $$", "7", False, False),  # `$$` matches the pattern of a number
        ("7...", "7", False, False),
        ("A: 7", "7", False, True),
    ],
)
def test_gsm8k(response, answer, strict, flexible):
    assert VERIFIERS["gsm8k_strict"](response, answer).correct is strict
    assert VERIFIERS["gsm8k_flexible"](response, answer).correct is flexible


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("The answer is (C).", "C"),
        ("The answer is C or the answer is D", "C"),  # stage 1 takes the first
        ("Answer: B\nThe answer is C", "C"),
        ("The answer is A bird", "A"),
        ("Answer: B and answer: D\nAnswer: A", "D"),  # stage 2: the last one of the first line
        ("answer: Answer: B", "B"),
        ("Answer:\n\nB", "B"),
        ("Answer: Because", "B"),
        ("ANSWER: C", "C"),  # stage 3
        ("**Answer**: (C)", "C"),
        ("Option B, not D", "D"),
        ("Bad A_1 F", "F"),
        ("no letter K", None),
        ("", None),
    ],
)
def test_multiple_choice(response, letter):
    grade = VERIFIERS["multiple_choice"](response, "C")
    assert (grade.correct, grade.extracted) == (letter == "C", letter)


PIECES = ("answer", "Answer", ":", " ", "\n", "A", "B", "J", "K", "answer is ", "(", "x", "é", "_", "Answer:", "#### ")


@given(st.lists(st.sampled_from((*PIECES, "1", ",", ".", "$", "-")), max_size=14).map("".join))
def test_extraction_equals_the_released_regular_expressions(text):
    """Sources: MMLU-Pro's `evaluate_from_local.py`, lm-evaluation-harness' `gsm8k.yaml`."""
    stages = (
        re.search(r"answer is \(?([A-J])\)?", text),
        re.search(r".*[aA]nswer:\s*([A-J])", text),
        re.search(r"\b([A-J])\b(?!.*\b[A-J]\b)", text, re.DOTALL),
    )
    letter = next((found[1] for found in stages if found), None)
    assert VERIFIERS["multiple_choice"](text, "A").extracted == letter

    def plain(number):
        for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"):
            number = re.sub(ignored, "", number)
        return number or None

    strict = re.findall(r"#### (\-?[0-9\.\,]+)", text)
    assert VERIFIERS["gsm8k_strict"](text, "1").extracted == (plain(strict[0]) if strict else None)
    flexible = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    assert VERIFIERS["gsm8k_flexible"](text, "1").extracted == (plain("".join(flexible[-1])) if flexible else None)


@pytest.mark.parametrize(
    ("response", "letter"),
    [("ANSWER: C", "C"), ("answer : $C$", "C"), ("Answer: B\nAnswer: C", "B"), ("Answer: (C)", None), ("C", None)],
)
def test_gpqa(response, letter):
    grade = VERIFIERS["gpqa"](response, "C")
    assert (grade.correct, grade.extracted) == (letter == "C", letter)


@pytest.mark.parametrize(
    ("response", "answer", "correct"),
    [
        (boxed("42"), "42", True),
        (boxed("1") + boxed("42"), "42", True),
        (boxed("{42}"), "42", True),
        (boxed("41") + r" or \boxed{42", "41", True),  # the last box is not closed: the first sentence
        (boxed("x=42"), "42", True),
        (boxed(r"42.00"), "42", True),
        (boxed(r"\dfrac12"), r"\frac{1}{2}", True),
        (boxed("1/2"), r"\frac{1}{2}", True),
        (boxed("0.5"), r"\frac{1}{2}", False),  # version 1 has this rule, version 2 has not
        (boxed(r"\sqrt3"), r"\sqrt{3}", True),
        (boxed(r"42\text{ cm}"), "42", True),
        (boxed(r"42^\circ"), "42", True),
        (boxed("1,000"), "1000", True),
        (boxed(r"\text{(C)}"), "C", True),
        (boxed(r"\left( 1, 2 \right)"), "(1,2)", True),
        (boxed("2+1"), "1+2", False),  # nothing symbolic
        (boxed(r"\frac{2}{4}"), r"\frac{1}{2}", False),
        ("First. The final answer is $42$. Then 43.", "42", True),
        ("The answer is 42. The answer is 43.", "42", True),
        ("The answer is 3.5", "3.5", False),  # a full stop ends the sentence
        ("42", "42", True),  # without a phrase, the first sentence
        (boxed(""), "42", False),
        (boxed("42"), boxed("42"), True),
        (r"\boxed 42", "42", False),
        (r"\fbox{42}", "42", False),
    ],
)
def test_opencompass_v2(response, answer, correct):
    """Cases whose verdicts are those of OpenCompass 0.5.4."""
    assert VERIFIERS["opencompass_v2"](response, answer).correct is correct


@pytest.mark.parametrize(
    ("response", "answer", "correct"),
    [
        (boxed(r"4.5 \times 10^{33}"), "4.5e33", True),
        (boxed("4.5e33"), "4.5e33", True),
        (boxed(r"4.6 \times 10^{33}"), "4.5e33", False),
        (boxed(r"2 \times 10^{-19}"), "1e-19", False),
        (boxed(r"\arcsin{\left(\frac{1}{1.3}\right)}"), "np.arcsin(10/13)", True),
        (boxed("0.8776"), "np.arcsin(10/13)", True),
        (boxed(r"-\frac{1}{3}"), "-1./3", True),
        (boxed("-0.33333"), "-1./3", True),
        (boxed("-0.33"), "-1./3", False),
        (boxed("1.00009"), "1", True),  # relative tolerance
        (boxed("1.0002"), "1", False),
        (boxed(r"12\%"), "0.12", True),  # percentages and fractions
        (boxed("0.12"), "12", True),
        (boxed("120"), "12", False),
        (boxed(r"1.6 \mathrm{~cm}"), r"s = \boxed{1.6} \mathrm{~cm}", True),  # units
        (boxed(r"300\ \mathrm{km\,s^{-1}}"), "300", True),
        (boxed("300 km/s"), "300", True),
        (boxed(r"4.5\times10^{33}\, \text{erg/s}"), "4.5e33", True),
        (boxed("5 x"), "5", False),
        (boxed(r"\frac{37}{4}"), r"\frac{37}{4} m", False),
        (boxed(r"I(0) e^{-t/(RC)}"), r"I(0) e^{-\frac{t}{R C}}", True),
        (boxed(r"\sqrt{\frac{2 M g H}{M + m/2}}"), r"\sqrt{\frac{2 g H}{1 + \frac{m}{2 M}}}", True),
        (boxed(r"\frac{\dot{x}_0}{\omega}"), r"\dot{x}_{0} / \omega", True),
        (boxed("x=5"), "5", True),
        (boxed("(1, 2.00001)"), "(1,2)", True),
        (boxed(r"\frac{\pi}{2}"), "1.5708", True),
        (boxed("E = c^2 m"), "E=m c^{2}", True),
        ("The final answer is 5. I hope it is correct.", "5", True),
        ("from 3 to 1,234", "1234", True),  # the last number
        ("none", "5", False),
        (boxed("9**9**9"), "5", False),
        (boxed("__import__('os')"), "5", False),
        (boxed("True"), "1", False),
    ],
)
def test_minerva(response, answer, correct):
    assert VERIFIERS["minerva"](response, answer).correct is correct


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("gsm8k_strict", "A: eighteen"),
        ("gsm8k_flexible", ""),
        ("multiple_choice", "K"),
        ("multiple_choice", "AB"),
        ("gpqa", "3"),
        ("opencompass_v2", " "),
        ("opencompass_v2", r"no closing \boxed{1"),
        ("minerva", ""),
        ("minerva", r"\frac{1}{"),
        ("minerva", "x" * 2000),
    ],
)
def test_unreadable_ground_truth_is_an_error(name, answer):
    grade = call_verifier(VERIFIERS[name], boxed("1") + " #### 1", answer)
    assert grade.correct is None
    assert grade.error


HOSTILE = {
    "brackets": "(" * 100_000,
    "open boxes": r"\boxed{" * 100_000,
    "nested boxes": r"\boxed{" * 50_000 + "1" + "}" * 50_000,
    "fractions": r"\boxed{" + r"\frac{1}{" * 20_000 + "1" + "}" * 20_001,
    "fractions within the limits": r"\boxed{" + r"\frac{1}{" * 90 + "1" + "}" * 91,
    "a million digits": "1" * 1_000_000,
    "a million digits in a box": r"\boxed{" + "1" * 1_000_000 + "}",
    "NUL": "\0" * 100_000 + "\\boxed{\0 1}",
    "tower of powers": r"\boxed{9**9**9} \boxed{9^{9^{9^{9}}}}",
    "factorials": r"\boxed{9" + "!" * 900 + "}",
    "chain of quotients": r"\boxed{" + "x/" * 490 + "1}",
    "signs": r"\boxed{" + "-" * 990 + "1}",
    "units": r"\boxed{1 " + "m" * 900 + "?}",
    "text commands": r"\boxed{" + r"\text{(" * 700 + "}",
    "answers": "answer: " * 100_000,
    "blanks": "ANSWER: Answer:" + " " * 500_000,
    "markers": "#### " * 100_000,
    "dollars": "final answer is " + "$" * 100_000,
    "full stops": "." * 300_000,
    "lone surrogate": "\\boxed{\ud800}",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_answers_end_quickly(text):
    for name in GRADERS:
        start = time.process_time()
        grade = call_verifier(VERIFIERS[name], text, "C" if name in ("gpqa", "multiple_choice") else "42")
        assert grade.correct is False, (name, grade)
        assert time.process_time() - start < 3.0, name  # each takes below 0.5 s here


def test_only_graders_of_linear_time_run_in_the_callers_process():
    assert set(GRADERS) - INLINE == {"minerva"}


def test_the_page_of_graders_lists_every_verifier():
    page = (Path(__file__).parents[2] / "docs" / "graders.md").read_text()
    table = page[page.index("## Which one") : page.index("## What each one misses")]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(VERIFIERS)


def test_check_graders_reads_its_files(tmp_path, capsys):
    row = {"question_id": 3, "options": ["a", "b"], "answer": "B"}
    outputs = [
        {**row, "pred": "B", "model_outputs": "The answer is (B)."},
        {**row, "pred": None, "model_outputs": "none of them"},
        {**row, "pred": "A", "model_outputs": "Answer: B"},  # published with another extraction
    ]
    (tmp_path / "mmlu_pro.json").write_text(json.dumps(outputs))
    solution = {"question": "?", "ground_truth": "A B: 2\nA: 1,200", "7b": {"solution": "A: 1200", "is_correct": True}}
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps(solution) + "\n")
    samples = {"filter": "flexible-extract", "resps": [["so 7"]], "target": "#### 7", "exact_match": 1.0}
    (tmp_path / "samples.jsonl").write_text(json.dumps(samples) + "\n")
    counts = {}
    for name in ("mmlu_pro.json", "gsm8k.jsonl", "samples.jsonl"):
        cases = check_graders.read_cases(tmp_path / name)
        counts[name] = len(cases)
        agrees = [check_graders.check([case]) for case in cases]
        assert agrees == [case.row != "mmlu_pro.json:2" for case in cases]
    assert counts == {"mmlu_pro.json": 3, "gsm8k.jsonl": 2, "samples.jsonl": 1}
    assert "mmlu_pro.json:2: published False, extracted 'A'; here Grade(correct=True" in capsys.readouterr().out


def test_check_graders_refuses_other_columns(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "1+1"}\n')
    with pytest.raises(check_graders.DataError, match="has other columns"):
        check_graders.read_cases(path)
