"""CER against the worked numbers of its release (arXiv 2510.02249), and what its reward must never do."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from entropy_kernels import token_stats_from_logits
from megatron_entropy.config.schema import BatchConfig, Config, LoraConfig, RolloutConfig
from megatron_entropy.data.packing import pack
from megatron_entropy.methods import build_method, objectives
from megatron_entropy.methods.cer import Cer, CerConfig, segmented_reward
from megatron_entropy.records import Grade, Group, Metric, Prompt, Sample
from megatron_entropy.rewards.registry import load_verifier

PROMPT = Prompt(0, "q", (1, 2, 3), "42")
ENTROPIES = st.lists(st.floats(0, 12), min_size=1, max_size=30)


def cer(**settings) -> Cer:
    config = CerConfig(**settings)
    batch, rollout = BatchConfig(prompts=1, samples=8), RolloutConfig(max_response_tokens=4096, temperature=1.5)
    built = build_method(Config(steps=1, method=config, batch=batch, rollout=rollout))
    assert isinstance(built, Cer)
    return built


def answer(entropies, correct: bool | None = True, prompt_entropies=(0, 0, 0)) -> Sample:
    """A response with these entropies; the prompt's positions hold what they hold."""
    column = np.array([*prompt_entropies, *entropies], np.float32)
    error = "timeout" if correct is None else None
    return Sample(np.ones(len(column), np.int32), 3, "stop", "", grade=Grade(correct, error=error), entropy=column)


def reward(*samples: Sample) -> list[float | None]:
    (group,) = cer().reward([Group(PROMPT, samples)])
    return [s.reward for s in group.samples]


# Entropies and their series


@pytest.mark.parametrize(
    "probabilities,expected",
    [
        ([0.5, 0.5], 0.693147),
        ([0.25] * 4, 1.386294),
        ([0.7, 0.2, 0.1], 0.801819),
        ([0.9, 0.05, 0.03, 0.02], 0.428048),
        ([1, 0, 0], 0),
    ],
)
def test_entropy(probabilities, expected):
    logits = torch.tensor([probabilities], dtype=torch.float64).clamp(min=1e-300).log()
    assert token_stats_from_logits(logits, torch.tensor([0])).entropy.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("temperature,expected", [(0.8, 0.798839), (1.0, 0.947537), (1.5, 1.152640)])
def test_entropy_is_that_at_the_rollout_temperature(temperature, expected):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    stats = token_stats_from_logits(logits, torch.tensor([1]), temperature=temperature)
    assert stats.entropy.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "entropies,series,expected",
    [
        ([1, 2, 3], [1, 1.5, 2], 1.06766764),
        ([2, 1, 0, 0], [2, 1.5, 1, 0.75], 1.23618328),
        ([0, 0], [0, 0], 1.5),
        ([0.9, 0.3, 0.6, 0], [0.9, 0.6, 0.6, 0.45], 1 + math.exp(-0.45) / 2),
    ],
)
def test_teca_and_reward(entropies, series, expected):
    np.testing.assert_allclose(objectives.running_mean(np.array(entropies)), series)
    right, wrong = reward(answer(entropies), answer(entropies, correct=False))
    assert right == pytest.approx(expected, abs=1e-8 * 2) and wrong == 0


def test_the_series_of_nothing_is_nothing():
    assert objectives.running_mean(np.zeros(0)).shape == (0,)


def test_reward_weights_are_the_switches_of_the_parts():
    assert segmented_reward(True, 0.7, entropy_weight=0) == 0.5
    assert segmented_reward(True, 0.7, accuracy_weight=0) == pytest.approx((1 + math.exp(-0.7)) / 2)
    assert segmented_reward(False, 0.7) == 0


# Prompt and padding


@given(ENTROPIES, st.lists(st.floats(0, 50), min_size=3, max_size=3))
def test_prompt_positions_never_count(entropies, before):
    assert reward(answer(entropies, prompt_entropies=before)) == reward(answer(entropies))


def test_padding_never_counts():
    """A record ends with its last token; what a pack adds to it has neither weight nor entropy."""
    sample = dataclasses.replace(answer([1, 2, 3]), weight=np.array([0, 0, 0, 1, 1, 1], np.float32))
    batch = pack([sample], [0], multiple=8, device=torch.device("cpu"))
    assert batch.entropy.tolist() == [0, 0, 1, 2, 3, 0, 0, 0] and batch.weight.tolist() == [0, 0, 1, 1, 1, 0, 0, 0]
    assert reward(sample) == [pytest.approx(1.06766764)]


