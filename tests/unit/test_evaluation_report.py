"""Tables, comparisons and the page of an evaluation are right for rows counted by hand, and need no other file.

Not covered: the look of the plots.
"""

import json
import math
import random
import re

import pytest
from rich.console import Console

from megatron_entropy.benchmarks import compare, report, table
from megatron_entropy.benchmarks.folder import BenchmarkRecord, EvalFolder, EvalRecord, write_record
from megatron_entropy.benchmarks.samples import SampleRow, write_rows
from megatron_entropy.errors import DataError
from megatron_entropy.records import Grade

FIRST, SECOND = "math_verify", "boxed"


def make_row(question, sample, right, answer: str | None = "7", **changes):
    """A row; `right` None: the first grader has no verdict. The second grader finds everything wrong."""
    grade = Grade(None, None, "timeout") if right is None else Grade(right, answer)
    values = {
        "benchmark": "toy",
        "question": question,
        "sample": sample,
        "seed": sample,
        "permutation": None,
        "category": "",
        "answer": "7",
        "response": "<b>I think</b> 7 & 8",
        "length": 4,
        "finish_reason": "stop",
        "entropy": (1.0, 0.5, 0.25, 0.25),
        "grades": {FIRST: grade, SECOND: Grade(False, None)},
    }
    return SampleRow(**values | changes)


def make_folder(path, benchmarks, **settings):
    """An evaluation of `benchmarks`: name -> rows."""
    folder = EvalFolder(path)
    path.mkdir()
    records = {}
    for name, rows in benchmarks.items():
        write_rows(folder.rows(name), rows)
        samples = 1 + max(row.sample for row in rows)
        questions = len({row.question for row in rows})
        skipped = {"gold cannot be read": ["q<9>"]}
        records[name] = BenchmarkRecord("toy.jsonl", samples, (FIRST, SECOND), questions, "0", skipped)
    settings = {"preset": "sent", "temperature": 1.0} | settings
    write_record(folder, EvalRecord("<model>", settings, records, {"engines": 1}, {"vllm": "1"}, "2025-01-01"))
    return folder


ROWS = [
    *(make_row("a", sample, right, answer) for sample, (right, answer) in enumerate([(True, "7"), (True, "7.0")])),
    *(make_row("b", sample, right, answer) for sample, (right, answer) in enumerate([(False, "8"), (True, "7")])),
    make_row("c", 0, False, None, length=10, finish_reason="length", entropy=(2.0,) * 10),
    make_row("c", 1, None, entropy=None),
]
"""Three questions, two samples: right and right, wrong and right, wrong (no answer) and without a verdict."""


def summary_of(rows):
    return table.summarize_benchmark("toy", rows, (FIRST, SECOND), asked=8, skipped={})


def test_numbers_of_a_benchmark():
    summary = summary_of(ROWS)
    assert (summary.questions, summary.samples, summary.num_samples, summary.asked) == (3, 2, 6, 8)
    assert summary.length == 5 and summary.truncated == pytest.approx(1 / 6)
    assert summary.entropy == pytest.approx((4 * 2 + 20) / (4 * 4 + 10))  # mean over tokens, not over answers
    first, second = summary.graders
    assert first.accuracy.mean == pytest.approx((1 + 1 / 2 + 0) / 3)  # without the sample that has no verdict
    assert first.accuracy.std_err == pytest.approx(1 / 2 / math.sqrt(3))
    assert first.std_err_runs == pytest.approx(1 / 6)  # runs: 1 of 3 and 2 of 3 right
    assert (first.errors, first.ungraded) == (1, []) and first.unparsed == pytest.approx(1 / 6)
    one, two = first.at_k
    assert one.pass_at_k == pytest.approx((1 + 1 / 2 + 0) / 3) and two.pass_at_k == pytest.approx(2 / 3)
    assert two.maj_at_k == pytest.approx(1 / 3)  # b: a tie, the first answer is wrong
    assert two.maj_at_k_average == pytest.approx((1 + 1 / 2) / 3)
    assert two.g_pass_at_k["0.5"] == pytest.approx(2 / 3) and two.g_pass_at_k["1.0"] == pytest.approx(1 / 3)
    assert second.accuracy.mean == 0 and second.unparsed == 1 and second.at_k[1].pass_at_k == 0


def test_order_of_the_rows_changes_nothing():
    shuffled = random.Random(1).sample(ROWS, len(ROWS))
    assert shuffled != ROWS and summary_of(shuffled) == summary_of(ROWS)


def test_question_without_any_verdict_is_left_out_and_listed():
    rows = [*ROWS, make_row("d", 0, None), make_row("d", 1, None)]
    first = summary_of(rows).graders[0]
    assert first.ungraded == ["d"] and first.accuracy == summary_of(ROWS).graders[0].accuracy
    assert first.at_k == summary_of(ROWS).graders[0].at_k
    nothing = summary_of([make_row("d", 0, None)]).graders[0]
    assert math.isnan(nothing.accuracy.mean) and nothing.at_k == ()


def test_letters_vote_for_the_option_behind_them():
    """A in one order and B in another are the same option, so it has two votes of three."""
    orders = [("A", (2, 0, 1)), ("B", (0, 2, 1)), ("A", (0, 1, 2))]
    rows = [
        make_row("a", sample, sample < 2, letter, permutation=order) for sample, (letter, order) in enumerate(orders)
    ]
    assert summary_of(rows[::-1]).graders[0].at_k[-1].maj_at_k == 1


