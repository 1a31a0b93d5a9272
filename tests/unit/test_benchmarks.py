"""Benchmarks: files in their published forms become questions with golds; what cannot be read is counted and listed.

Shown on rows written here in the forms of the published files: every trap of the ten benchmarks, prompts and sampling
of the four presets as exact texts and numbers, permutations, suite files, sources. Not shown: the published files
themselves, and a download (the package `datasets` is replaced).
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import sys
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import damaged

from megatron_entropy.benchmarks import sources
from megatron_entropy.benchmarks.catalog import BENCHMARKS, SUITES
from megatron_entropy.benchmarks.choices import permuter
from megatron_entropy.benchmarks.golds import gold_for
from megatron_entropy.benchmarks.presets import PRESETS, load_preset
from megatron_entropy.benchmarks.questions import load_questions
from megatron_entropy.benchmarks.suite import load_suite
from megatron_entropy.data.readers import read_raw_rows
from megatron_entropy.errors import ConfigError, DataError, MissingPackageError
from megatron_entropy.records import Grade
from megatron_entropy.rewards.registry import INLINE, VERIFIERS

SENT, CER = PRESETS["sent"], PRESETS["cer"]
GPQA_ROW = {
    "Record ID": "rec1",
    "Question": "Which one?",
    "Correct Answer": "right\n",
    "Incorrect Answer 1": "wrong 1",
    "Incorrect Answer 2": "wrong 2",
    "Incorrect Answer 3": "wrong 3",
    "High-level domain": "Physics",
}
ARC_ROW = {"id": "M1", "question": "Why?", "choices": {"text": ["a", "b", "c", "d"], "label": list("ABCD")}}
MMLU_ROW = {"question_id": 70, "question": "Q?", "options": ["x", "y", "z"], "answer": "B", "answer_index": 1}
OLYMPIAD_ROW = {
    "id": 1,
    "context": None,
    "question": "All p?",
    "final_answer": ["$69$,$84$"],
    "is_multiple_answer": True,
    "unit": None,
    "answer_type": "Numerical",
    "error": None,
}


def write(path, rows):
    """Write rows to a file of the kind that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        text = json.dumps(rows) if ".json" in path.suffixes else "".join(json.dumps(row) + "\n" for row in rows)
        (gzip.open if path.suffix == ".gz" else open)(path, "wb").write(text.encode())
    return str(path)


def load(tmp_path, name, rows, preset=SENT, suffix="jsonl", **options):
    return load_questions(BENCHMARKS[name], write(tmp_path / f"{name}.{suffix}", rows), preset, **options)


def answers(loaded):
    return [question.answer for question in loaded.questions]


# Golds

