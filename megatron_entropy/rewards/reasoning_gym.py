"""Grading of reasoning-gym's questions by its own scorers: foreign code, which `RewardPool` runs in workers."""

from __future__ import annotations

from megatron_entropy import procedural
from megatron_entropy.records import Grade
from megatron_entropy.rewards.strings import boxed_content

EXTRACTED_LENGTH = 200  # characters of the answer that are kept for the rollout dump
RIGHT = 1.0


def reasoning_gym(response: str, answer: str) -> Grade:
    r"""Grade by `score_answer` of the data set that made the question; only the full score of 1 is right.

    The answer is the text between the last pair `<answer>` and `</answer>` (reasoning-gym's `extract_answer`), and
    where there is none the last `\boxed{...}`. A response without either is wrong. Partial scores, which some data sets
    give to an answer with words around it, are wrong too.

    Args:
        response: the model's text.
        answer: a ground truth of `procedural.questions`.

    Raises:
        ValueError: not such a ground truth, or one that another version of reasoning-gym made.
        MissingPackageError: reasoning-gym is not installed.
    """
    data_set, entry = procedural.entry_of(answer)
    from reasoning_gym.utils import extract_answer

    extracted = extract_answer(response)
    if extracted is None:
        extracted = boxed_content(response)
    if extracted is None:
        return Grade(False)
    return Grade(bool(data_set.score_answer(extracted, entry) >= RIGHT), extracted[:EXTRACTED_LENGTH])
