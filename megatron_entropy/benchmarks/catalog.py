"""The ten benchmarks of the papers, and the suites `math` and `ood`.

A benchmark is one declaration; a new one needs no other change. Traps of the published files stand beside the line
that deals with them.
"""

from __future__ import annotations

from megatron_entropy.benchmarks.golds import aime_gold, gsm8k_gold, number_gold, olympiad_gold
from megatron_entropy.benchmarks.questions import Benchmark, Columns

_DECLARATIONS = (
    Benchmark(
        name="aime24",
        kind="math",
        columns=Columns(
            question=("problem", "question", "Problem", "prompt"),
            answer=("answer", "expected_answer", "Answer", "reward_model.ground_truth", "solution"),
        ),
        gold=aime_gold,  # 7 of 30 golds have leading zeros
        graders=("math_verify",),
        size=30,
        hub="hf://HuggingFaceH4/aime_2024:train",
    ),
    Benchmark(
        name="aime25",
        kind="math",
        columns=Columns(
            question=("problem", "question", "Problem", "prompt"),
            answer=("expected_answer", "answer", "Answer", "reward_model.ground_truth"),
        ),
        gold=aime_gold,
        graders=("math_verify",),
        size=30,
        hub="hf://math-ai/aime25:test",
    ),
    Benchmark(
        name="amc23",
        kind="math",
        gold=number_gold,  # the golds are floats
        graders=("math_verify",),
        size=40,
        hub="hf://math-ai/amc23:test",
    ),
    Benchmark(
        name="math500",
        kind="math",
        columns=Columns(
            question=("problem", "question", "prompt"),
            answer=("answer", "expected_answer", "reward_model.ground_truth", "solution"),
            category=("subject", "type"),
            id=("unique_id", "id"),
        ),
        graders=("math_verify", "math_equal"),  # the two differ
        size=500,
        hub="hf://HuggingFaceH4/MATH-500:test",
    ),
    Benchmark(
        name="olympiadbench",
        kind="math",
        columns=Columns(
            question=("question", "problem"),
            answer=("final_answer",),
            category=("answer_type",),
            context=("context",),
        ),
        gold=olympiad_gold,  # several answers in one text, units, a tolerance
        graders=("olympiad", "math_verify"),
        size=675,
        hub="hf://Hothan/OlympiadBench/OE_TO_maths_en_COMP:train",
    ),
    Benchmark(
        name="minerva",
        kind="math",
        columns=Columns(
            question=("problem", "question", "prompt"),
            answer=("solution", "answer", "expected_answer", "reward_model.ground_truth"),  # the last box of it
            category=("type",),
            id=("idx", "id"),
        ),
        graders=("minerva", "math_verify"),
        size=272,
        hub="hf://math-ai/minervamath:test",
    ),
    Benchmark(
        name="gsm8k",
        kind="math",
        columns=Columns(answer=("answer", "expected_answer", "reward_model.ground_truth")),
        gold=gsm8k_gold,  # "#### 1,234"
        graders=("gsm8k_flexible", "gsm8k_strict", "math_verify"),  # lm-eval's two scores
        size=1319,
        hub="hf://openai/gsm8k/main:test",
    ),
    Benchmark(
        name="gpqa_diamond",
        kind="choice",
        columns=Columns(
            question=("Question", "ori_question", "question", "prompt", "problem"),
            answer=("answer", "Correct Answer", "correct_answer"),
            choices=("choices", "options"),
            options=("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
            index=("correct_option_index", "answer_index"),
            category=("High-level domain", "domain", "category", "subject"),
            id=("Record ID", "id"),
        ),
        graders=("choice", "gpqa"),
        size=198,
        hub="hf://Idavidrein/gpqa/gpqa_diamond:train",
        shuffle="per_question",  # the published file has the correct option first
    ),
    Benchmark(
        name="arc_challenge",
        kind="choice",
        columns=Columns(
            question=("question.stem", "question"),
            answer=("answerKey", "answer"),  # 22 keys are digits: labels come with the options
            choices=("choices", "question.choices", "options"),
        ),
        graders=("choice", "multiple_choice"),
        size=1172,
        hub="hf://allenai/ai2_arc/ARC-Challenge:test",
    ),
    Benchmark(
        name="mmlu_pro",
        kind="choice",
        columns=Columns(
            answer=("answer",),
            choices=("options", "choices"),  # 2,051 rows have fewer than ten
            index=("answer_index",),
            category=("category", "subject"),
            id=("question_id", "id"),
        ),
        graders=("multiple_choice", "choice"),
        size=12032,
        hub="hf://TIGER-Lab/MMLU-Pro:test",
    ),
)

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _DECLARATIONS}

SUITES: dict[str, tuple[str, ...]] = {
    "math": ("aime24", "aime25", "amc23", "math500", "olympiadbench", "minerva", "gsm8k"),
    "ood": ("gpqa_diamond", "arc_challenge", "mmlu_pro"),
}
"""Names of the benchmarks in a suite: mathematics, and what lies outside of it."""
