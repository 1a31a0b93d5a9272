"""Rollout dumps: every sample of a training step or an evaluation, as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_entropy.files import atomic_writer
from megatron_entropy.monitor.metrics import finite_or_none
from megatron_entropy.records import Alternatives, Group, Sample


def dump_rollouts(path: Path, groups: Iterable[Group], token_text: Callable[[int], str] | None = None) -> None:
    """Write every sample as one line of JSON; the file appears complete or not at all.

    `tokens` covers prompt and response; `question_length` of them are the question's, and those from there to
    `prompt_length` the response prefix of a branch. `group` counts the groups of the file, `sample` the samples of a
    group, and `parent` is the `sample` that a branch continues after its first `cut` response tokens. `trained`:
    whether a token has a weight in the loss; null for an evaluation.

    Lists cover the response, one entry a token: `logprobs` (of the policy before the update), `rollout_logprobs` (of
    the engine), `entropies`, all in nats, and `pieces` of the vocabulary. `advantages` and `kl_weights` are written
    where they differ between the tokens of a response, `reference_logprobs` where some token has a KL penalty. Numbers
    of a list are rounded to six decimals. `untrained` lists the positions without a weight in the loss. `advantage`,
    `entropy` and `kl_weight` are means over the response. `alternatives` holds the most probable tokens of every
    position, each as its entry of the vocabulary and its log-prob by the engine (`rollout.top_alternatives`). A field
    without a value is null.

    Args:
        path: the file; its folder is created where it is missing.
        groups: prompts with their samples.
        token_text: text of a token id; with it each line also holds the response's `pieces`.
    """
    lines = (
        json.dumps(_describe(group, sample, token_text) | {"group": index, "sample": number}, ensure_ascii=False) + "\n"
        for index, group in enumerate(groups)
        for number, sample in enumerate(group.samples)
    )
    with atomic_writer(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)


def _describe(group: Group, sample: Sample, token_text: Callable[[int], str] | None) -> dict[str, Any]:
    grade, question_length = sample.grade, len(group.prompt.tokens)
    is_penalized = sample.kl_weight is not None and bool(sample.kl_weight.any())
    row: dict[str, Any] = {
        "prompt": group.prompt.index,
        "question": group.prompt.text,
        "answer": group.prompt.answer,
        "semantic_entropy": group.prompt.semantic_entropy,
        "response": sample.text,
        "length": sample.response_length,
        "finish_reason": sample.finish_reason,
        "correct": grade.correct if grade else None,
        "extracted": grade.extracted if grade else None,
        "error": grade.error if grade else None,
        "reward": sample.reward,
        "advantage": _mean(sample, "advantage"),
        "entropy": _mean(sample, "entropy"),
        "kl_weight": _mean(sample, "kl_weight"),
        "trained": None if sample.reward is None and sample.weight is None else _is_trained(sample),
        "policy_version": sample.policy_version,
        "parent": sample.parent,
        "cut": None if sample.parent is None else sample.prompt_length - question_length,
        "question_length": question_length,
        "prompt_length": sample.prompt_length,
        "tokens": [int(token) for token in sample.tokens],
        "logprobs": _rounded(sample, "logprob"),
        "rollout_logprobs": _rounded(sample, "rollout_logprob"),
        "entropies": _rounded(sample, "entropy"),
        "advantages": _rounded(sample, "advantage") if _varies(sample, "advantage") else None,
        "untrained": None if sample.weight is None else np.flatnonzero(sample.response("weight") == 0).tolist(),
        "kl_weights": _rounded(sample, "kl_weight") if _varies(sample, "kl_weight") else None,
        "reference_logprobs": _rounded(sample, "reference_logprob") if is_penalized else None,
    }
    if token_text is not None:
        row["pieces"] = [token_text(int(token)) for token in sample.response("tokens")]
        row["alternatives"] = None if sample.alternatives is None else _alternatives(sample.alternatives, token_text)
    return row


def _alternatives(found: Alternatives, token_text: Callable[[int], str]) -> list[list[tuple[str, float]]]:
    """Vocabulary entries and log-probs of the most probable tokens of every position, without those that were cut."""
    return [
        [
            (token_text(int(token)), round(float(logprob), 4))
            for token, logprob in zip(*row, strict=True)
            if logprob > -100
        ]
        for row in zip(found.tokens, found.logprobs, strict=True)
    ]


def _is_trained(sample: Sample) -> bool:
    return sample.weight is not None and bool(sample.response("weight").any())


def _varies(sample: Sample, field: str) -> bool:
    values = getattr(sample, field)
    return values is not None and len(np.unique(sample.response(field))) > 1


def _mean(sample: Sample, field: str) -> float | None:
    if getattr(sample, field) is None or not sample.response_length:
        return None
    return finite_or_none(float(sample.response(field).mean(dtype=np.float64)))


def _rounded(sample: Sample, field: str) -> list[float | None] | None:
    if getattr(sample, field) is None:
        return None
    return [finite_or_none(round(float(value), 6)) for value in sample.response(field)]
