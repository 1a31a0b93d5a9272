"""Verifiers grade as published, and a response that breaks its verifier changes no other grade.

Shown: the published test vectors of the DAPO and CER graders, the rules of `choice` and `final_marker`, symbolic
equivalence through the real math-verify, external verifiers, and the pool against verifiers that really hang, exit,
segfault and exhaust memory. Not shown: the accuracy of these graders on a benchmark.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_entropy.errors import ConfigError, Fault
from megatron_entropy.records import Grade
from megatron_entropy.rewards import VERIFIERS, RewardPool, check_verifier, load_verifier
from megatron_entropy.rewards.dapo import INVALID, normalise
from megatron_entropy.rewards.registry import INLINE

TESTS = Path(__file__).parent
REPOSITORY = TESTS.parents[1]


@pytest.fixture
def bad_pool(monkeypatch):
    """A pool with the verifier that misbehaves on demand."""
    monkeypatch.syspath_prepend(str(TESTS))
    with RewardPool(verifier="bad_verifiers:misbehave", workers=2, timeout=2.0) as pool:
        yield pool


@pytest.mark.parametrize(
    ("response", "correct"),
    [
        ("some steps\nAnswer: 12", True),
        (" 12", False),  # the branch wrote only what follows its prefix "Answer:"
        ("Answer: 12", True),
        (r"Answer: \boxed{12}", True),
        ("Answer: 3\nanswer : 12", True),  # the last one counts, in any case
        ("Answer: 12\nAnswer: 3", False),
        ("Answer: 12" + 300 * ".", False),  # beyond the last 300 characters
        ("Answer: x = 12 units", True),
        ("Answer: $12$.", True),
        # as published: these are misses of the release's scorer
        ("Answer: 12.", False),
        ("Answer: **12**", False),
        ("**Answer:** 12", False),
        ("Answer: 012", False),
        ("Answer: 12" + 300 * " ", False),
        (r"\boxed{12}", False),
    ],
)
def test_dapo_vectors(response, correct):
    assert load_verifier("dapo")(response, "12").correct is correct


def test_dapo_without_an_answer_extracts_invalid():
    assert load_verifier("dapo")("no idea", "12") == Grade(False, INVALID)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        (r"\frac12", r"\frac{1}{2}"),
        (r"\sqrt2", r"\sqrt{2}"),
        ("1,234", "1234"),
        (r"90^\circ", "90"),
        (r"\text{east}", "east"),
        (r"5\text{ cm}", "5"),
        ("a cat", "cat"),
        (r"the value $\frac{3}{4}$ holds", r"\frac{3}{4}"),
        ("(1, 2)", "(1,2)"),
    ],
)
def test_dapo_normal_forms(text, normal):
    assert normalise(text) == normal


@given(st.text(alphabet="0123456789 ,=$ab\\{}\n", max_size=40))
def test_dapo_normal_form_never_fails(text):
    assert "$" not in normalise(text)


@pytest.mark.parametrize(
    ("response", "answer", "correct"),
    [
        (r"a \boxed{3} b \boxed{ 42 }", "42", True),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
        (r"\boxed{42.0}", "42", False),
        ("none", "42", False),
        (r"\fbox{7}", "7", True),
        (r"\boxed{1} \fbox{7}", "7", False),  # \fbox only where there is no \boxed
        (r"\boxed{7} and \boxed{7", "7", False),  # the last box never closes
        (r"\boxed{}", "", True),
        # as published: equality of texts, a brace is a brace
        (r"\boxed{$42$}", "42", False),
        (r"\boxed 42", "42", False),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}", True),
        (r"\boxed{\left\{x\right.}", r"\left\{x\right.", False),
    ],
)
def test_boxed_vectors(response, answer, correct):
    assert load_verifier("boxed")(response, answer).correct is correct


@given(st.recursive(st.text(alphabet="ab1 ", max_size=4), lambda inner: inner.map(lambda text: "{" + text + "}")))
def test_boxed_matches_braces(content):
    grade = load_verifier("boxed")(rf"so \boxed{{1}} or \boxed{{{content}}}, done}}", content)
    assert grade == Grade(True, content.strip())


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("so the answer is (C).", "C"),
        ("Answer: C", "C"),
        (r"\boxed{C}", "C"),
        (r"\boxed{\text{C}}", "C"),
        (r"\boxed{\textbf{(C)}}", "C"),
        (r"\boxed{C. 12 apples}", "C"),
        (r"the answer is $\boxed{B}$", "B"),
        ("Final Answer: **D**", "D"),
        ("The answer is option C", "C"),
        (r"the correct answer is \textbf{(E)}", "E"),
        ("The answer is C because A is false", "C"),
        ("answer is\n\nB", "B"),
        ("Answer: C\nno, the answer is D", "D"),
        (r"the answer is A? no: \boxed{B}", "B"),
        (r"\boxed{B}, hence the answer is (A)", "A"),
        (r"the answer is (C), that is \boxed{12}", "C"),
        ("(C)", "C"),
        ("J.", "J"),
        ("Option C", "C"),
        ("The correct option is C", "C"),
        ("correct choice: (D)", "D"),
        ("Answer: (c)", "C"),
        (r"\boxed{\text{Option B}}", "B"),
        ("The answer is A because B is false", "A"),
        ("the answer is c", None),  # may be a variable
        ("the answer is I because", "I"),
        ("option trading", None),
        ("The answer is a bird", None),
        ("The answer is A bird", None),
        ("the answer is I think unclear", None),
        ("A and B are wrong; C may do", None),
        ("the answer is Cat", None),
        (r"\boxed{12}", None),
        ("", None),
    ],
)
def test_choice_takes_stated_answers_only(response, letter):
    assert load_verifier("choice")(response, "C") == Grade(letter == "C", letter)


@pytest.mark.parametrize("answer", ["C", "(C)", "c", r"\text{C}", "C."])
def test_choice_reads_the_truth_in_any_dress(answer):
    assert load_verifier("choice")("Answer: C", answer).correct is True


def test_choice_refuses_a_truth_that_is_no_letter():
    assert load_verifier("choice")("Answer: C", "12").correct is None


@pytest.mark.parametrize(
    ("response", "answer", "extracted"),
    [
        ("so 1,200 + 34\n#### 1,234", "1234", "1234"),
        ("3+3=6\n#6", "6", "6"),
        ("#### $42.00.", "42", "42"),
        ("#### +7", "steps\n#### 7", "7"),
        ("# heading\n#3 #5 ", "5", "5"),
        ("#### seven\nmore", "seven", "seven"),
        ("#### -0.50", "-.5", "-0.5"),
        ("#### 72 done", "72", "72"),
        ("#### $1,200. That is all", "1200", "1200"),
        ("#### 12 May", "12 May", "12 May"),
        ("#### **42**", "42", "**42**"),
        (r"#### \boxed{42}", "42", r"\boxed{42}"),
    ],
)
def test_final_marker_extracts(response, answer, extracted):
    assert load_verifier("final_marker")(response, answer).extracted == extracted


@pytest.mark.parametrize(("response", "answer"), [("6", "6"), ("####", ""), ("#7", "6"), ("#6 x", "6")])
def test_final_marker_refuses(response, answer):
    assert load_verifier("final_marker")(response, answer).correct is False


@pytest.mark.parametrize(
    ("response", "answer"), [(".5", "0.5"), ("-0", "0"), ("-0.0", "0"), ("007", "7"), ("-.50", "-0.5")]
)
def test_final_marker_compares_numbers(response, answer):
    assert load_verifier("final_marker")(f"#### {response}", answer) == Grade(True, answer)


@given(st.integers(-(10**9), 10**9))
def test_final_marker_ignores_thousands_commas(number):
    assert load_verifier("final_marker")(f"#### {number:,}", str(number)).correct is True


@given(st.sampled_from(sorted(INLINE)), st.text(max_size=200), st.text(max_size=20))
def test_inline_verifiers_never_raise(name, response, answer):
    assert isinstance(VERIFIERS[name](response, answer), Grade)


@pytest.mark.parametrize("name", sorted(INLINE))
@pytest.mark.parametrize("unit", ["\\boxed{", "answer is ", "#", "$", "\\text{", " ", "Answer:\n", "{", "1,"])
def test_inline_verifiers_take_linear_time(name, unit):
    started = time.process_time()
    VERIFIERS[name](unit * 100_000, "C")
    VERIFIERS[name]("C", unit * 100_000)
    VERIFIERS[name](unit * 1_000, unit * 1_000)
    assert time.process_time() - started < 2.0  # linear scans take 0.1 s; quadratic ones would take hours


@pytest.mark.parametrize(
    ("response", "answer", "correct"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", True),
        (r"thus $x = 2\sqrt{3}$", r"\sqrt{12}", True),
        (r"\boxed{x^2 - 1}", "$(x-1)(x+1)$", True),
        (r"\boxed{41}", "42", False),
        ("I do not know", "42", False),
        (r"first $7$, finally \boxed{42}", r"\boxed{42}", True),
        (r"it is $18.9$", r"\$18.90", True),  # a dollar sign, not LaTeX
        (r"\boxed{\$18}", r"\$18.90", False),
        (r"\boxed{12:00}", "12:00", True),  # the value of both, 12 / 0, is not a number
        (r"\boxed{\frac{1}{0}}", "1", False),
        (200_000 * "so x = 7. " + r"\boxed{42}", "42", True),
        (r"\boxed{42}" + 60_000 * " ", "42", False),  # beyond the last 50,000 characters
    ],
)
def test_math_verify_knows_mathematics(response, answer, correct):
    assert load_verifier("math_verify")(response, answer).correct is correct


@pytest.mark.parametrize(("response", "answer"), [(r"\boxed{12}", "12:00"), ("it is 12:00", "12:00")])
def test_math_verify_says_what_it_cannot_compare(response, answer):
    with pytest.raises(ValueError, match="cannot compare the response with the ground truth"):
        load_verifier("math_verify")(response, answer)


def test_math_verify_runs_in_workers():
    with RewardPool(verifier="math_verify", workers=1, timeout=20.0) as pool:
        grades = pool.grade([(r"\boxed{0.5}", r"\frac{1}{2}"), (r"\boxed{3}", "2"), (r"\boxed{3}", "")])
    assert [grade.correct for grade in grades] == [True, False, None]
    assert "ground truth" in (grades[2].error or "")


@pytest.mark.parametrize("name", sorted(VERIFIERS))
def test_every_verifier_survives_hostile_responses(name):
    """Ten megabytes, deep nesting, null bytes, a lone surrogate: a grade or an error, in little time."""
    if name == "reasoning_gym":
        pytest.importorskip("reasoning_gym", reason="the package reasoning-gym is not installed")
    responses = [10**7 * "1", 10**5 * r"\boxed{" + "1" + 10**5 * "}", "Answer: \0", "#### \ud800", 10**5 * "(" + "1"]
    with RewardPool(verifier=name, workers=1, timeout=2.0, budget=12.0) as pool:
        pool.grade([("1", "1")])
        started = time.monotonic()
        grades = pool.grade([(response, "1") for response in responses])
    assert time.monotonic() - started < 25.0
    assert all(grade.correct is not None or grade.error for grade in grades)


def test_a_used_up_budget_is_an_error_of_each_remaining_response(bad_pool, caplog):
    bad_pool.grade([("1", "1")])
    bad_pool.budget, bad_pool.timeout = 1.5, 60.0
    with caplog.at_level(logging.WARNING, logger="megatron_entropy"):
        started = time.monotonic()
        grades = bad_pool.grade([("1", "1"), *[("hang in compiled code", "")] * 99])
        assert time.monotonic() - started < 10.0
    assert grades == [Grade(True, "1")] + [Grade(None, error="budget")] * 99
    (record,) = caplog.records
    assert "99 of 100 responses were not graded within 1.5 s" in record.message and "reward.budget" in record.message
    assert not [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
    bad_pool.budget = 60.0
    assert bad_pool.grade([("2", "2")]) == [Grade(True, "2")]


def test_the_budget_grows_with_the_number_of_responses(bad_pool, monkeypatch):
    pairs = [(str(index), "") for index in range(300)]
    bad_pool.budget = 0.01
    assert "budget" in [grade.error for grade in bad_pool.grade(pairs)]
    monkeypatch.setattr("megatron_entropy.rewards.pool.BUDGET_RESPONSES", 0.05)  # 60 s
    assert {grade.error for grade in bad_pool.grade(pairs)} == {None}


def test_only_the_bad_responses_lose_their_grade(bad_pool):
    bad = {
        "hang": "timeout",
        "hang in compiled code": "timeout",
        "exit": "crash",
        "segfault": "crash",
        "memory": "crash",
        "sys.exit": "crash",
        "wrong type": "TypeError: the verifier returned str, not a Grade",
        "wrong grade": "TypeError: the verifier returned a Grade with wrong types (correct: bool, extracted: str)",
    }
    responses = [word for index, name in enumerate(bad) for word in (f"good {index}", name)] + ["last"]
    grades = bad_pool.grade([(response, response) for response in responses])
    expected = [
        Grade(None, error=bad[response]) if response in bad else Grade(True, response) for response in responses
    ]
    assert grades == expected


def test_pool_continues_after_a_crash_of_every_worker(bad_pool):
    assert [grade.error for grade in bad_pool.grade([("exit", "")] * 5)] == ["crash"] * 5
    assert bad_pool.grade([("1", "1")]) == [Grade(True, "1")]


@pytest.mark.parametrize("moment", ["loading", "idle", "grading"])
def test_a_killed_worker_changes_no_grade(moment, monkeypatch):
    """As by the out-of-memory killer: the signal comes at a moment that does not depend on the responses."""

    def worker(seconds):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for child in psutil.Process().children():
                if "spawn_main" in " ".join(child.cmdline()):
                    return child
        raise AssertionError("no worker")

    def kill_while(delay):
        victim = worker(20)
        time.sleep(delay)
        victim.kill()

    monkeypatch.syspath_prepend(str(TESTS))
    with RewardPool(verifier="bad_verifiers:misbehave", workers=1, timeout=20.0) as pool:
        if moment != "loading":
            assert pool.grade([("1", "1")]) == [Grade(True, "1")]
        if moment == "idle":
            kill_while(0.0)
            time.sleep(0.5)
        killer = threading.Thread(target=kill_while, args=(0.01 if moment == "loading" else 0.5,))
        if moment != "idle":
            killer.start()
        assert pool.grade([("slow", "slow"), ("2", "3")]) == [Grade(True, "slow"), Grade(False, "2")]
        assert not killer.is_alive()


def test_a_response_on_which_every_pool_breaks_down_is_a_crash(monkeypatch):
    pool = RewardPool(verifier="math_verify")
    attempts = []

    def attempt(pairs, grades, suspects, deadline):
        attempts.append(len(grades))
        if grades:
            grades[1] = Grade(True)

    monkeypatch.setattr(pool, "_attempt", attempt)
    monkeypatch.setattr(pool, "_running_pool", lambda: None)
    assert pool.grade([("1", "1"), ("2", "2")]) == [Grade(None, error="crash"), Grade(True)]
    assert attempts == [0, 0, 0, 0, 0, 1]


def test_pool_shortens_exceptions_to_one_line(bad_pool):
    (grade,) = bad_pool.grade([("raise", "")])
    assert grade.correct is None and grade.error is not None
    assert grade.error.startswith("ValueError: two lines xxx") and len(grade.error) <= 120


def test_verifiers_may_return_a_bool(bad_pool):
    assert bad_pool.grade([("bool", "")]) == [Grade(True)]


def test_grades_have_the_order_of_their_responses(bad_pool):
    grades = bad_pool.grade([(str(index), str(index)) for index in range(300)])
    assert [grade.extracted for grade in grades] == [str(index) for index in range(300)]


def test_grading_nothing_starts_no_workers():
    pool = RewardPool(verifier="math_verify")
    assert pool.grade([]) == [] and pool._pool is None


def test_pool_restarts_after_close(bad_pool):
    bad_pool.grade([("1", "1")])
    bad_pool.close()
    assert bad_pool.grade([("2", "2")]) == [Grade(True, "2")]


def test_pool_that_cannot_start_is_a_fault(monkeypatch, tmp_path):
    module = tmp_path / "parent_only.py"
    module.write_text("def verify(response, answer):\n    return True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with RewardPool(verifier="parent_only:verify", workers=1) as pool:
        module.write_text("import no_such_module_anywhere\n")
        with pytest.raises(Fault, match="parent_only:verify"):
            pool.grade([("1", "1")])


def test_workers_import_neither_torch_nor_the_main_script(tmp_path):
    """A script with torch loaded and no `__main__` guard, started as `python -m`, as torchrun does."""
    (tmp_path / "started.py").write_text(
        "import sys\n"
        "sys.modules['torch'] = sys  # stands for any slow import of the caller\n"
        "print('main runs')\n"
        "from megatron_entropy.rewards import RewardPool\n"
        "with RewardPool(verifier='bad_verifiers:modules', workers=1) as pool:\n"
        "    names = ['torch', 'started', 'numpy']\n"
        "    print([grade.correct for grade in pool.grade([(name, '') for name in names])])\n"
    )
    environment = {"PYTHONPATH": f"{REPOSITORY}:{TESTS}:{tmp_path}", "PATH": ""}
    for command in (["-m", "started"], [str(tmp_path / "started.py")]):
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=200
        )
        assert done.stdout.splitlines() == ["main runs", "[False, False, True]"], done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("math", f"use one of {', '.join(VERIFIERS)}"),
        ("no_such_module:verify", "no_such_module"),
        ("megatron_entropy.records:no_such_function", "no_such_function"),
        ("megatron_entropy.rewards.dapo:TAIL", "not a function"),
        ("bad_verifiers:one_argument", "must be callable as .response, answer."),
        ("broken_at_import:grade", "cannot be imported"),
        ("exits_at_import:grade", "cannot be imported"),
    ],
)
def test_unknown_verifiers_are_named(name, message, monkeypatch, tmp_path):
    (tmp_path / "broken_at_import.py").write_text("def grade(:")
    (tmp_path / "exits_at_import.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(TESTS))
    with pytest.raises(ConfigError, match=message):
        RewardPool(verifier=name)


def test_a_verifier_may_come_from_another_package(tmp_path, monkeypatch):
    """By its module, and by the entry point of an installed package; both run in workers."""
    (tmp_path / "their_verifier.py").write_text("def verify(response, answer):\n    return response == answer\n")
    installed = tmp_path / "theirs-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[megatron_entropy.verifiers]\ntheirs = their_verifier:verify\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("their_verifier:verify", "theirs"):
        with RewardPool(verifier=name, workers=1) as pool:
            assert pool.grade([("1", "1"), ("1", "2")]) == [Grade(True), Grade(False)]


@pytest.mark.parametrize("name", [*sorted(VERIFIERS), "bad_verifiers:misbehave", "bad_verifiers:needs_json"])
def test_usable_verifiers_are_accepted(name, monkeypatch):
    monkeypatch.syspath_prepend(str(TESTS))
    check_verifier(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:grade", "cannot be imported"),
        ("bad_verifiers:one_argument", "must be callable"),
        ("bad_verifiers:hangs", "timeout"),
        ("bad_verifiers:exits", "crash"),
        ("bad_verifiers:returns_text", "returned str"),
        ("bad_verifiers:misspelled", "NameError"),
    ],
)
def test_unusable_verifiers_are_found_before_a_run(name, message, monkeypatch):
    monkeypatch.syspath_prepend(str(TESTS))
    monkeypatch.setattr("megatron_entropy.rewards.pool.CHECK_SECONDS", 1.0)
    with pytest.raises(ConfigError, match=message):
        check_verifier(name)
