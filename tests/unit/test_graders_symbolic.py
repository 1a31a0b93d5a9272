r"""The symbolic graders agree with the code they reproduce, and hostile answers end in bounded time.

Shown: pairs graded as by OlympiadBench's, Qwen2.5-Math's and oat's code (their quirks and the places where we leave
them), the reader and the comparison of LaTeX expressions, ground truths that cannot be read, hostile answers. Not
shown: agreement on downloaded outputs (`tools/check_graders.py FILE`).
"""

from __future__ import annotations

import json
import time

import pytest

from megatron_entropy.rewards import VERIFIERS
from megatron_entropy.rewards.latex import UnreadableError, read
from megatron_entropy.rewards.numeric import equation_ratio, is_close, is_equal
from megatron_entropy.rewards.oat import _verified
from megatron_entropy.rewards.registry import INLINE
from megatron_entropy.rewards.worker import call_verifier

SYMBOLIC = ("olympiad", "math_equal", "oat", "curiosft")


def truth(*answers: str, **fields: object) -> str:
    return json.dumps({"final_answer": answers, **fields})


@pytest.mark.parametrize(
    ("left", "right", "equal"),
    [
        ("1/2 x", r"\frac{1}{2x}", True),  # the grammar of sympy: a product below the slash
        ("x^10", "x^{10}", True),
        ("v^2_0", "v^2", True),  # sympy drops this subscript
        ("v_0^2", "v^2", False),
        ("a_{n}'", "a_n'", True),
        ("a'", "a", False),
        (r"T_{\mathrm{s}}", "T_s", True),
        ("N", "n", False),
        ("1 000 000.5", "1,000,000.5", True),
        ("2 5", "25", True),  # as for sympy
        (r"\sqrt2\sqrt{x}", r"\sqrt{x}2^{1/2}", True),
        (r"\sin 2x", r"2\sin x\cos x", True),
        (r"\sin^{-1} x", r"\arcsin x", True),
        (r"\log_2 8", "3", True),
        (r"\lg 100 + \ln e", "3", True),
        (r"\binom{n}{k}", r"\frac{n!}{k!(n-k)!}", True),
        ("n(n+1)", "n^2+n", True),  # a product, since n is a variable
        ("n(n+1)^2", "n^3+2n^2+n", True),
        ("k(d-k)!", "(d-k)!k", True),
        ("f(x+1)", "f(x)", False),
        ("f(1+x)", "f(x+1)", True),
        (r"\sqrt{x^2}", "x", False),
        ("|x|", "x", False),
        ("||x|-1|", "|1-|x||", True),
        (r"\lfloor n/2\rfloor", "n/2", False),
        (r"\lfloor n/2\rfloor", r"\lfloor \frac{n}{2}\rfloor", True),
        ("100!", "100!+1", False),
        ("x^{9999}", "x^{9998}x", True),
        (r"2\pi", "6.283185307179586", True),
        ("3n+0.0005", "3n", False),
        ("k > 2", "2 < k", True),
        ("k > 2", "k < 2", False),
        ("1/0", "1/0+1", False),  # without a value, nothing but the same expression is equal
        ("10^{10^{10}}", "10^{10^{10}}+1", False),
    ],
)
def test_expressions(left, right, equal):
    assert is_equal(left, right, tolerance=1e-8) is equal
    assert is_equal(right, left, tolerance=1e-8) is equal


@pytest.mark.parametrize(
    "text",
    ["", "1+", "(1", "n-2)(n+5", "5 | 3", "t(0,4]", r"\{1", "x_", r"\frac{1}", "a||b", "\0", r"\int_0^1 x", "1;2", "é"]
    + [41 * "(" + "1" + 41 * ")", 401 * "1", 1001 * "x", 90 * r"\sin" + " x"],
)
def test_a_text_that_is_not_read_to_its_end_is_unreadable(text):
    with pytest.raises(UnreadableError, match="cannot read the expression"):
        read(text)


def test_offset_relative_tolerance_and_equations():
    assert is_equal("3n+0.0005", "3n", tolerance=0, offset=1e-3)
    assert not is_equal("3n+0.0005m", "3n", tolerance=0, offset=1e-3)
    assert is_close("1.00009", "1", relative=1e-4)
    assert not is_close("1.0002", "1", relative=1e-4)
    assert not is_close("3.14159", r"\pi", relative=1e-4)  # a letter, as for sympy's reader
    assert equation_ratio("x^2+y^2=1", "2-2x^2=2y^2") == pytest.approx(-0.5)
    assert equation_ratio("x^2+y^2=1", "x^2-y^2=1") is None
    assert equation_ratio("0=0", "x=1") is None


