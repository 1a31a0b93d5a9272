"""Measure the policy on eval questions: accuracy, token entropy, response length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from megatron_entropy.config.schema import EvalConfig
from megatron_entropy.evaluation.metrics import pass_at_k
from megatron_entropy.records import Group, Metric, Prompt, samples_of


class EvalRollouts(Protocol):
    """What an evaluation needs."""

    def sample_eval(self, prompts: Sequence[Prompt], config: EvalConfig) -> list[Group]:
        """Sample graded responses to each prompt from the policy, with the evaluation's sampling parameters."""
        ...

    def score(self, groups: Sequence[Group], *, temperature: float, logprob: bool) -> list[Group]:
        """Fill `entropy` of every response token, and `logprob` if requested or if it costs nothing."""
        ...


def evaluate(
    rollouts: EvalRollouts, prompts: Sequence[Prompt], config: EvalConfig
) -> tuple[dict[str, Metric], list[Group]]:
    """Sample eval prompts with the current policy and measure the responses; a collective.

    Returns:
        `eval/accuracy` (fraction of correct responses among those the verifier could grade), `eval/entropy` (nats,
        mean over response tokens, at the eval temperature, of the
        whole vocabulary), `eval/length` (tokens, end token included),
        `eval/truncated` and `eval/errors` (fractions), with several samples per question `eval/pass_at_k` for k = 1, 2,
        4, ...; and the scored groups.
    """
    groups = rollouts.sample_eval(prompts[: config.limit or None], config)
    groups = rollouts.score(groups, temperature=config.temperature, logprob=False)
    samples = samples_of(groups)
    graded = [s.grade.correct for s in samples if s.grade is not None and s.grade.correct is not None]
    num_tokens = sum(s.response_length for s in samples)
    metrics = {
        "eval/accuracy": Metric(sum(graded), len(graded)),
        "eval/entropy": Metric(float(sum(s.response("entropy").sum(dtype=np.float64) for s in samples)), num_tokens),
        "eval/length": Metric(num_tokens, len(samples)),
        "eval/truncated": Metric(sum(s.finish_reason == "length" for s in samples), len(samples)),
        "eval/errors": Metric(len(samples) - len(graded), len(samples)),
    }
    correct = [[bool(s.grade and s.grade.correct) for s in group.samples] for group in groups]
    k = 1
    while 1 < config.samples >= k:
        metrics[f"eval/pass_at_{k}"] = Metric(sum(pass_at_k(verdicts, k) for verdicts in correct), len(groups))
        k *= 2
    return metrics, groups
