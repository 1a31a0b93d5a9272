"""How good the policy is on held-out questions: accuracy, token entropy, length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_entropy.config.schema import EvalConfig
from megatron_entropy.records import Group, Metric, Prompt
from megatron_entropy.trainer.rollouts import Sampler


def evaluate(sampler: Sampler, prompts: Sequence[Prompt], config: EvalConfig) -> tuple[dict[str, Metric], list[Group]]:
    """Sample held-out prompts with the current policy and measure; a collective.

    Returns:
        `eval/accuracy` (share of answers called right, of those the verifier could judge), `eval/entropy` (nats,
        mean over response tokens, at the evaluation temperature), `eval/length` (tokens, end token included),
        `eval/truncated`, `eval/errors`, with several samples per question `eval/pass_at_k` for k = 1, 2, 4, ...;
        and the scored groups.
    """
    chosen = prompts[: config.limit or None]
    groups = sampler.sample_for_evaluation(chosen, config.samples, config.temperature)
    groups = sampler.score(groups, temperature=config.temperature)
    samples = [sample for group in groups for sample in group.samples]
    judged = [s.grade.correct for s in samples if s.grade is not None and s.grade.correct is not None]
    tokens = sum(s.response_length for s in samples)
    metrics = {
        "eval/accuracy": Metric(sum(judged), len(judged)),
        "eval/entropy": Metric(float(sum(s.response("entropy").sum(dtype=np.float64) for s in samples)), tokens),
        "eval/length": Metric(tokens, len(samples)),
        "eval/truncated": Metric(sum(s.finish_reason == "length" for s in samples), len(samples)),
        "eval/errors": Metric(len(samples) - len(judged), len(samples)),
    }
    k = 1
    while 1 < config.samples >= k:
        metrics[f"eval/pass_at_{k}"] = Metric(sum(_pass_at(group, k) for group in groups), len(groups))
        k *= 2
    return metrics, groups


def _pass_at(group: Group, k: int) -> float:
    """Unbiased estimate of the chance that one of k answers is right (Chen et al. 2021, eq. 1)."""
    n = len(group.samples)
    right = sum(bool(s.grade and s.grade.correct) for s in group.samples)
    if n - right < k:
        return 1.0
    return 1.0 - float(np.prod([1.0 - k / i for i in range(n - right + 1, n + 1)]))