def test_unequal_numbers_of_samples():
    """A stopped evaluation: metrics at k go up to the fewest samples that a question has."""
    summary = summary_of([*ROWS, make_row("a", 2, False), make_row("a", 3, True)])
    assert summary.samples == 2 and [one.k for one in summary.graders[0].at_k] == [1, 2]
    assert summary.graders[0].accuracy.mean == pytest.approx((3 / 4 + 1 / 2) / 3)


def test_summary_file_and_mean_over_sets(tmp_path):
    folder = make_folder(tmp_path / "eval", {"toy": ROWS, "other": ROWS[:1]})
    summary = table.summarize(folder)
    assert summary.mean == pytest.approx((1 / 2 + 1) / 2)
    assert math.isnan(summary.mean_std_err)  # one question has no standard error
    table.write_summary(folder, summary)
    content = json.loads(folder.summary.read_text())
    assert content["mean_std_err"] is None and content["mean"] == summary.mean
    assert content["benchmarks"][0]["graders"][0]["at_k"][1]["g_pass_at_k"]["1.0"] == pytest.approx(1 / 3)
    assert set(content["estimators"]) >= {"pass_at_k", "maj_at_k", "std_err"}
    table.write_summary(folder, table.summarize(folder))
    assert json.loads(folder.summary.read_text()) == content


@pytest.mark.parametrize("width", [60, 100])
def test_printed_tables_fit(tmp_path, width):
    rows = [make_row(f"{number}", sample, number < 3) for number in range(9) for sample in range(4)]
    folder = make_folder(tmp_path / "eval", {"olympiadbench": rows, "gsm8k": rows[:8]})
    console = Console(width=width, record=True, force_terminal=True, color_system=None)
    table.print_table(table.summarize(folder), console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    for expected in ("olympiadbench", "math_verify", "33.3 ± 16.7", "mean over sets", "k = 4", "q<9>"):
        assert expected in text


def test_comparison(tmp_path):
    """Questions a, b, c in both: 1, 1/2, 0 against 1, 1, 0; d is in one evaluation only."""
    better = [make_row("b", 0, True), make_row("a", 0, True), make_row("c", 0, False), make_row("d", 0, True)]
    first = make_folder(tmp_path / "a", {"toy": ROWS, "mine": ROWS})
    second = make_folder(tmp_path / "b", {"toy": better}, temperature=0.6)
    found = compare.compare(first, second)
    (toy,) = found.benchmarks
    assert (toy.grader, toy.questions, toy.better, toy.worse) == (FIRST, 3, 1, 0)
    assert (toy.first, toy.second) == pytest.approx((1 / 2, 2 / 3))
    assert toy.bootstrap.difference == pytest.approx(1 / 6) and toy.bootstrap.low == 0
    assert (toy.only_first, toy.only_second, found.only_first) == ([], ["d"], ["mine"])
    assert found.settings == {"temperature": (1.0, 0.6)}
    assert found == compare.compare(first, second)
    reverse = compare.compare(second, first)
    assert reverse.all_questions.difference == pytest.approx(-1 / 6) and reverse.only_second == ["mine"]
    console = Console(width=60, record=True, force_terminal=True, color_system=None)
    compare.print_comparison(found, console)
    text = console.export_text()
    assert all(words in text for words in ("+16.7", "temperature differs: A 1.0, B 0.6", "toy: in B only, 1: d"))


def test_comparison_needs_a_common_question(tmp_path):
    first = make_folder(tmp_path / "a", {"toy": ROWS[:2]})
    second = make_folder(tmp_path / "b", {"toy": ROWS[2:]})
    with pytest.raises(DataError, match="no question with a grade of the same grader in both"):
        compare.compare(first, second)
    with pytest.raises(DataError, match=r"no eval\.json here"):
        compare.compare(first, EvalFolder(tmp_path / "missing"))


def page_of(folder):
    report.write_report(folder, table.summarize(folder))
    return folder.report.read_text(encoding="utf-8")


def test_page_holds_everything_and_escapes_texts(tmp_path):
    page = page_of(make_folder(tmp_path / "eval", {"toy": ROWS}))
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles[:4] == ["Scores", "Samples", "k of n samples, first grader", "Right and wrong answers, first grader"]
    assert [title for title in titles if title in report.PLOTS] == list(report.PLOTS)
    assert page.count("data:image/png;base64,") == len(report.PLOTS)
    assert "&lt;b&gt;I think&lt;/b&gt; 7 &amp; 8" in page and "<b>" not in page and "<model>" not in page
    assert not re.search(r"""(?:src|href)=["'](?!data:)|url\(|@import|<script""", page)
    assert "q&lt;9&gt;" in page and "not measured" not in page


def test_page_without_entropies_says_so(tmp_path):
    rows = [make_row("a", 0, True, entropy=None), make_row("b", 0, False, entropy=None)]
    page = page_of(make_folder(tmp_path / "eval", {"toy": rows}))
    assert "Token entropies were not measured" in page
    assert page.count("data:image/png;base64,") == 1  # accuracy and length; one sample a question has no curve over k


def test_page_of_an_evaluation_without_a_sample(tmp_path):
    folder = make_folder(tmp_path / "eval", {"toy": ROWS})
    folder.rows("toy").unlink()
    assert "No sample yet" in page_of(folder)