GOLDS = [
    ("aime24", {"problem": "?", "answer": "025"}, "25"),
    ("aime24", {"problem": "?", "answer": "000"}, "0"),
    ("aime24", {"Problem": "?", "Answer": 204}, "204"),
    ("aime24", {"problem": "?", "solution": "so \\boxed{033}"}, "33"),  # math-ai/aime24 has no other answer
    ("aime24", {"problem": "?", "answer": "073", "solution": "\\framebox{1}"}, "73"),
    ("aime24", {"prompt": [{"role": "user", "content": "?"}], "reward_model": {"ground_truth": "45"}}, "45"),
    ("aime25", {"problem": "?", "expected_answer": "70"}, "70"),
    ("aime25", {"problem": "?", "answer": 70.0}, "70"),
    ("amc23", {"problem": "?", "question": "?", "answer": 27.0}, "27"),
    ("amc23", {"question": "?", "answer": "27.0"}, "27"),
    ("amc23", {"question": "?", "answer": -1.0}, "-1"),
    ("amc23", {"question": "?", "answer": 0.5}, "0.5"),
    ("math500", {"problem": "?", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)", "solution": "x"}, None),
    ("math500", {"problem": "?", "answer": "\\{1,2\\}"}, "\\{1,2\\}"),
    ("minerva", {"problem": "?", "solution": "\\boxed{1} then \\boxed{4.5e33} erg.", "idx": 3}, "4.5e33"),
    ("minerva", {"problem": "?", "solution": "$\\boxed{\\frac{1}{2}}$"}, "\\frac{1}{2}"),
    ("minerva", {"problem": "?", "solution": "\\boxed{np.arcsin(10/13)}"}, "np.arcsin(10/13)"),
    ("minerva", {"question": "?", "answer": "-1./3"}, "-1./3"),
    ("gsm8k", {"question": "?", "answer": "1+1=<<1+1=2>>2\n#### 1,450,000"}, "1450000"),
    ("gsm8k", {"question": "?", "answer": "#### $-3."}, "-3"),
    ("gsm8k", {"question": "?", "answer": "2"}, "2"),
]


@pytest.mark.parametrize(("name", "row", "gold"), GOLDS)
def test_golds_are_read_in_their_published_forms(tmp_path, name, row, gold):
    assert answers(load(tmp_path, name, [row])) == [row["answer"] if gold is None else gold]


UNREADABLE = [
    ("aime24", {"answer": "1000"}, "the answer is not an integer from 0 to 999"),
    ("aime24", {"answer": "12.5"}, "the answer is not an integer from 0 to 999"),
    ("aime24", {"answer": "m+n"}, "the answer is not an integer from 0 to 999"),
    ("aime24", {"answer": -1}, "the answer is not an integer from 0 to 999"),
    ("aime24", {"answer": None}, "the row has no answer"),
    ("aime24", {"answer": [1]}, "the answer is not a text or a number"),
    ("aime24", {"answer": True}, "the answer is not a text or a number"),
    ("amc23", {"answer": "three"}, "the answer is not a number"),
    ("amc23", {"answer": float("nan")}, "the answer is not a text or a number"),
    ("amc23", {"answer": "1e999999999"}, "the answer is not a number"),
    ("math500", {"answer": "\\frac{1}{2"}, "the braces of the answer do not match"),
    ("math500", {"answer": "  "}, "the row has no answer"),
    ("minerva", {"solution": "It is 5."}, "the solution has no box"),
    ("minerva", {"solution": "\\boxed{5"}, "the last box of the answer is empty or not closed"),
    ("gsm8k", {"answer": "so it is four #### four"}, "the answer does not end in '#### NUMBER'"),
    ("gsm8k", {"answer": "no marker 4"}, "the answer does not end in '#### NUMBER'"),
]


@pytest.mark.parametrize(("name", "row", "reason"), UNREADABLE)
def test_a_gold_that_cannot_be_read_is_listed(tmp_path, name, row, reason):
    good = dict(row) | {"solution": "#### \\boxed{5}", "answer": "5"}
    loaded = load(tmp_path, name, [{"id": "bad", "question": "?"} | row, {"id": "good", "question": "?"} | good])
    assert loaded.skipped == {reason: ["bad"]}
    assert [question.id for question in loaded.questions] == ["good"]


def test_a_file_without_any_gold_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"aime24: no question is left: .*not an integer from 0 to 999 \(2 rows\)"):
        load(tmp_path, "aime24", [{"problem": "?", "answer": "x"}] * 2)


def test_half_a_surrogate_is_not_asked(tmp_path):
    loaded = load(tmp_path, "gsm8k", [{"question": "\ud800", "answer": "1"}, {"question": "?", "answer": "1"}])
    assert loaded.skipped == {"a text is not valid Unicode": ["0"]}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "jsonl.gz", "json.gz", "parquet"])
def test_olympiadbench_gives_its_grader_an_object(tmp_path, suffix):
    rows = [OLYMPIAD_ROW, OLYMPIAD_ROW | {"id": 2, "context": "Let p.", "unit": "km", "error": "1e-1"}]
    first, second = load(tmp_path, "olympiadbench", rows, suffix=suffix).questions
    assert json.loads(first.answer) == {
        "final_answer": ["$69$,$84$"],
        "is_multiple_answer": True,
        "unit": None,
        "answer_type": "Numerical",
        "error": None,
    }
    assert json.loads(second.answer)["unit"] == "km" and json.loads(second.answer)["error"] == "1e-1"
    assert second.text.startswith("Let p.\n\nAll p?\n") and second.category == "Numerical"
    assert gold_for("olympiad", first.answer) == first.answer
    assert gold_for("math_verify", first.answer) == "69,84"


def test_olympiadbench_from_a_csv_file(tmp_path):
    rows = [
        OLYMPIAD_ROW | {"final_answer": "['\\\\frac{1}{2}', '2']", "is_multiple_answer": "True"},
        OLYMPIAD_ROW | {"id": 2, "final_answer": "[0,1]", "is_multiple_answer": "False"},  # an interval, no list
    ]
    first, second = load(tmp_path, "olympiadbench", rows, suffix="csv").questions
    assert json.loads(first.answer)["final_answer"] == ["\\frac{1}{2}", "2"]
    assert json.loads(second.answer)["final_answer"] == ["[0,1]"]
    assert json.loads(second.answer)["is_multiple_answer"] is False


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"final_answer": None}, "the row has no final answer"),
        ({"final_answer": [" "]}, "the row has no final answer"),
        ({"error": "a little"}, "the error is not a number"),
    ],
)
def test_olympiadbench_rows_without_a_gold_are_listed(tmp_path, change, reason):
    loaded = load(tmp_path, "olympiadbench", [OLYMPIAD_ROW | {"id": 2} | change, OLYMPIAD_ROW])
    assert loaded.skipped == {reason: ["2"]}


