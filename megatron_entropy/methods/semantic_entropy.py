"""Semantic entropy of a question, and the curriculum from low to high (SENT, arXiv 2512.04359).

A policy answers a question M times. Answers with the same meaning form a cluster. The entropy of the cluster
probabilities measures how uncertain the policy is about the answer, whatever words it uses. The paper computes it once,
before training, with the initial policy, and trains stage by stage from certain to uncertain questions.

The subcommand `semantic-entropy` samples and clusters. Only a summary of the paper's formulas could be read, and the
release has no code for them. What is unknown is chosen here: natural logarithms, and ties ordered by row number.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np

Weight = Literal["count", "likelihood", "length_norm"]


def semantic_entropy(
    clusters: Sequence[Hashable],
    *,
    weight: Weight = "count",
    logprobs: Sequence[float] | None = None,
    lengths: Sequence[int] | None = None,
) -> float:
    """Return the entropy of the cluster probabilities, in nats: between 0 and the logarithm of their number.

    Args:
        clusters: the cluster of every answer; at least one answer.
        weight: weight of an answer in its cluster. `count`: 1. `likelihood`: its probability, the paper's formula;
            among answers of hundreds of tokens one has almost all of it, and the entropy is 0. `length_norm`: the
            geometric mean of its token probabilities.
        logprobs: log-probability of every answer, summed over its tokens; not needed for `count`.
        lengths: tokens of every answer; for `length_norm`.
    """
    assert clusters, "a question without answers has no semantic entropy"
    logs = _log_weights(len(clusters), weight, logprobs, lengths)
    members: dict[Hashable, list[float]] = {}
    for cluster, log in zip(clusters, logs, strict=True):
        members.setdefault(cluster, []).append(log)
    masses = np.array([np.logaddexp.reduce(logs) for logs in members.values()])
    log_probs = masses - np.logaddexp.reduce(masses)
    return max(0.0, -float(np.sum(np.exp(log_probs) * log_probs)))


def _log_weights(
    count: int, weight: Weight, logprobs: Sequence[float] | None, lengths: Sequence[int] | None
) -> np.ndarray:
    if weight == "count":
        return np.zeros(count)
    assert logprobs is not None, f"{weight} needs log-probs"
    logs = np.asarray(logprobs, np.float64)
    if weight == "likelihood":
        return logs
    assert lengths is not None, "length_norm needs lengths"
    return logs / np.maximum(lengths, 1)


def split_curriculum(
    entropies: Sequence[float], *, stages: int = 1, thresholds: Sequence[float] = ()
) -> list[np.ndarray]:
    """Split questions into the stages of a curriculum, low entropies first.

    Args:
        entropies: of all questions, nats; equal ones keep their order.
        stages: number of ranges of equal size (later ones may have one question more).
        thresholds: ascending, instead of `stages`: the first range is below the first threshold, the last one at or
            above the last.
    Returns:
        For every stage the indices of its questions, ascending by entropy; a stage may be empty.
    """
    values = np.asarray(entropies, np.float64)
    order = np.argsort(values, kind="stable")
    if len(thresholds):
        edges = np.searchsorted(values[order], thresholds, side="left").tolist()
    else:
        edges = [len(values) * stage // stages for stage in range(1, stages)]
    return np.split(order, edges)
