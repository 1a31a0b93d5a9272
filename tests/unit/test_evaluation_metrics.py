"""The metrics of an evaluation equal values computed by hand in exact fractions, and hold their bounds.

`tools/check_metrics.py` compares them with the expected numbers of lighteval and NeMo-Skills, which are not kept here.
"""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_entropy.evaluation import metrics


def verdicts(n, right):
    return [i < right for i in range(n)]


@pytest.mark.parametrize(
    "n, right, k, expected",
    [
        (16, 0, 16, Fraction(0)),
        (16, 1, 16, Fraction(1)),
        (16, 3, 8, Fraction(9, 10)),  # 1 - C(13, 8) / C(16, 8) = 1 - 1287 / 12870
        (3, 1, 2, Fraction(2, 3)),
        (10_000, 5_000, 1, Fraction(1, 2)),  # C(10000, 5000) overflows a float
        (10_000, 1, 10, Fraction(1, 1000)),
    ],
)
def test_pass_at_k(n, right, k, expected):
    assert metrics.pass_at_k(verdicts(n, right), k) == pytest.approx(float(expected), rel=1e-15)


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_at_k_metrics_equal_the_mean_over_all_subsets(correct, data):
    """The estimators are averages over every choice of k samples, written out."""
    k = data.draw(st.integers(1, len(correct)))
    tau = data.draw(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))
    hits = [sum(subset) for subset in itertools.combinations(correct, k)]
    successes = max(1, math.ceil(Fraction(tau) * k))
    expected = Fraction(sum(hit >= successes for hit in hits), len(hits))
    assert metrics.g_pass_at_k(correct, k, tau) == pytest.approx(float(expected), abs=1e-15)
    assert metrics.pass_at_k(correct, k) == pytest.approx(sum(map(bool, hits)) / len(hits), abs=1e-15)
    half = math.ceil(k / 2)
    area = Fraction(2, k) * sum(Fraction(max(0, hit - half), len(hits)) for hit in hits)
    assert metrics.mg_pass_at_k(correct, k) == pytest.approx(float(area), abs=1e-14)


def test_threshold_of_g_pass_is_not_raised_by_rounding():
    """0.3 * 10 is 3.0000000000000004 in floats; 3 of 10 right samples are enough at tau = 0.3."""
    assert 0.1 * 3 * 10 > 3
    assert metrics.g_pass_at_k(verdicts(10, 3), 10, 0.1 * 3) == 1.0


def test_more_samples_than_there_are_is_refused():
    for metric in (metrics.pass_at_k, metrics.avg_at_k, metrics.mg_pass_at_k):
        with pytest.raises(AssertionError, match="k = 3 of 2 samples"):
            metric([True, False], 3)


@pytest.mark.parametrize(
    "answers, correct, k, first, average",
    [
        (["3", "4", "4"], [True, False, False], 3, 0, 0),
        (["3", "4", "4"], [True, False, False], 1, 1, 1),
        (["3", "4", "5"], [True, False, False], 3, 1, Fraction(1, 3)),  # a tie of three
        (["4", "3", "3", "4", "5"], [False, True, True, False, False], 5, 0, Fraction(1, 2)),
        ([None, None, "3", "4"], [False, False, True, False], 4, 1, Fraction(1, 2)),  # no answer is no vote
        ([None, None], [False, False], 2, 0, 0),
        (["3", "3.0", "4", "4"], [True, True, False, False], 4, 0, 0),  # strings vote, not values
        (["3", "3", "4"], [True, False, False], 3, 1, Fraction(1, 3)),  # a timeout: one answer with two verdicts
    ],
)
def test_majority_vote(answers, correct, k, first, average):
    assert metrics.maj_at_k(answers, correct, k) == first
    assert metrics.maj_at_k(answers, correct, k, ties="average") == pytest.approx(float(average))


def test_spread_over_runs():
    """Two questions, three runs: run means 1/2, 1, 0; within the questions the variances are 1/3 and 1/3."""
    spread = metrics.run_statistics([[1, 1, 0], [0, 1, 0]])
    assert spread.mean == pytest.approx(1 / 2)
    assert spread.std_runs == pytest.approx(1 / 2) and spread.std_err_runs == pytest.approx(1 / math.sqrt(12))
    assert spread.mean_sample_std == pytest.approx(math.sqrt(1 / 3))
    assert math.isnan(metrics.run_statistics([[1], [0]]).std_err_runs)