@pytest.mark.parametrize(
    ("answer", "gold", "correct"),
    [
        # as OlympiadBench's auto_scoring_judge.py
        ("y=3", "3", True),
        ("7", "y=3", False),
        ("b_{n}=3n-1", "b_n = 3 n -1", True),
        ("2x-y=1", "4x-2y=2", True),  # an integer multiple
        ("2x-y=1", "3x-1.5y=1.5", False),  # not an integer
        (r"\frac{x}{3y}+\frac{2}{3y}", r"g(x,y)=\frac{x+2}{3y}", True),
        (r"x \in (0,1]\cup [3,+\infty)", r"\left(0, 1\right] \cup [3,+\infty)", True),
        ("(0,1)", "(0,1]", False),
        (r"[\frac{-6}{3}, 0.25]", r"[-2,\frac{1}{4}]", True),
        ("(4,1),(2,3)", "(2,3),(4,1)", True),
        ("(3,2),(4,1)", "(2,3),(4,1)", False),
        (r"z=\pm\sqrt{7}", r"\sqrt{7},-\sqrt{7}", True),
        (r"\pm 2", "2", False),
        ("25%", "0.25", True),
        ("2500", "25", True),  # any number also counts as a percentage
        (r"\frac{1}{4}N", "0.25N", True),
        ("0.25", "0.25N", False),
        ("3.5 \\times 10^{3}", "3500", True),
        ("10^{8}", "10^{10^{10^{9}}}", False),
        ("3,3", "3,4", False),
        ("3,4,4", "3,4", False),
        ("-2,-2", "-2,-2", True),
        ("yes", "yes", True),
        ("no", "yes", False),
        ("能", "能", True),
        ("不能", "能", False),
        # where the released judge errs
        ("(2,3,4)", "(2,3)", False),
        ("(n-2)(n+5)", "(n-2)(n+1)", False),
        ("5!", "5", False),
        (".5", "0.5", True),
        ("n^2-n", "n(n-1)", True),
        (r"90^{\circ}", "90", True),
        (r"45\%", "0.45", True),
        ("1,234", "1234", True),
        (r"\{4, 2\}", "2,4", True),
        (r"2 \text{ and } 4", "2,4", True),
        (r"(-\infty,2)\cup\{3\}", r"(-\infty, 2) \cup \{3\}", True),
        ("3,5", "$3,$5$", True),  # a row of the benchmark has an odd number of dollar signs
    ],
)
def test_olympiad_pairs(answer, gold, correct):
    for response in (answer, rf"\boxed{{{answer}}}", rf"So the final answer is ${answer}$."):
        assert VERIFIERS["olympiad"](response, gold).correct is correct, response
        assert VERIFIERS["olympiad"](response, truth(gold)).correct is correct, response


@pytest.mark.parametrize(
    ("response", "gold", "correct"),
    [
        ("0.42", truth(r"\cos(1.137)", error="1e-3"), True),
        ("0.42", truth(r"\cos(1.137)", error="1e-5"), False),
        ("2, 0.31", truth("0.3,2.5", error="0.02,0.6"), True),  # each answer has its own tolerance
        ("2, 0.31", truth("0.3,2.5", error=",0.6"), False),
        ("(1.05,2)", truth("(1,2)", error="0.1", answer_type="Tuple"), False),  # as released: no tolerance
        ("45 minutes", truth("45", unit="minute"), True),
        (r"45 \text{ min}", truth("45", unit="minute"), True),
        (r"166\,\mathrm{cm}^2", truth("$166$", unit="$cm^2$"), True),
        ("166 cm", truth("$166$", unit="$cm^2$"), False),
        (r"\frac{600}{7} km/h", truth(r"$\frac{600}{7}$", unit="km/h"), True),
        ("45 minutes", truth("45"), False),
        ("(0,4]", truth("$t(0,4]$", answer_type="Interval"), True),
        ("$b=3$ and $c=7$", truth("$3$,$7$", is_multiple_answer=True), True),
        (r"First \boxed{9}. Then $b=\boxed{3}$, so $c=\boxed{7}$.", truth("3,7"), True),
        (r"Case 1. \boxed{3}. Case 2. \boxed{7}.", truth("3,7"), True),  # all boxes, as released
        (r"\boxed{9} is wrong. It is \boxed{3}", "3", True),
        (r"\boxed{9} or \boxed{3}", "3", False),  # a choice of answers
        (r"It is \boxed{3", "3", False),  # cut
        (r"\boxed{\boxed{3}}", "3", True),
        ("For $x>0$ the answer is\n$x = 3$.", "3", True),
        ("The answer is 3.", "3", True),
        ("I do not know", "3", False),
        ("", "3", False),
    ],
)
def test_olympiad_rows(response, gold, correct):
    assert VERIFIERS["olympiad"](response, gold).correct is correct