def test_a_gold_that_a_grader_refuses_is_listed(tmp_path):
    path = write(tmp_path / "mine.jsonl", [{"question": "a", "answer": "7"}, {"question": "b", "answer": "x^2"}])
    suite = tmp_path / "suite.toml"
    suite.write_text(f'[[benchmarks]]\nname = "mine"\ndata = "{path}"\ngraders = ["gsm8k_strict"]\n')
    loaded = load_questions(*load_suite(str(suite)), path, SENT)
    assert loaded.skipped == {"the grader gsm8k_strict cannot read the answer": ["1"]}


# Multiple choice


def test_gpqa_options_are_shuffled_by_question_and_recorded(tmp_path):
    rows = [GPQA_ROW | {"Record ID": f"rec{number}"} for number in range(40)]
    loaded = load(tmp_path, "gpqa_diamond", rows, suffix="csv", seed=3)
    orders = [question.permutation for question in loaded.questions]
    assert len(set(orders)) > 10 and all(sorted(order) == [0, 1, 2, 3] for order in orders)
    for question in loaded.questions:
        texts = [["right", "wrong 1", "wrong 2", "wrong 3"][index] for index in question.permutation]
        shown = "\n".join(f"{letter}) {text}" for letter, text in zip("ABCD", texts, strict=True))
        assert question.text.startswith(f"Which one?\n\n{shown}\n")
        assert texts["ABCD".index(question.answer)] == "right"
    again = load(tmp_path, "gpqa_diamond", rows[::-1], suffix="csv", seed=3)
    assert [question.permutation for question in again.questions[::-1]] == orders
    assert [question.permutation for question in load(tmp_path, "gpqa_diamond", rows, seed=4).questions] != orders
    assert loaded.questions[0].category == "Physics"


def test_simple_evals_order_is_its_sequence_of_draws(tmp_path):
    generator = random.Random(0)
    expected = [tuple(generator.sample(range(4), 4)) for _ in range(3)]
    draw = permuter("simple_evals", "gpqa_diamond", 99)
    assert [draw(str(number), 4) for number in range(3)] == expected

    suite = tmp_path / "suite.toml"
    suite.write_text('[[benchmarks]]\nname = "gpqa_diamond"\nshuffle = "simple_evals"\n')
    rows = [GPQA_ROW | {"Record ID": str(number)} for number in range(3)]
    rows[1]["Incorrect Answer 2"] = ""  # its draw is used up
    loaded = load_questions(*load_suite(str(suite)), write(tmp_path / "gpqa.jsonl", rows), SENT)
    assert [question.permutation for question in loaded.questions] == [expected[0], expected[2]]
    assert loaded.skipped == {"an option is empty or not a text": ["1"]}


def test_options_that_the_question_shows_already_are_not_shuffled(tmp_path):
    row = {
        "id": 0,
        "prompt": "Which?\n\nA. 10^-9 ev\nB. 10^-11 ev\n(C) x\nD) y",
        "choices": ["10^-9 ev", "10^-11 ev ", "x", "y"],
        "answer": "B",
    }
    loaded = load(tmp_path, "gpqa_diamond", [row])
    (question,) = loaded.questions
    assert question.text == SENT.choice_prompt.replace("{question}", row["prompt"])
    assert question.answer == "B" and question.permutation == (0, 1, 2, 3)
    assert loaded.notes[-1] == "1 questions show their options already: these were not shuffled"
    bare = load(tmp_path, "gpqa_diamond", [{"ori_question": "Which?", "question": row["prompt"]} | row])
    assert len(bare.notes) == 1 and bare.questions[0].text.startswith("Which?\n\nA) ")


ARC = [
    ({"answerKey": "C"}, "C"),
    ({"answerKey": "3", "choices": {"text": ["a", "b", "c", "d"], "label": list("1234")}}, "C"),
    ({"answerKey": "C", "choices": {"text": ["a", "b", "c"], "label": list("ABC")}}, "C"),
    ({"answerKey": "5", "choices": {"text": list("vwxyz"), "label": list("12345")}}, "E"),
    ({"answerKey": "B", "choices": [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}]}, "B"),
]


@pytest.mark.parametrize(("change", "letter"), ARC)
def test_arc_keys_are_labels(tmp_path, change, letter):
    (question,) = load(tmp_path, "arc_challenge", [ARC_ROW | change]).questions
    assert question.answer == letter and question.permutation == tuple(range(len(question.permutation)))
    last = "ABCDE"[len(question.permutation) - 1]
    assert f"\n{last}) " in question.text and f"\n{chr(ord(last) + 1)}) " not in question.text


