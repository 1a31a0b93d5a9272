"""Metrics of an evaluation: pass@k, maj@k, G-Pass@k, TECA curves, their errors, and the paired bootstrap.

Nothing here reads files or grades. A question is a list of its samples in the order of their numbers: `correct` holds
the verdicts, `answers` the extracted answers. A benchmark is a list of such questions. Every metric of a benchmark is
the unweighted mean over its questions. `docs/evaluation_metrics.md` compares these estimators with those of others.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from megatron_entropy.methods.objectives import running_mean

Ties = Literal["first", "average"]

Z95 = 1.959963984540054
"""Quantile 0.975 of the normal distribution."""


def pass_at_k(correct: Sequence[bool], k: int) -> float:
    """Estimate without bias the probability that one of k responses is correct.

    Args:
        correct: the verdicts on all n samples of a question, k <= n.
    Returns:
        1 - C(n - c, k) / C(n, k) with c correct samples, computed in integers.
    Source:
        Chen et al. 2021 (arXiv 2107.03374), eq. 1.
    """
    return g_pass_at_k(correct, k, tau=0.0)


def g_pass_at_k(correct: Sequence[bool], k: int, tau: float) -> float:
    """Estimate without bias the probability that at least max(1, ceil(tau * k)) of k responses are correct.

    Args:
        correct: the verdicts on all n samples of a question, k <= n.
        tau: share of the k responses, in [0, 1]; 0 gives pass@k.
    Source:
        G-Pass@k, Liu et al. 2024 (arXiv 2412.13147): the tail of a hypergeometric distribution.
    """
    return _at_least(correct, k, max(1, math.ceil(tau * k - 1e-9)))


def mg_pass_at_k(correct: Sequence[bool], k: int) -> float:
    """Return the mean of G-Pass@k over thresholds above one half: 2/k * sum of it for ceil(k/2) + 1 to k successes.

    For k = 1 the sum is empty and the value 0, as in the releases.

    Source:
        mG-Pass@k, arXiv 2412.13147, as open-compass/GPassK and lighteval compute it.
    """
    return 2 / k * math.fsum(_at_least(correct, k, successes) for successes in range(math.ceil(k / 2) + 1, k + 1))


def _at_least(correct: Sequence[bool], k: int, successes: int) -> float:
    """Probability that k samples drawn without replacement hold that many correct ones."""
    assert 1 <= k <= len(correct), f"k = {k} of {len(correct)} samples"
    return _hypergeometric_tail(len(correct), sum(map(bool, correct)), k, successes)


@lru_cache(maxsize=65536)
def _hypergeometric_tail(n: int, c: int, k: int, successes: int) -> float:
    ways = sum(math.comb(c, hits) * math.comb(n - c, k - hits) for hits in range(successes, min(c, k) + 1))
    return ways / math.comb(n, k)


def avg_at_k(correct: Sequence[bool], k: int) -> float:
    """Return the fraction of correct samples among the first k; with k = n this is mean@n."""
    assert 1 <= k <= len(correct), f"k = {k} of {len(correct)} samples"
    return sum(map(bool, correct[:k])) / k


def maj_at_k(answers: Sequence[str | None], correct: Sequence[bool], k: int, *, ties: Ties = "first") -> float:
    """Return whether the most frequent answer among the first k samples is correct.

    Answers vote as strings. A sample without an answer (None) has no vote; without any vote the result is 0.

    Args:
        answers: what the grader extracted from each sample.
        correct: the verdicts on the same samples.
        ties: of several most frequent answers, `first` takes the one that came first (Qwen2.5-Math, lighteval);
            `average` averages their verdicts (NeMo-Skills).
    """
    assert 1 <= k <= len(answers) == len(correct), f"k = {k} of {len(answers)} answers and {len(correct)} verdicts"
    voters = [
        (answer, bool(right)) for answer, right in zip(answers[:k], correct[:k], strict=True) if answer is not None
    ]
    if not voters:
        return 0.0
    if ties == "first":
        winner = Counter(answer for answer, _ in voters).most_common(1)[0][0]  # the first one that was counted
        return float(next(right for answer, right in voters if answer == winner))
    votes = Counter(voters)  # an answer with two verdicts counts as two answers, as there
    most = max(votes.values())
    winners = [right for (_, right), count in votes.items() if count == most]
    return sum(winners) / len(winners)


@dataclass(frozen=True)
class RunStatistics:
    """Spread of a score over runs; run i holds sample i of every question.

    `std_runs`: standard deviation of the run means (n - 1 in the denominator). `std_err_runs`: `std_runs` / sqrt(runs),
    the error of `mean` from sampling alone, with the questions fixed. `mean_sample_std`: standard deviation within a
    question, averaged over questions. NaN with a single run.
    """

    mean: float
    std_runs: float
    std_err_runs: float
    mean_sample_std: float


def run_statistics(scores: Sequence[Sequence[float]] | np.ndarray) -> RunStatistics:
    """Compute the spread over runs.

    Args:
        scores: [questions, runs].
    Source:
        NeMo-Skills, `BaseMetrics._add_std_metrics`.
    """
    table = np.asarray(scores, np.float64)
    runs = table.shape[1]
    if runs < 2:
        return RunStatistics(float(table.mean()), math.nan, math.nan, math.nan)
    std = float(table.mean(axis=0).std(ddof=1))
    within = float(table.std(axis=1, ddof=1).mean())
    return RunStatistics(float(table.mean()), std, std / math.sqrt(runs), within)


@dataclass(frozen=True)
class Estimate:
    """A mean of fractions with its standard error and 95 % interval; error and interval are NaN for fewer than 2."""

    mean: float
    std_err: float
    low: float
    high: float


def clustered_mean(questions: Sequence[Sequence[float]]) -> Estimate:
    """Estimate the mean of a fraction over questions; the samples of one question form a cluster.

    Args:
        questions: values in [0, 1], at least one for each question.
    Returns:
        The mean of the question means. Its standard error is their standard deviation / sqrt(questions), which covers
        the choice of questions and the sampling. The interval is Wilson's with the effective sample size
        mean * (1 - mean) / std_err², between the number of questions and that of samples; so it stays inside [0, 1] and
        has a width where all samples are right or wrong.
    Source:
        Miller 2024 (arXiv 2411.00640) for the clusters; the interval: Korn and Graubard's effective sample size in
        Wilson's formula, as in Franco et al. 2019 (J. Survey Statistics and Methodology 7).
    """
    means = np.array([np.mean(values) for values in questions], np.float64)
    mean = float(means.mean())
    if len(means) < 2:
        return Estimate(mean, math.nan, math.nan, math.nan)
    error = float(means.std(ddof=1)) / math.sqrt(len(means))
    samples = sum(map(len, questions))
    variance = mean * (1 - mean)
    effective = min(max(variance / error**2, len(means)), samples) if error > 1e-9 else len(means)
    return Estimate(mean, error, *wilson_interval(mean, effective))


def wilson_interval(mean: float, n: float) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a fraction that is the mean of n independent observations."""
    shrink = 1 + Z95**2 / n
    center = (mean + Z95**2 / (2 * n)) / shrink
    half = Z95 / shrink * math.sqrt(mean * (1 - mean) / n + Z95**2 / (4 * n**2))
    return max(0.0, center - half), min(1.0, center + half)


