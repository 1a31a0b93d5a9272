"""Semantic entropy of a question, and the curriculum that goes from low to high (SENT, arXiv 2512.04359).

A policy answers a question M times; answers that mean the same form a cluster; the entropy of the clusters' shares is
how uncertain the policy is about the answer, whatever words it uses. The paper computes it once, before training, with
the policy that training starts from, and trains stage by stage from certain to uncertain questions.

Sampling and clustering are in `tools/semantic_entropy.py`. Of the paper only a summary of these formulas could be read,
and the release ships no code for them; what is unknown is chosen here: natural logarithms, ties by place in the data.
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
    """Entropy of the clusters' shares, in nats: at least 0, at most the logarithm of their number.

    Args:
        clusters: for every answer, of at least one, which cluster it is in.
        weight: what an answer counts. `count`: 1. `likelihood`: its probability, the paper's formula; of answers of
            hundreds of tokens one takes all, whatever it says, and the entropy is 0. `length_norm`: the geometric mean
            of its tokens' probabilities.
        logprobs: of every answer, summed over its tokens; not needed to count.
        lengths: of every answer in tokens; for `length_norm`.
    """
    assert clusters, "a question without answers has no semantic entropy"
    logs = _log_weights(len(clusters), weight, logprobs, lengths)
    members: dict[Hashable, list[float]] = {}
    for cluster, log in zip(clusters, logs, strict=True):
        members.setdefault(cluster, []).append(log)
    masses = np.array([np.logaddexp.reduce(logs) for logs in members.values()])
    shares = masses - np.logaddexp.reduce(masses)
    return max(0.0, -float(np.sum(np.exp(shares) * shares)))


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
    """Cut questions into the stages of a curriculum, low entropies first.

    Args:
        entropies: of all questions; equal ones keep their order.
        stages: so many parts of equal size (the later ones one longer where it does not divide).
        thresholds: ascending, in place of `stages`: the first stage lies below the first of them, the last not below
            the last.
    Returns:
        For every stage the places of its questions, ascending by entropy; a stage may be empty.
    """
    values = np.asarray(entropies, np.float64)
    order = np.argsort(values, kind="stable")
    if len(thresholds):
        edges = np.searchsorted(values[order], thresholds, side="left").tolist()
    else:
        edges = [len(values) * stage // stages for stage in range(1, stages)]
    return np.split(order, edges)