@pytest.mark.parametrize(
    "gold",
    ["", "$$", '{"final_answer": ["2"', "{}", truth(), truth("1", error="a"), truth("1,2", error="1,1,1")]
    + ['{"final_answer": "2"}', truth("1", unit=3), truth("1", error="nan"), truth(101 * "1,"), truth(r"\int x dx")]
    + ["$a+1$, where $a$ is prime", "1" * 6000, "[" * 100_000, '{"final_answer":' + "[" * 4000],
)
def test_olympiad_ground_truths_that_cannot_be_read_are_errors(gold):
    grade = call_verifier(VERIFIERS["olympiad"], r"\boxed{77}", gold)
    assert grade.correct is None and (grade.error or "").startswith("ValueError"), grade


def test_prose_is_right_by_its_own_text():
    prose = "$g(x)=a x$, where $a$ is an integer"
    assert VERIFIERS["olympiad"](rf"\boxed{{{prose}}}", prose).correct


def test_pairing_several_answers_is_not_factorial():
    gold = ",".join(str(k) for k in range(100))
    answers = ",".join(f"{k}.0" for k in reversed(range(100)))
    start = time.monotonic()
    assert VERIFIERS["olympiad"](answers, gold).correct
    assert not VERIFIERS["olympiad"](answers.replace("50.0", "500"), gold).correct
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    ("response", "gold", "correct"),
    [
        # as Qwen2.5-Math's grader.py and parser.py
        (r"\boxed{0.0833333}", r"\frac{1}{12}", True),
        (r"\boxed{(1,4.5)}", r"(1,\frac{9}{2})", True),
        (r"\boxed{[1,2]}", "(1,2)", True),
        (r"\boxed{\frac{x}{7}+\frac{2}{7}}", r"\frac{x+2}{7}", True),
        (r"\boxed{1-\sin^2(y)}", r"\cos^2(y)", True),
        (r"\boxed{\sec^2(y)}", r"\tan^2(y)+1", False),  # "sec" is a unit
        (r"\boxed{10\%}", "0.1", True),
        (r"\boxed{50}", "0.5", True),
        (r"\boxed{10,001}", "10000", True),  # within 1e-4
        (r"\boxed{x=5}", "5", True),
        (r"\boxed{y=2x}", "2x-y=0", True),
        (r"\boxed{\text{twenty-five}}", "25", True),
        (r"\boxed{3 \text{ cm}}", "3", True),
        (r"\boxed{3\, m}", "3", True),
        (r"\boxed{007}", "7", True),
        (r"\boxed{\dfrac34}", r"\frac{3}{4}", True),
        (r"\boxed{\begin{bmatrix}0.5\\2\end{bmatrix}}", r"\begin{pmatrix}1/2\\2\end{pmatrix}", True),
        (r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}", r"\begin{pmatrix}1&2&3\\4\end{pmatrix}", False),
        (r"\boxed{(-\infty,0)\cup(2,3)}", r"(-\infty,0)\cup(2,4)", False),
        ("The answer is 12 $. The end", "12", False),
        ("so we get 11, and then 12", "12", True),
        (r"\boxed{The answer: (C)}", "C", True),
        (r"\boxed{12", "12", True),
        ("The final answer is $12$. I hope it is correct.", "12", True),
        ("nothing", "12", False),
        # where the source errs
        (r"\boxed{\text{west}}", r"\text{east}", False),
        (r"\boxed{x<5}", "x>5", False),
        (r"\boxed{3.14159}", r"\pi", False),
    ],
)
def test_math_equal(response, gold, correct):
    assert VERIFIERS["math_equal"](response, gold).correct is correct
    assert VERIFIERS["math_equal"](response, rf"Hence $\boxed{{{gold}}}$.").correct is correct


