"""What a run tells while it runs: console log, `metrics.jsonl`, TensorBoard, W&B, rollout dumps, a step's clock.

Modules log through `logging.getLogger(__name__)`; `setup_logging` decides once per rank where that goes. Only rank 0
holds a `MetricsWriter`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_entropy.monitor.metrics import _finite, _replace
from megatron_entropy.records import Group, Sample


def dump_rollouts(path: Path, groups: Iterable[Group], tokenizer_piece: Callable[[int], str] | None = None) -> None:
    """Write every sample as one JSON object a line, in one atomic replacement.

    Args:
        path: the file; its folder is made.
        groups: prompts with their samples.
        tokenizer_piece: the text of one token id; with it each line also holds the response's `pieces`.

    `tokens` are those of prompt and response; `logprobs`, `rollout_logprobs`, `entropies` (nats) and `pieces` belong
    to the response, values rounded to seven decimals; `advantage` and `entropy` are means over the response. What no
    stage has filled is null.
    """
    lines = (
        json.dumps(_describe(group, sample, tokenizer_piece), ensure_ascii=False) + "\n"
        for group in groups
        for sample in group.samples
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, lines)


def _describe(group: Group, sample: Sample, tokenizer_piece: Callable[[int], str] | None) -> dict[str, Any]:
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
    if tokenizer_piece is not None:
        row["pieces"] = [tokenizer_piece(int(token)) for token in sample.response("tokens")]
    return row


def _mean(sample: Sample, field: str) -> float | None:
    if getattr(sample, field) is None or not sample.response_length:
        return None
    return _finite(float(sample.response(field).mean(dtype=np.float64)))


def _rounded(sample: Sample, field: str) -> list[float | None] | None:
    if getattr(sample, field) is None:
        return None
    return [_finite(round(float(value), 7)) for value in sample.response(field)]