def test_arc_in_the_form_of_its_authors(tmp_path):
    options = [{"text": text, "label": label} for text, label in zip("wxyz", "1234", strict=True)]
    row = {"id": "M", "question": {"stem": "Why?", "choices": options}, "answerKey": "2"}
    (question,) = load(tmp_path, "arc_challenge", [row]).questions
    assert question.text.startswith("Why?\n\nA) w\nB) x") and question.answer == "B"


NO_SUCH_OPTION = "the answer is neither the label, the number nor the text of an option"
CHOICE_FAULTS = [
    ("arc_challenge", ARC_ROW | {"answerKey": "E"}, NO_SUCH_OPTION),
    ("arc_challenge", ARC_ROW | {"answerKey": "1"}, NO_SUCH_OPTION),
    (
        "arc_challenge",
        ARC_ROW | {"answerKey": "A", "choices": {"text": ["a", "b"], "label": ["A", "A"]}},
        "the labels of the options are not all there or not all different",
    ),
    ("mmlu_pro", MMLU_ROW | {"answer_index": 2}, "the answer and the number of the correct option disagree"),
    ("mmlu_pro", MMLU_ROW | {"options": []}, "an option is empty or not a text"),
    ("mmlu_pro", MMLU_ROW | {"options": ["x", " "]}, "an option is empty or not a text"),
    ("mmlu_pro", MMLU_ROW | {"options": list("abcdefghijk")}, "there are more than 10 options"),
    (
        "gpqa_diamond",
        {"id": 7, "question": "?", "choices": ["x", "x"], "answer": "x"},
        "the answer is the text of more than one option",
    ),
    (
        "gpqa_diamond",
        {"id": 7, "question": "?", "choices": ["B", "A"], "answer": "B"},
        "the answer is the label of one option and the text of another",
    ),
]


@pytest.mark.parametrize(("name", "row", "reason"), CHOICE_FAULTS)
def test_rows_without_one_correct_option_are_listed(tmp_path, name, row, reason):
    good = {"arc_challenge": ARC_ROW | {"id": "g", "answerKey": "A"}, "mmlu_pro": MMLU_ROW | {"question_id": "g"}}
    good["gpqa_diamond"] = {"id": "g", "question": "?", "choices": ["x", "y"], "answer": "y"}
    loaded = load(tmp_path, name, [row, good[name]])
    assert list(loaded.skipped) == [reason] and len(loaded.questions) == 1


def test_mmlu_pro_rows_may_have_few_options(tmp_path):
    rows = [
        MMLU_ROW,
        MMLU_ROW | {"question_id": 71, "options": ["only"], "answer": "A", "answer_index": 0, "category": "law"},
        MMLU_ROW | {"question_id": 72, "options": ["x", "N/A", "z", "N/A"], "answer": "C", "answer_index": 2},
        MMLU_ROW | {"question_id": 73, "options": list("jihgfedcba"), "answer": "J", "answer_index": 9},
    ]
    questions = load(tmp_path, "mmlu_pro", rows).questions
    assert [question.answer for question in questions] == ["B", "A", "C", "J"]
    assert [len(question.permutation) for question in questions] == [3, 1, 3, 10]
    assert [question.id for question in questions] == ["70", "71", "72", "73"] and questions[1].category == "law"


@pytest.mark.parametrize(("answer", "letter"), [(2, "C"), ("(C)", "C"), ("\\boxed{C}", "C"), ("z", "C"), ("C.", "C")])
def test_answers_may_be_numbers_letters_or_texts(tmp_path, answer, letter):
    row = {"question": "?", "options": ["x", "y", "z"], "answer": answer}
    assert answers(load(tmp_path, "mmlu_pro", [row])) == [letter]


# Presets

