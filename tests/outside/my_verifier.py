"""A verifier: the last number of the response must be the answer."""

import re

from megatron_entropy.records import Grade


def grade(response: str, answer: str) -> Grade:
    """Grade one response."""
    numbers = re.findall(r"-?\d+", response)
    if not numbers:
        return Grade(correct=False)
    return Grade(correct=int(numbers[-1]) == int(answer), extracted=numbers[-1])
