"""Group the answers to a question into clusters of equal answers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from megatron_entropy.config.schema import RewardConfig
from megatron_entropy.rewards import COMPARISON, Grader, open_grader
from megatron_entropy.rewards.dapo import INVALID

UNREADABLE = -1
"""The cluster of answers that cannot be read."""


def assign_clusters(answers: Sequence[str | None], equal: Mapping[tuple[str, str], bool]) -> list[int]:
    """Number the clusters 0, 1, ... in the order in which they first appear; `UNREADABLE` for None.

    Args:
        answers: as texts; the same text is the same answer.
        equal: for two texts, the one that appears first in front, whether they mean the same. An answer joins the
            earliest cluster whose first text it equals.
    """
    first_texts: list[str] = []
    cluster_of: dict[str, int] = {}
    for answer in answers:
        if answer is None or answer in cluster_of:
            continue
        matches = (index for index, first in enumerate(first_texts) if equal.get((first, answer), False))
        cluster_of[answer] = next(matches, len(first_texts))
        if cluster_of[answer] == len(first_texts):
            first_texts.append(answer)
    return [UNREADABLE if answer is None else cluster_of[answer] for answer in answers]


class AnswerJudge:
    """Decides which responses to a question are correct and which give the same answer.

    Answers are equal when the verifier extracts the same text; with `math_verify`, when they are mathematically equal.

    Args:
        config: verifier, its workers, and the seconds for one comparison. Two answers whose comparison takes longer
            are different.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._verifier = open_grader(config, budget=math.inf)
        is_symbolic = config.verifier == "math_verify"
        self._comparison = open_grader(config, verifier=COMPARISON, budget=math.inf) if is_symbolic else None

    def close(self) -> None:
        """Stop the workers."""
        self._verifier.close()
        if self._comparison is not None:
            self._comparison.close()

    def judge(self, questions: Sequence[tuple[str | None, Sequence[str]]]) -> list[tuple[list[bool | None], list[int]]]:
        """Grade the responses to each question and cluster them.

        Args:
            questions: ground truth, if there is one, and responses of each.
        Returns:
            For each question whether each response is correct (None: unknown), and its cluster.
        """
        pairs = [(text, truth or "") for truth, texts in questions for text in texts]
        grades = iter(self._verifier.grade(pairs))
        grouped = [[next(grades) for _ in texts] for _, texts in questions]
        correct = [
            [None if truth is None else grade.correct for grade in group]
            for (truth, _), group in zip(questions, grouped, strict=True)
        ]
        if self._comparison is None:
            answers = [[None if g.extracted == INVALID else g.extracted for g in group] for group in grouped]
            clusters = [assign_clusters(group, {}) for group in answers]
        else:
            clusters = self._compare(self._comparison, [texts for _, texts in questions])
        return list(zip(correct, clusters, strict=True))

    def _compare(self, comparison: Grader, questions: Sequence[Sequence[str]]) -> list[list[int]]:
        """Clusters by mathematical equality, compared for each pair of different answers to a question."""
        grades = iter(comparison.grade([(text, text) for texts in questions for text in texts]))
        answers = [[next(grades).extracted for _ in texts] for texts in questions]
        pairs: list[tuple[int, tuple[str, str]]] = []
        responses: list[tuple[str, str]] = []
        for number, (texts, group) in enumerate(zip(questions, answers, strict=True)):
            first_response = {answer: text for answer, text in reversed(list(zip(group, texts, strict=True)))}
            different = [answer for answer in dict.fromkeys(group) if answer is not None]
            for left, right in itertools.combinations(different, 2):
                pairs.append((number, (left, right)))
                responses.append((first_response[left], first_response[right]))
        equal: list[dict[tuple[str, str], bool]] = [{} for _ in questions]
        for (number, pair), grade in zip(pairs, comparison.grade(responses), strict=True):
            equal[number][pair] = grade.correct is True
        return [assign_clusters(group, matches) for group, matches in zip(answers, equal, strict=True)]