def test_standard_error_is_that_of_question_means():
    """Question means 1, 1/2, 0: variance 1/4, error sqrt(1/12); n of Wilson's interval is 1/4 / (1/12) = 3."""
    estimate = metrics.clustered_mean([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]])
    assert estimate.mean == 0.5 and estimate.std_err == pytest.approx(math.sqrt(1 / 12))
    z2 = metrics.Z95**2
    half = math.sqrt(z2) / (1 + z2 / 3) * math.sqrt(1 / 12 + z2 / 36)
    assert (estimate.low, estimate.high) == pytest.approx((0.5 - half, 0.5 + half))


def test_interval_has_a_width_when_nothing_is_right():
    """0 of 30: Wilson's upper bound is z² / (30 + z²), however many samples of each question there were."""
    none = metrics.clustered_mean([[0]] * 30)
    z2 = metrics.Z95**2
    assert (none.std_err, none.low) == (0, 0) and none.high == pytest.approx(z2 / (30 + z2))
    assert metrics.clustered_mean([[0] * 16] * 30).high == pytest.approx(none.high)
    assert metrics.clustered_mean([[1, 1]] * 30).low == pytest.approx(1 - none.high)
    assert math.isnan(metrics.clustered_mean([[1, 0]]).low)


@given(st.lists(st.lists(st.integers(0, 1), min_size=3, max_size=3), min_size=2, max_size=12))
def test_interval_contains_the_mean_and_stays_inside_0_and_1(questions):
    estimate = metrics.clustered_mean(questions)
    assert 0 <= estimate.low <= estimate.mean + 1e-12 and estimate.mean - 1e-12 <= estimate.high <= 1


def test_mean_over_sets_ignores_their_sizes():
    assert metrics.mean_over_sets([0.2, 0.4], [0.03, 0.04]) == pytest.approx((0.3, 0.025))


def test_teca_curves():
    """Running means of [2, 1, 0, 1] are 2, 3/2, 1, 1."""
    assert metrics.teca_relative([2, 1, 0, 1], 7) == pytest.approx([2, 1.75, 1.5, 1.25, 1, 1, 1])
    assert metrics.teca_relative([0.5], 3) == pytest.approx([0.5, 0.5, 0.5])
    np.testing.assert_allclose(metrics.teca_absolute([2, 1, 0, 1], [1, 3, 4, 5]), [2, 1, 1, np.nan])


def test_bootstrap_of_equal_evaluations_finds_no_difference():
    assert metrics.paired_bootstrap([np.zeros(30)], [1]) == metrics.PairedBootstrap(0, 0, 0, 1)


def test_bootstrap_matches_the_normal_approximation_and_its_seed():
    differences = np.array([1] * 60 + [0] * 300 + [-1] * 40, np.float64)
    found = metrics.paired_bootstrap([differences], [1.0])
    error = differences.std() / 20
    assert found.difference == pytest.approx(0.05)
    assert found.low == pytest.approx(0.05 - 1.96 * error, abs=0.003)
    assert found.high == pytest.approx(0.05 + 1.96 * error, abs=0.003)
    assert found.p_value == pytest.approx(math.erfc(0.05 / error / math.sqrt(2)), abs=0.01)
    assert found == metrics.paired_bootstrap([differences[::-1]], [5.0])
    assert found != metrics.paired_bootstrap([differences], [1.0], seed=1)


def test_bootstrap_draws_each_benchmark_apart():
    """A benchmark whose differences are all equal adds no width; weights divide by their sum."""
    noisy = np.array([0.0, 1.0] * 50)
    alone, both = metrics.paired_bootstrap([noisy], [1]), metrics.paired_bootstrap([noisy, [0.25] * 7], [1, 1])
    assert both.difference == pytest.approx((0.5 + 0.25) / 2)
    assert both.high - both.low == pytest.approx((alone.high - alone.low) / 2, abs=1e-12)


def test_bootstrap_agrees_with_drawing_every_question():
    """The draw over distinct differences has the distribution of a plain resample: same error to 2 %."""
    differences = np.random.default_rng(3).choice([-1, -0.5, 0, 0.25, 1], 40)
    plain = np.random.default_rng(0).choice(differences, (20_000, 40)).mean(axis=1)
    ours = metrics.paired_bootstrap([differences], [1], resamples=20_000)
    low, high = np.quantile(plain, [0.025, 0.975])
    assert ours.high - ours.low == pytest.approx(high - low, rel=0.04)