QUESTION = {"question": "What is {letters} + \\frac{1}{2}?", "answer": "1"}
PROTOCOLS = {  # temperature, top_p, top_k, repetition penalty, tokens, grader; samples on GSM8K, AIME24, MMLU-Pro
    "cure": ((0.6, 0.7, 0, 1.0, 3584, "math_verify"), (1, 32, 1)),
    "curiosft": ((0.6, 1.0, 0, 1.0, 8192, "curiosft"), (8, 8, 1)),
    "sent": ((1.0, 1.0, 0, 1.0, 8000, "opencompass_v2"), (16, 16, 16)),
    "cer": ((0.8, 0.95, 0, 1.15, 16384, "cer_eval"), (1, 3, 1)),
}
PROMPTS = {
    "cure": "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    "What is {letters} + \\frac{1}{2}?\n\n"
    'Remember to put your answer on its own line after "Answer:".',
    "curiosft": "What is {letters} + \\frac{1}{2}?",
    "sent": "What is {letters} + \\frac{1}{2}?\n"
    "Please reason step by step, and put your final answer within \\boxed{}.",
    "cer": "What is {letters} + \\frac{1}{2}?",
}
CHOICE_PROMPTS = {
    "cure": "Answer the following multiple choice question. The last line of your response should be of the following "
    "format: 'Answer: $LETTER' (without quotes) where LETTER is one of ABC. Think step by step before answering.\n\n"
    "Q?\n\nA) x\nB) y\nC) z",
    "curiosft": "Answer the following multiple choice question. LETTER is one of ABC. Think step by step before "
    "answering.\n\nQ?\n\nA) x\nB) y\nC) z\n\nThe last line of your response should be of the following format: "
    "ANSWER: $LETTER",
    "sent": "Q?\n\nA) x\nB) y\nC) z\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "cer": "Q?\n\nA) x\nB) y\nC) z",
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_papers_protocols(tmp_path, name):
    preset = load_preset(name)
    sampling = (preset.temperature, preset.top_p, preset.top_k, preset.repetition_penalty, preset.max_tokens)
    samples = tuple(BENCHMARKS[benchmark].samples_for(preset) for benchmark in ("gsm8k", "aime24", "mmlu_pro"))
    assert ((*sampling, preset.grader), samples) == PROTOCOLS[name]
    (asked,) = load(tmp_path, "gsm8k", [QUESTION], preset).questions
    (choice,) = load(tmp_path, "mmlu_pro", [MMLU_ROW], preset).questions
    assert asked.text == PROMPTS[name] and choice.text == CHOICE_PROMPTS[name]
    system = "Let's think step by step. Put your final answer in $\\boxed{}$" if name == "cer" else ""
    assert asked.system == choice.system == system
    assert BENCHMARKS["gsm8k"].graders_for(preset)[0] == preset.grader
    assert BENCHMARKS["mmlu_pro"].graders_for(preset)[0] == "multiple_choice"


def test_every_grader_is_a_verifier():
    names = {grader for benchmark in BENCHMARKS.values() for grader in benchmark.graders}
    assert names | {preset.grader for preset in PRESETS.values()} <= set(VERIFIERS)


@pytest.mark.parametrize(
    ("response", "answer", "grade"),
    [
        ("a \\boxed{3} b \\boxed{42}", "42", Grade(True, "42")),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}", Grade(False, "\\frac{1")),
        ("\\boxed{ 42 }", "42", Grade(False, " 42 ")),
        ("\\boxed{42.0}", "42", Grade(False, "42.0")),
        ("\\boxed{42", "42", Grade(True, "42")),
        ("42", "42", Grade(True)),
        ("It is 42", "42", Grade(False)),
    ],
)
def test_cer_eval_cuts_at_the_first_brace(response, answer, grade):
    assert VERIFIERS["cer_eval"](response, answer) == grade


def test_the_suites_have_the_ten_benchmarks():
    assert [name for suite in SUITES.values() for name in suite] == list(BENCHMARKS)
    assert sum(benchmark.size for benchmark in BENCHMARKS.values()) == 30 + 30 + 40 + 500 + 675 + 272 + 1319 + 13402


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_main_grader_accepts_what_a_prompt_asks_for(tmp_path, name):
    """A right answer in the form of each prompt is right, a wrong one wrong, for graders without symbolic algebra."""
    rows = {"gpqa_diamond": GPQA_ROW, "arc_challenge": ARC_ROW | {"answerKey": "C"}, "mmlu_pro": MMLU_ROW}
    row = rows.get(name, {"question": "?", "answer": "#### 7", "final_answer": ["7"], "solution": "\\boxed{7}"})
    if name in ("aime24", "aime25", "amc23", "math500"):
        row["answer"] = "7"
    forms = {
        "cure": "so\nAnswer: {}",
        "curiosft": "so\nANSWER: {}",
        "sent": "so $\\boxed{{{}}}$.",
        "cer": "\\boxed{{{}}}",
    }
    for preset in PRESETS.values():
        (question,) = load(tmp_path, name, [row], preset).questions
        grader = BENCHMARKS[name].graders_for(preset)[0]
        if grader in INLINE:
            gold = gold_for(grader, question.answer)
            other = "B" if gold == "A" else "A" if gold in "BCD" else "8"
            assert VERIFIERS[grader](forms[preset.name].format(gold), gold).correct is True
            assert VERIFIERS[grader](forms[preset.name].format(other), gold).correct is False


