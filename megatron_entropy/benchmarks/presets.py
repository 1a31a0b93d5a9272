r"""Presets: the evaluation protocols of the four papers (sampling, prompt, number of samples, main grader)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_entropy.config.load import suggest
from megatron_entropy.errors import ConfigError

ANSWER_LINE = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of {letters}. Think step by step before answering.\n\n"
    "{question}"
)
"""Source: simple-evals, `common.py`."""
STEP_BY_STEP = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Preset:
    r"""How a paper samples and grades.

    `top_k`: 0 for all tokens. `max_tokens`: of a response, its end token included. `samples`: answers per question,
    `samples_by_benchmark` where it differs. `prompt`, `choice_prompt`: the user message, with `{question}` (for
    multiple choice with the options below it) and `{letters}` (`ABCD`). `system`: message before it. `grader`: main
    grader of mathematics; empty for the benchmark's own.
    """

    name: str
    temperature: float
    top_p: float
    max_tokens: int
    samples: int
    prompt: str
    choice_prompt: str
    grader: str
    top_k: int = 0
    repetition_penalty: float = 1.0
    samples_by_benchmark: Mapping[str, int] = field(default_factory=dict)
    system: str = ""


PRESETS: dict[str, Preset] = {
    "cure": Preset(  # eval.sh of the release; the prompt is that of its training data, DAPO-Math-17k
        name="cure",
        temperature=0.6,
        top_p=0.7,
        max_tokens=3584,
        samples=1,
        samples_by_benchmark={"aime24": 32, "aime25": 32, "amc23": 32},
        prompt=(
            "Solve the following math problem step by step. The last line of your response should be of the form "
            "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{question}\n\n"
            'Remember to put your answer on its own line after "Answer:".'
        ),
        choice_prompt=ANSWER_LINE,
        grader="math_verify",
    ),
    "curiosft": Preset(  # scripts/3_eval_math.sh and 4_*.sh of the release; prompts come with its data files
        name="curiosft",
        temperature=0.6,
        top_p=1.0,
        max_tokens=8192,
        samples=8,
        samples_by_benchmark={"mmlu_pro": 1},
        prompt="{question}",
        choice_prompt=(
            "Answer the following multiple choice question. LETTER is one of {letters}. Think step by step before "
            "answering.\n\n{question}\n\nThe last line of your response should be of the following format: "
            "ANSWER: $LETTER"
        ),
        grader="curiosft",
    ),
    "sent": Preset(  # OpenCompass configurations of the release
        name="sent",
        temperature=1.0,
        top_p=1.0,
        max_tokens=8000,
        samples=16,
        prompt=STEP_BY_STEP,
        choice_prompt=STEP_BY_STEP,
        grader="opencompass_v2",
    ),
    "cer": Preset(  # src/test_transformers.py of the release
        name="cer",
        temperature=0.8,
        top_p=0.95,
        repetition_penalty=1.15,
        max_tokens=16384,
        samples=1,
        samples_by_benchmark={"aime24": 3, "aime25": 3},
        prompt="{question}",
        choice_prompt="{question}",
        system="Let's think step by step. Put your final answer in $\\boxed{}$",
        grader="cer_eval",
    ),
}


def load_preset(name: str) -> Preset:
    """Find a preset by its name.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in PRESETS:
        raise ConfigError(f"--preset {name}: no such preset{suggest(name, PRESETS)}")
    return PRESETS[name]