def mean_over_sets(means: Sequence[float], errors: Sequence[float]) -> tuple[float, float]:
    """Return the unweighted mean over benchmarks, as CurioSFT's tables, and its standard error."""
    return math.fsum(means) / len(means), math.sqrt(math.fsum(error**2 for error in errors)) / len(errors)


def teca_relative(entropy: Sequence[float] | np.ndarray, points: int) -> np.ndarray:
    """Return the running mean of a response's token entropies at equally spaced relative positions.

    Args:
        entropy: [n] nats, n >= 1.
        points: their number; the first is the first token, the last the end of the response.
    Returns:
        [points] float64 nats, interpolated linearly. The mean of such curves over responses is CER's figure.
    Source:
        TECA, arXiv 2510.02249; plot_func.py of its release interpolates in the same way.
    """
    series = running_mean(np.asarray(entropy, np.float64))
    return np.interp(np.linspace(0, 1, points), np.linspace(0, 1, len(series)), series)


def teca_absolute(entropy: Sequence[float] | np.ndarray, positions: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the running mean of a response's token entropies after given numbers of tokens.

    Args:
        entropy: [n] nats, n >= 1.
        positions: numbers of tokens, each >= 1.
    Returns:
        [positions] float64 nats, NaN where the response is shorter. A mean over responses must skip NaN, so behind the
        shortest response it covers fewer and fewer of them.
    """
    series = running_mean(np.asarray(entropy, np.float64))
    indices = np.asarray(positions) - 1
    return np.where(indices < len(series), series[np.minimum(indices, len(series) - 1)], np.nan)


@dataclass(frozen=True)
class PairedBootstrap:
    """Difference of two means on the same questions, 95 % interval, and the p-value of "there is no difference"."""

    difference: float
    low: float
    high: float
    p_value: float


def paired_bootstrap(
    strata: Sequence[Sequence[float] | np.ndarray], weights: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> PairedBootstrap:
    """Bootstrap the weighted mean of question-by-question differences.

    The questions of each stratum (a benchmark) are drawn with replacement. Questions with equal differences are the
    same for the mean, so a resample is one draw from a multinomial distribution over the distinct differences.

    Args:
        strata: differences of each benchmark's questions, at least one each.
        weights: of the benchmarks; their sum is the divisor.
        resamples: their number.
        seed: of the generator; the same seed gives the same interval.
    Returns:
        The percentile interval, and the two-sided p-value: the fraction of resamples that deviate from the observed
        difference by at least its size, with 1 added above and below the line.
    Source:
        Efron and Tibshirani 1993, chapters 13 and 16; Davison and Hinkley 1997, chapter 4, for the added 1.
    """
    generator = np.random.default_rng(seed)
    observed, replicates, total = 0.0, np.zeros(resamples), math.fsum(weights)
    for differences, weight in zip(strata, weights, strict=True):
        values, counts = np.unique(np.asarray(differences, np.float64), return_counts=True)
        size = int(counts.sum())
        observed += weight / total * float(values @ counts) / size
        draws = generator.multinomial(size, counts / size, size=resamples)
        replicates += weight / total * (draws @ values) / size
    low, high = np.quantile(replicates, [0.025, 0.975])
    extreme = np.count_nonzero(np.abs(replicates - observed) >= abs(observed) - 1e-12)
    return PairedBootstrap(observed, float(low), float(high), (1 + int(extreme)) / (1 + resamples))