def test_a_conversation_keeps_its_system_message(tmp_path):
    turns = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1+1?"}]
    (question,) = load(tmp_path, "gsm8k", [{"prompt": turns, "answer": "2"}], CER).questions
    assert (question.system, question.text) == ("Think.", "1+1?")
    turns.append({"role": "assistant", "content": "2"})
    with pytest.raises(DataError, match=r"gsm8k.jsonl:1: column 'prompt' must hold a question, found a text"):
        load(tmp_path, "gsm8k", [{"prompt": turns, "answer": "2"}], CER)


# Files


def test_other_columns_are_named_with_the_row(tmp_path):
    rows = [{"question": "?", "answer": "1"}, {"q": "?", "gold": "1"}]
    with pytest.raises(DataError) as error:
        load(tmp_path, "gsm8k", rows)
    assert str(error.value) == (
        f"{tmp_path}/gsm8k.jsonl:2: no column for the question: wanted question or problem or prompt, found q, gold; a "
        'suite file names another one with columns.question = "NAME"'
    )
    with pytest.raises(DataError, match="no column for the choices: wanted options or choices, found question, answer"):
        load(tmp_path, "mmlu_pro", rows)


def test_an_id_that_occurs_twice_is_an_error(tmp_path):
    rows = [{"id": number, "problem": "?", "answer": "1"} for number in (1, 2, 1)]
    with pytest.raises(
        DataError, match=r"aime24.jsonl:3: the id '1' is also that of .*aime24.jsonl:1; make ids unique"
    ):
        load(tmp_path, "aime24", rows)


@pytest.mark.parametrize(("value", "found"), [(" ", "only white space"), (3, "the int 3"), ("", "an empty text")])
def test_an_empty_question_is_an_error(tmp_path, value, found):
    with pytest.raises(DataError, match=f"gsm8k.jsonl:1: column 'question' must hold a question, found {found}"):
        load(tmp_path, "gsm8k", [{"question": value, "answer": "1"}])


def test_an_empty_file_is_an_error(tmp_path):
    (tmp_path / "gsm8k.jsonl").write_text("\n")
    with pytest.raises(DataError, match="gsm8k: no question is left: the file has no rows"):
        load_questions(BENCHMARKS["gsm8k"], str(tmp_path / "gsm8k.jsonl"), SENT)


def test_another_number_of_rows_is_reported(tmp_path):
    rows = [{"problem": f"{number}?", "answer": number} for number in range(30)]
    assert load(tmp_path, "aime24", rows).notes == ()
    assert load(tmp_path, "aime24", rows[:28]).notes == ("28 rows were read, the published aime24 has 30",)
    assert load(tmp_path, "aime24", rows, limit=3).notes == ()
    assert len(load(tmp_path, "aime24", rows, limit=3).questions) == 3
    assert load(tmp_path, "aime24", rows[:2], limit=3).notes == ("2 rows were read, the published aime24 has 30",)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "jsonl.gz", "json.gz"])
def test_every_kind_of_file_gives_the_same_questions(tmp_path, suffix):
    rows = [{"id": f"q{number}", "problem": f"{number}?", "answer": f"0{number}"} for number in range(10, 13)]
    assert load(tmp_path, "aime24", rows, suffix=suffix) == load(tmp_path, "aime24", rows)


def test_a_damaged_gz_file_is_an_error(tmp_path):
    path = tmp_path / "gsm8k.jsonl.gz"
    write(path, [{"question": "?" * 5000, "answer": "1"}] * 50)
    whole = path.read_bytes()
    for content in (whole[:-20], b"not gzip", whole[:10] + bytes(20) + whole[30:], whole[:15]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="gsm8k.jsonl.gz"):
            list(read_raw_rows(path))


def test_a_gz_array_that_grows_beyond_the_bound_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_entropy.data.readers.MAX_ARRAY_BYTES", 2**21)
    path = tmp_path / "rows.json.gz"
    path.write_bytes(gzip.compress(b"[" + b" " * 2**22 + b"]"))
    with pytest.raises(DataError, match="more than 2097152 bytes are too many for one JSON array"):
        list(read_raw_rows(path))


FUZZED = {
    "aime24.jsonl": [{"id": 1, "problem": "a?", "answer": "025"}, {"id": 2, "problem": "b?", "answer": 7.0}],
    "olympiadbench.json": [OLYMPIAD_ROW, OLYMPIAD_ROW | {"id": 2, "error": "1e-1"}],
    "gpqa_diamond.csv": [GPQA_ROW, GPQA_ROW | {"Record ID": "rec2"}],
    "arc_challenge.jsonl": [ARC_ROW | {"answerKey": "C"}],
    "mmlu_pro.jsonl.gz": [MMLU_ROW, MMLU_ROW | {"question_id": 71}],
}


