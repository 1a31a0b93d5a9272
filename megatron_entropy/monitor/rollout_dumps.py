"""Rollout dumps: every sample of a training step or an evaluation, as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_entropy.files import atomic_writer
from megatron_entropy.monitor.metrics import finite_or_none
from megatron_entropy.records import Group, Sample


def dump_rollouts(path: Path, groups: Iterable[Group], token_text: Callable[[int], str] | None = None) -> None:
    """Write every sample as one line of JSON; the file appears complete or not at all.

    `tokens` covers prompt and response. `logprobs`, `rollout_logprobs`, `entropies` (nats) and `pieces` cover the
    response, rounded to seven decimals; `advantage` and `entropy` are means over the response. A field without a
    value is null.

    Args:
        path: the file; its folder is created where it is missing.
        groups: prompts with their samples.
        token_text: text of a token id; with it each line also holds the response's `pieces`.
    """
    lines = (
        json.dumps(_describe(group, sample, token_text), ensure_ascii=False) + "\n"
        for group in groups
        for sample in group.samples
    )
    with atomic_writer(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)


def _describe(group: Group, sample: Sample, token_text: Callable[[int], str] | None) -> dict[str, Any]:
    grade = sample.grade
    row: dict[str, Any] = {
        "prompt": group.prompt.index,
        "question": group.prompt.text,
        "answer": group.prompt.answer,
        "response": sample.text,
        "finish_reason": sample.finish_reason,
        "correct": grade.correct if grade else None,
        "extracted": grade.extracted if grade else None,
        "error": grade.error if grade else None,
        "reward": sample.reward,
        "advantage": _mean(sample, "advantage"),
        "entropy": _mean(sample, "entropy"),
        "policy_version": sample.policy_version,
        "parent": sample.parent,
        "prompt_length": sample.prompt_length,
        "tokens": [int(token) for token in sample.tokens],
        "logprobs": _rounded(sample, "logprob"),
        "rollout_logprobs": _rounded(sample, "rollout_logprob"),
        "entropies": _rounded(sample, "entropy"),
    }
    if token_text is not None:
        row["pieces"] = [token_text(int(token)) for token in sample.response("tokens")]
    return row


def _mean(sample: Sample, field: str) -> float | None:
    if getattr(sample, field) is None or not sample.response_length:
        return None
    return finite_or_none(float(sample.response(field).mean(dtype=np.float64)))


def _rounded(sample: Sample, field: str) -> list[float | None] | None:
    if getattr(sample, field) is None:
        return None
    return [finite_or_none(round(float(value), 7)) for value in sample.response(field)]