@pytest.mark.parametrize(
    ("answer", "gold", "correct"),
    [
        (r"\frac12", r"\dfrac{1}{2}", True),
        ("0.5", r"\frac{1}{2}", True),
        (r"\frac{2}{4}", "1/2", False),  # fractions must be the same ...
        ("k=3", "3", True),
        (r"3 \text{ cm}", "3", True),
        (r"\text{Evelyn}", "evelyn", True),
        ("3 million", "3*10^6", True),
        ("1,234", "1234", True),
        (r"(1,0.5x)", "(1, x/2)", True),
        ("[1,2]", "(1,2)", False),
        ("2x+1", "1+2x", True),
        ("3.0", "3", True),
        ("2+1", "3", False),  # ... and integers must be integers
        (r"\lfloor x \rfloor", "x", False),
        (r"\frac{1-p}{3}", r"1-\frac{p}{3}", False),
    ],
)
def test_oat_without_math_verify(answer, gold, correct, monkeypatch):
    monkeypatch.setattr("megatron_entropy.rewards.oat._verified", lambda found, truth: False)
    assert VERIFIERS["oat"](rf"so \boxed{{{answer}}}", gold).correct is correct


def test_oat_needs_a_box_and_curiosft_takes_the_better_of_both():
    assert not VERIFIERS["oat"]("so it is 3", "3").correct
    assert VERIFIERS["curiosft"]("so it is 3", "3").correct
    assert VERIFIERS["oat"](r"\boxed{\text{Evelyn}}", "evelyn").correct
    assert VERIFIERS["curiosft"](r"\boxed{\text{Evelyn}}", "evelyn").correct
    assert VERIFIERS["oat"](r"\boxed{2+1}", "3").correct  # math-verify
    assert not VERIFIERS["curiosft"](r"\boxed{4}", "3").correct
    assert not _verified("(" * 16 + "3" + ")" * 16, "3")


@pytest.mark.parametrize("grader", ["math_equal", "oat", "curiosft"])
@pytest.mark.parametrize("gold", ["", " ", r"\boxed{}", "1" * 6000])
def test_unreadable_ground_truths_are_errors(grader, gold):
    grade = call_verifier(VERIFIERS[grader], r"\boxed{77}", gold)
    assert grade.correct is None and (grade.error or "").startswith("ValueError"), grade


BOMBS = {
    "brackets": "(" * 100_000 + ")" * 100_000,
    "braces": "{" * 100_000,
    "bars": "|" * 30 + "1" + "|" * 30,
    "fractions": r"\frac{1}{" * 5000 + "1" + "}" * 5000,
    "fractions in the limits": r"\frac{1}{" * 38 + "x" + "}" * 38,
    "tower": "9^{9^{9^{9^{9}}}}",
    "tower of variables": "x^{" * 38 + "10" + "}" * 38,
    "python tower": "9**9**9**9",
    "factorials": "9" * 9 + "!" * 50,
    "exponent": "10^{10^{10}}+x",
    "matrix": r"\begin{pmatrix}" + ("1&" * 1000 + r"\\") * 1000 + r"\end{pmatrix}",
    "nul": "\0" * 1000 + "3",
    "digits": "1" * 1_000_000,
    "digits in the limits": "1" * 399,
    "boxes": r"\boxed{" * 20_000 + "1",
    "closed boxes": r"\boxed{1}," * 5000,
    "commas": "1," * 10_000,
    "dollars": "$" * 50_000,
    "products": "(x+1)" * 150,
    "functions": "f(" * 35 + "x" + ")" * 35,
    "units": "5" + r"\text{ " * 600,
    "spaces": "5" + " " * 40_000 + "km",
    "signs": "-" * 900 + "1",
    "surrogate": "\ud800 3",
    "code": "__import__('os').system('true')",
}


@pytest.mark.parametrize("grader", ["olympiad", "math_equal", "oat"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_hostile_answers_end_quickly(grader, bomb, monkeypatch):
    monkeypatch.setattr("megatron_entropy.rewards.oat._verified", lambda found, truth: False)  # the pool kills it
    assert grader not in INLINE
    golds = ("3", "x+1", r"(1,\frac{1}{2})") + ((truth("5", unit="km"),) if grader == "olympiad" else ())
    for gold in golds:
        for response in (BOMBS[bomb], rf"Thus \boxed{{{BOMBS[bomb]}}}"):
            start = time.process_time()
            grade = call_verifier(VERIFIERS[grader], response, gold)
            assert time.process_time() - start < 1.0
            assert grade.error is None, grade