@pytest.mark.parametrize("name", FUZZED)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_damaged_files_are_questions_or_one_line(tmp_path_factory, name, data):
    folder = tmp_path_factory.mktemp("damaged", numbered=True)
    path = folder / name
    write(path, FUZZED[name])
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    try:
        loaded = load_questions(BENCHMARKS[name.partition(".")[0]], str(path), SENT)
    except DataError as error:
        assert "\n" not in str(error)
    else:
        assert all(question.text.strip() and question.answer.strip() for question in loaded.questions)


# Sources


def test_sources_are_found_by_name(tmp_path):
    benchmark = BENCHMARKS["mmlu_pro"]
    assert benchmark.source(None) == benchmark.source(tmp_path) == "hf://TIGER-Lab/MMLU-Pro:test"
    nested = write(tmp_path / "mmlu_pro" / "test.jsonl.gz", [MMLU_ROW])
    assert benchmark.source(str(tmp_path)) == nested
    flat = write(tmp_path / "mmlu_pro.parquet", [MMLU_ROW])
    with pytest.raises(DataError, match=f"mmlu_pro: both {flat} and {nested} have this name; keep one of them"):
        benchmark.source(tmp_path)
    with pytest.raises(DataError, match="--data .*nowhere: no such folder"):
        benchmark.source(tmp_path / "nowhere")


def test_every_default_source_is_a_data_set():
    parts = [sources.HUB_SOURCE.fullmatch(benchmark.hub) for benchmark in BENCHMARKS.values()]
    assert all(part and part["split"] for part in parts)
    config = {name: part["config"] for name, part in zip(BENCHMARKS, parts, strict=True) if part["config"]}
    assert config == {
        "olympiadbench": "OE_TO_maths_en_COMP",
        "gsm8k": "main",
        "gpqa_diamond": "gpqa_diamond",
        "arc_challenge": "ARC-Challenge",
    }


def test_a_data_set_is_loaded_with_its_config_and_split(tmp_path, monkeypatch):
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((*arguments, options["split"]))
        return [{"question": "?", "answer": "#### 2"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for source in (BENCHMARKS["gsm8k"].hub, "hf://me/mine"):
        assert answers(load_questions(BENCHMARKS["gsm8k"], source, SENT)) == ["2"]
    assert calls == [("openai/gsm8k", "main", "test"), ("me/mine", None, "test")]
    with pytest.raises(DataError, match="hf://mine: a data set is written hf://ORG/NAME"):
        load_questions(BENCHMARKS["gsm8k"], "hf://mine", SENT)


def test_a_data_set_that_cannot_be_loaded_says_what_to_download(monkeypatch):
    def load_dataset(*arguments, **options):
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError) as error:
        load_questions(BENCHMARKS["gpqa_diamond"], BENCHMARKS["gpqa_diamond"].hub, SENT)
    assert str(error.value) == (
        "gpqa_diamond: hf://Idavidrein/gpqa/gpqa_diamond:train cannot be loaded (ConnectionError: Couldn't reach the "
        "Hub); where there is a network, download https://huggingface.co/datasets/Idavidrein/gpqa and put it at "
        "FOLDER/gpqa_diamond.jsonl or FOLDER/gpqa_diamond/test.jsonl (or .json, .csv, .parquet) and add --data FOLDER"
    )
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackageError, match=r"gsm8k: hf://.* needs the package datasets: pip install .*\[eval\]"):
        load_questions(BENCHMARKS["gsm8k"], BENCHMARKS["gsm8k"].hub, SENT)


# Suite files


def suite_of(tmp_path, text):
    path = tmp_path / "suite.toml"
    path.write_text(text)
    return load_suite(str(path))


def test_a_suite_file_changes_benchmarks_and_declares_others(tmp_path):
    rows = [{"q": "1+1?", "gold": "#### 2", "topic": "sums", "first": "x", "second": "y", "key": "y"}]
    data = write(tmp_path / "mine.csv", rows)
    gsm8k, mine, letters = suite_of(
        tmp_path,
        f"""
        [[benchmarks]]
        name = "gsm8k"
        samples = 4
        limit = 200
        graders = ["gsm8k_strict"]

        [[benchmarks]]
        name = "mine"
        data = "{data}"
        columns.question = "q"
        columns.answer = "gold"
        columns.category = "topic"
        gold = "gsm8k"
        prompt = "Q: {{question}}"

        [[benchmarks]]
        name = "letters"
        kind = "choice"
        data = "{data}"
        columns = {{question = "q", answer = "key", options = ["first", "second"]}}
        """,
    )
    assert (gsm8k.samples_for(SENT), gsm8k.limit, gsm8k.graders_for(SENT)) == (4, 200, ("gsm8k_strict",))
    assert gsm8k.columns == BENCHMARKS["gsm8k"].columns and gsm8k.size == 1319
    (question,) = load_questions(mine, mine.source(None), SENT).questions
    assert (question.text, question.answer, question.category) == ("Q: 1+1?", "2", "sums")
    assert mine.graders_for(SENT) == ("opencompass_v2", "math_verify") and mine.samples_for(SENT) == 16
    (question,) = load_questions(letters, letters.source(None), CER).questions
    assert (question.text, question.answer) == ("1+1?\n\nA) x\nB) y", "B")
    assert letters.graders_for(SENT) == ("choice",)