# Invariants


@given(ENTROPIES, st.randoms())
def test_reward_knows_no_order(entropies, random):
    mixed = random.sample(entropies, len(entropies))
    assert reward(answer(mixed)) == [pytest.approx(reward(answer(entropies))[0], rel=1e-12)]


@given(ENTROPIES, ENTROPIES)
def test_right_beats_wrong_by_more_than_one(right, wrong):
    high, low = reward(answer(right), answer(wrong, correct=False))
    assert low == 0 and 1 < high <= 1.5


@given(st.floats(0, 12), st.floats(1e-3, 12))
def test_reward_decreases_strictly_in_teca(teca, more):
    assert segmented_reward(True, teca + more) < segmented_reward(True, teca)


# The group


def test_advantages_of_a_group():
    tecas = [0.2, 0.4, 0.6, None, 0.3, None, 0.8, 0.5]
    samples = [answer([teca or 9.0] * 4, correct=teca is not None) for teca in tecas]
    chosen = cer()
    (group,) = chosen.compute_advantages(chosen.reward([Group(PROMPT, tuple(samples))]))
    np.testing.assert_allclose(
        [s.reward for s in group.samples],
        [1.409365, 1.335160, 1.274406, 0, 1.370409, 0, 1.224664, 1.303265],
        atol=1e-6,
    )
    np.testing.assert_allclose(
        [s.response("advantage")[0] for s in group.samples],
        [0.684205, 0.563235, 0.464194, -1.613339, 0.620698, -1.613339, 0.383106, 0.511241],
        atol=1e-6,
    )
    assert chosen.pop_metrics()["reward/teca"].count == 8


@given(st.lists(st.floats(0.01, 5), min_size=2, max_size=8, unique_by=lambda teca: round(teca, 2)))
def test_among_right_answers_the_more_confident_has_the_larger_advantage(tecas):
    chosen = cer()
    (group,) = chosen.compute_advantages(chosen.reward([Group(PROMPT, tuple(answer([teca] * 3) for teca in tecas))]))
    ranked = sorted(group.samples, key=lambda s: s.response("entropy")[0])
    advantages = [float(s.response("advantage")[0]) for s in ranked]
    assert advantages == sorted(advantages, reverse=True) and advantages[0] > advantages[-1]


@pytest.mark.parametrize(
    "response,truth,correct",
    [
        (r"a \boxed{3} b \boxed{ 42 }", "42", True),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
        (r"\boxed{42.0}", "42", False),
        ("none", "42", False),
        (r"\fbox{42}", "42", True),
    ],
)
def test_accuracy_of_the_release(response, truth, correct):
    assert load_verifier("boxed")(response, truth).correct == correct


def test_settings_are_those_of_the_released_runs():
    config, chosen = CerConfig(), cer()
    assert (config.clip_low, config.clip_high, config.dual_clip, config.kl_coefficient) == (0.2, 0.2, 3.0, 0.001)
    assert chosen.reference == "initial" and "entropy" in chosen.scores
    assert LoraConfig(rank=64, alpha=32).scale == 0.5


# Hard cases


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("correct", [True, False, None])
def test_a_response_without_a_token_is_left_out_and_counted(correct):
    chosen = cer()
    samples = (answer([], correct=correct), answer([1, 2]), answer([1], correct=False))
    (group,) = chosen.compute_advantages(chosen.reward([Group(PROMPT, samples)]))
    assert [s.response_length for s in group.samples] == [2, 1]
    counted = chosen.pop_metrics()
    assert counted["train/empty"] == Metric(1, 3) and counted["reward/teca"].count == 2
    for s in group.samples:
        assert np.isfinite(s.advantage).all() and np.isfinite(s.weight).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "samples",
    [
        (answer([1, 2]),),
        (answer([1, 2]), answer([2, 1]), answer([1.5])),
        (answer([1], correct=False), answer([2], correct=False)),
        (answer([1], correct=None), answer([2], correct=None)),
        (),
    ],
    ids=["one member", "equal confidence", "all wrong", "ungraded", "nobody"],
)
def test_a_group_without_signal_is_counted(samples):
    chosen = cer()
    (group,) = chosen.compute_advantages(chosen.reward([Group(PROMPT, samples)]))
    assert not any(s.advantage.any() for s in group.samples)
    assert chosen.pop_metrics()["train/zero_advantage"] == Metric(1, 1)


def test_an_answer_that_could_not_be_judged_is_no_wrong_one():
    assert reward(answer([1], correct=None)) == [None]