def test_limit_of_a_suite_file_yields_to_the_argument(tmp_path):
    path = write(tmp_path / "mine.jsonl", [{"question": "?", "answer": "1"}] * 5)
    (mine,) = suite_of(tmp_path, f'[[benchmarks]]\nname = "mine"\ndata = "{path}"\nlimit = 2\n')
    assert len(load_questions(mine, path, SENT).questions) == 2
    assert len(load_questions(mine, path, SENT, limit=4).questions) == 4


SUITE_FAULTS = [
    ("", "a suite has at least one [[benchmarks]] table"),
    ("benchmarks = 3", "a suite has at least one [[benchmarks]] table"),
    ("[[benchmark]]\nname = 'gsm8k'", "a suite has at least one [[benchmarks]] table"),
    (
        "[[benchmarks]]\nname = 'gsm8k'\nsample = 3",
        "benchmarks.0.sample: unknown key; did you mean benchmarks.0.samples?",
    ),
    (
        "[[benchmarks]]\nname = 'gsm8k'\ncolumns.questions = 'q'",
        "benchmarks.0.columns.questions: unknown key; did you mean benchmarks.0.columns.question?",
    ),
    ("[[benchmarks]]\nname = 'gsm8k'\n[other]", "other: unknown key; known are benchmarks"),
    ("[[benchmarks]]\ndata = 'x'", "benchmarks.0.name: field required"),
    (
        "[[benchmarks]]\nname = 'gsm8k'\nsamples = -1",
        "benchmarks.0.samples: input should be greater than or equal to 0 (got -1)",
    ),
    (
        "[[benchmarks]]\nname = 'gsm8'",
        "benchmarks.gsm8: not a built-in benchmark, so it needs data = FILE; did you mean gsm8k?",
    ),
    (
        "[[benchmarks]]\nname = 'a/b'\ndata = 'x'",
        "benchmarks.name: at most 64 letters, digits, dots, _ and -, found 'a/b'",
    ),
    ("[[benchmarks]]\nname = 'gsm8k'\nkind = 'choice'", "benchmarks.gsm8k.kind: gsm8k is 'math', found 'choice'"),
    ("[[benchmarks]]\nname = 'gsm8k'\nprompt = 'x'", "benchmarks.gsm8k.prompt: it must contain {question}, found 'x'"),
    ("[[benchmarks]]\nname = 'gsm8k'\ngold = 'numbr'", "benchmarks.gsm8k.gold: unknown 'numbr'; did you mean number?"),
    (
        "[[benchmarks]]\nname = 'gsm8k'\nshuffle = 'no'",
        'benchmarks.gsm8k: choices, options and shuffle need kind = "choice"',
    ),
    (
        "[[benchmarks]]\nname = 'mmlu_pro'\ngold = 'text'",
        "benchmarks.mmlu_pro.gold: has no effect on multiple choice; remove it",
    ),
    (
        "[[benchmarks]]\nname = 'gsm8k'\n[[benchmarks]]\nname = 'gsm8k'",
        "benchmarks need different names, found gsm8k, gsm8k",
    ),
    ("[[benchmarks]\n", "not valid TOML: "),
]


@pytest.mark.parametrize(("text", "message"), SUITE_FAULTS)
def test_faults_of_a_suite_file_are_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        suite_of(tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path}/suite.toml: {message}") and "\n" not in str(error.value)


def test_unknown_names_are_errors(tmp_path):
    with pytest.raises(ConfigError, match="--suite maths: no such suite; did you mean math?"):
        load_suite("maths")
    with pytest.raises(ConfigError, match="gone.toml: no such file; --suite takes math, ood, a benchmark or a TOML"):
        load_suite(str(tmp_path / "gone.toml"))
    with pytest.raises(ConfigError, match="--preset curio: no such preset; did you mean curiosft?"):
        load_preset("curio")
    with pytest.raises(ConfigError, match="reward.verifier: unknown name 'mathverify'"):
        suite_of(tmp_path, '[[benchmarks]]\nname = "gsm8k"\ngraders = ["mathverify"]\n')
    assert [benchmark.name for benchmark in load_suite("amc23")] == ["amc23"]
