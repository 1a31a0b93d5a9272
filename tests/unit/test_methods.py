"""Methods against worked numbers: the formulas of GRPO and DAPO, hard cases of the hooks, settings without effect.

Vectors are those of the DAPO paper's formulas worked by hand (advantages with ddof = 1 and eps 1e-6, as in verl).
"""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from entropy_kernels import TokenStats
from megatron_entropy.config import load
from megatron_entropy.config.schema import BatchConfig, Config, EvalConfig, RewardConfig, RolloutConfig
from megatron_entropy.errors import CheckpointError, ConfigError, DataError
from megatron_entropy.evaluation.evaluate import evaluate
from megatron_entropy.methods import METHOD_CONFIGS, build_method, load_method_config, objectives
from megatron_entropy.monitor.timer import StepTimer
from megatron_entropy.records import Batch, Grade, Group, Metric, Prompt, Sample
from megatron_entropy.rollout.engine import Completion, Request
from megatron_entropy.trainer.rollouts import MethodRollouts

PROMPT = Prompt(0, "q", (1, 2, 3), "7", (4, 5))


def sample(correct: bool | None = True, response: int = 4) -> Sample:
    tokens = np.arange(3 + response, dtype=np.int32)
    return Sample(tokens, 3, "stop", "", grade=Grade(correct, error=None if correct is not None else "timeout"))


def group(*verdicts: bool | None) -> Group:
    return Group(PROMPT, tuple(sample(verdict) for verdict in verdicts))


def method(name: str, prompts: int = 2, **settings):
    config = METHOD_CONFIGS[name](**settings)
    rollout = RolloutConfig(max_response_tokens=2596)
    return build_method(Config(steps=1, method=config, batch=BatchConfig(prompts=prompts, samples=4), rollout=rollout))


@pytest.mark.parametrize(
    "right,wrong,expected",
    [(4, 12, (1.677049, -0.559016)), (1, 15, (3.749993, -0.250000))],
)
def test_group_advantage(right, wrong, expected):
    advantage = objectives.group_advantage([1.0] * right + [-1.0] * wrong)
    np.testing.assert_allclose([advantage[0], advantage[-1]], expected, atol=1e-6)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=20), st.floats(-5, 5))
def test_group_advantage_is_centred_and_shift_invariant(rewards, shift):
    advantage = objectives.group_advantage(rewards)
    assert abs(advantage.sum()) < 1e-6 * len(rewards)
    if np.std(rewards) > 1e-3:  # below, eps and the rounding of the shift are of the size of the rewards' spread
        np.testing.assert_allclose(objectives.group_advantage([r + shift for r in rewards]), advantage, atol=1e-4)


@pytest.mark.parametrize("rewards", [[], [1.0], [0.5, 0.5, 0.5]])
def test_groups_without_signal_have_no_advantage(rewards):
    assert not objectives.group_advantage(rewards).any()


@pytest.mark.parametrize(
    "advantage,ratio,expected,has_gradient",
    [
        (1, 0.5, -0.5, True), (1, 1.1, -1.1, True), (1, 1.28, -1.28, True), (1, 1.5, -1.28, False),
        (-1, 0.5, 0.8, False), (-1, 1.1, 1.1, True), (-1, 1.5, 1.5, True), (-1, 50.0, 10.0, False),
    ],
)  # fmt: skip
def test_clipped_surrogate(advantage, ratio, expected, has_gradient):
    logprob = torch.tensor([np.log(ratio)], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    loss, clipped = objectives.clipped_surrogate(
        logprob, zero, torch.tensor([float(advantage)], dtype=torch.float64), low=0.2, high=0.28, dual=10.0
    )
    loss.sum().backward()
    assert loss.item() == pytest.approx(expected)
    if ratio != 1.28:  # at the kink either answer is right
        assert bool(logprob.grad) == has_gradient and bool(clipped) != has_gradient


@pytest.mark.parametrize("length,expected", [(2084, 0.0), (2085, -0.001953125), (2596, -1.0), (100, 0.0)])
def test_soft_overlong_penalty(length, expected):
    assert objectives.soft_overlong_penalty(length, limit=2596, buffer=512) == expected


@given(st.floats(-8, 8), st.floats(-8, 8))
def test_divergence_estimators(logprob, other):
    p, q = torch.tensor([logprob], dtype=torch.float64), torch.tensor([other], dtype=torch.float64)
    assert objectives.k3(p, q).item() >= -1e-12 and objectives.k2(p, q).item() >= 0
    assert objectives.k1(p, q).item() == pytest.approx(logprob - other)
    assert objectives.k3(p, q).item() == pytest.approx(np.exp(other - logprob) - 1 - (other - logprob), rel=1e-9)


@pytest.mark.parametrize(
    "log_ratio,value,has_gradient",
    [
        (2.6, 9.8637, True), (2.61, 9.9891, True), (2.62, 10, False), (5, 10, False), (50, 10, False), (-10, 9, True),
        (-12, 10, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["grpo", "sent"])
def test_the_penalty_is_verls_low_var_kl_and_metrics_have_no_bound(name, log_ratio, value, has_gradient):
    """verl's core_algos.py: the log-ratio within 20, then k3 within 10, no gradient beyond either."""
    logprob = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    reference = torch.full((1,), float(log_ratio), dtype=torch.float64)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    batch = Batch(
        *(torch.zeros(1) for _ in range(4)), order=(0,), weight=one, advantage=zero, logprob=reference,
        reference_logprob=reference, kl_weight=one if name == "grpo" else zero,
    )  # fmt: skip
    loss, metrics = method(name, kl_coefficient=1.0).loss(TokenStats(logprob=logprob, entropy=one), batch)
    loss.sum().backward()
    assert loss.item() == pytest.approx(value, abs=1e-3) and bool(logprob.grad) == has_gradient
    bounded = min(log_ratio, 20)
    assert metrics["policy/approx_kl"].value == pytest.approx(np.exp(bounded) - 1 - bounded)


def test_importance_weights_are_capped_and_carry_no_gradient():
    old = torch.tensor([0.0, 0.0], requires_grad=True)
    weight = objectives.tis_weight(old, torch.tensor([-np.log(1.5), -5.0]), 2.0)
    np.testing.assert_allclose(weight.numpy(), [1.5, 2.0], rtol=1e-6)
    assert not weight.requires_grad


class Stub:
    """Rollouts that answer from a script: verdicts of the groups of each round."""

    def __init__(self, *rounds: list[tuple]) -> None:
        self.rounds = iter(rounds)
        self.taken = 0

    def take_prompts(self, count: int) -> list[Prompt]:
        self.taken += count
        return [PROMPT] * count

    def sample(self, prompts, num_samples) -> list[Group]:
        return [group(*verdicts) for verdicts in next(self.rounds)]

    def score_reference(self, groups) -> list[Group]:
        return [
            g.with_samples(dataclasses.replace(s, reference_logprob=s.constant(-1)) for s in g.samples) for g in groups
        ]


MIXED, RIGHT, WRONG = (True, False, False, False), (True,) * 4, (False,) * 4


@pytest.mark.parametrize("name", ["dapo", "clip_cov", "kl_cov"])
def test_unanimous_groups_are_dropped_and_replaced(name):
    """verl's recipes of all three set `filter_groups.enable`."""
    stub = Stub([RIGHT, MIXED], [WRONG, RIGHT], [MIXED, MIXED])
    chosen = method(name)
    groups = chosen.generate(stub)
    assert len(groups) == 2 and stub.taken == 6
    metrics = chosen.pop_metrics()
    assert metrics["rollout/rounds"].value == 3 and metrics["rollout/mixed_groups"].value == 0.5
    assert not chosen.pop_metrics(), "metrics are counted per step"


@pytest.mark.parametrize("name", ["dapo", "clip_cov", "kl_cov"])
def test_unanimous_groups_are_kept_without_dynamic_sampling(name):
    stub = Stub([RIGHT, MIXED])
    assert len(method(name, dynamic_sampling=False).generate(stub)) == 2 and stub.taken == 2


def test_dapo_trains_on_what_it_has_after_max_rounds():
    groups = method("dapo", max_rounds=2).generate(Stub([RIGHT, MIXED], [WRONG, RIGHT]))
    assert len(groups) == 1


def test_dapo_filters_by_verdicts_not_by_penalties():
    chosen = method("dapo", overlong_buffer=512)
    long = dataclasses.replace(sample(True), tokens=np.zeros(3 + 2596, np.int32))
    rewarded = chosen.reward([Group(PROMPT, (sample(True), long))])[0]
    assert [s.reward for s in rewarded.samples] == [1.0, 0.0]
    stub = Stub()
    stub.sample = lambda prompts, num_samples: [Group(PROMPT, (sample(True), long))]
    assert method("dapo", max_rounds=1, overlong_buffer=512).generate(stub) == []


def test_weights_are_normalized_over_the_tokens_of_the_step():
    chosen = method("grpo")
    groups = chosen.compute_advantages(
        chosen.reward([group(*MIXED), Group(PROMPT, (sample(True, 10), sample(False, 2)))])
    )
    samples = [s for g in groups for s in g.samples]
    tokens = sum(s.response_length for s in samples)
    assert sum(s.weight.sum() for s in samples) == pytest.approx(1)
    for s in samples:
        np.testing.assert_allclose(s.response("weight"), 1 / tokens, rtol=1e-6)
        assert not s.weight[:3].any() and not s.advantage[:3].any()


def test_sequence_aggregation_gives_every_response_the_same_weight():
    chosen = method("grpo", aggregation="sequence")
    groups = chosen.compute_advantages(chosen.reward([Group(PROMPT, (sample(True, 10), sample(False, 2)))]))
    for s in groups[0].samples:
        assert s.weight.sum() == pytest.approx(0.5)


def test_an_ungraded_response_is_left_out():
    chosen = method("grpo")
    groups = chosen.compute_advantages(chosen.reward([group(True, None, False)]))
    assert [s.grade.correct for s in groups[0].samples] == [True, False]
    advantages = [s.response("advantage")[0] for s in groups[0].samples]
    np.testing.assert_allclose(advantages, [0.70710578, -0.70710578], atol=1e-5)


def test_an_empty_response_is_left_out():
    chosen = method("grpo")
    groups = chosen.compute_advantages(
        chosen.reward([Group(PROMPT, (sample(True, 0), sample(True, 4), sample(False, 4)))])
    )
    assert [s.response_length for s in groups[0].samples] == [4, 4]
    assert chosen.pop_metrics()["train/empty"].value == pytest.approx(1 / 3)


def test_groups_without_signal_are_counted():
    chosen = method("grpo")
    groups = chosen.compute_advantages(chosen.reward([group(*MIXED), group(*RIGHT), group(True), group(None, None)]))
    assert not any(s.advantage.any() for g in groups[1:] for s in g.samples)
    assert chosen.pop_metrics()["train/zero_advantage"] == Metric(3, 4)


def test_a_kl_penalty_uses_the_reference():
    plain, with_kl = method("grpo"), method("grpo", kl_coefficient=0.04)
    groups = [group(*MIXED)]
    assert plain.reference == "none" and plain.score_reference(groups, Stub()) is groups
    assert with_kl.reference == "initial"
    trained = with_kl.compute_advantages(with_kl.reward(with_kl.score_reference(groups, Stub())))[0].samples
    for s in trained:
        np.testing.assert_allclose(s.kl_weight, s.constant(0.04))
        assert s.reference_logprob is not None
    assert plain.compute_advantages(plain.reward(groups))[0].samples[0].kl_weight is None


@pytest.mark.parametrize("penalized", [True, False])
def test_loss_adds_the_weighted_penalty(penalized):
    chosen = method("grpo", kl_coefficient=0.5 if penalized else 0.0)
    logprob = torch.tensor([-1.0, -2.0])
    batch = Batch(
        *(torch.zeros(2) for _ in range(4)), order=(0,), weight=torch.tensor([1.0, 0.0]), advantage=torch.zeros(2),
        logprob=logprob, reference_logprob=torch.tensor([-1.5, -9.0]),
        kl_weight=torch.tensor([0.5, 0.5]) if penalized else None,
    )  # fmt: skip
    loss, metrics = chosen.loss(TokenStats(logprob=logprob, entropy=torch.ones(2)), batch)
    k3 = np.exp(-0.5) - 1 + 0.5
    assert loss[0].item() == pytest.approx(0.5 * k3 if penalized else 0.0)
    assert ("policy/kl_penalty" in metrics) == penalized
    if penalized:
        assert metrics["policy/kl_penalty"].value == pytest.approx(k3) and metrics["policy/penalized_frac"].value == 1


@pytest.mark.parametrize(
    "settings,expected",
    [
        ({}, Request((0, 0), (1, 2, 3), 0, max_tokens=96, temperature=1.0)),
        (
            {"temperature": 0.8, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.15, "max_response_tokens": 128},
            Request((0, 0), (1, 2, 3), 0, 128, temperature=0.8, top_p=0.95, top_k=40, repetition_penalty=1.15),
        ),
    ],
)
def test_evaluation_samples_by_its_own_settings(settings, expected):
    """Of the rollouts it takes the length only, and that only if it has none of its own."""
    rollout = RolloutConfig(max_response_tokens=96, temperature=1.5, top_p=0.9)
    config = Config(
        steps=1, method=METHOD_CONFIGS["grpo"](), rollout=rollout, eval=EvalConfig(samples=2, **settings),
        reward=RewardConfig(verifier="boxed"),
    )  # fmt: skip
    requests = []

    class Service:
        version = 1

        def generate(self, wanted, **names) -> list[Completion]:
            requests.extend(wanted)
            return [Completion(r.key, np.array([4], np.int32), np.zeros(1, np.float32), "stop") for r in wanted]

    class Words:
        def decode(self, tokens) -> str:
            return r"\boxed{7}"

    rollouts = MethodRollouts(
        config, stream=None, tokenizer=Words(), actor=None, service=Service(), timer=StepTimer(), temperature=1.5
    )
    rollouts.score = lambda groups, temperature, logprob: [
        g.with_samples(dataclasses.replace(s, entropy=s.constant(temperature)) for s in g.samples) for g in groups
    ]
    metrics, (evaluated,) = evaluate(rollouts, [PROMPT], config.eval)
    assert metrics["eval/accuracy"] == Metric(2, 2) and [s.grade.correct for s in evaluated.samples] == [True, True]
    assert metrics["eval/entropy"].value == pytest.approx(config.eval.temperature)
    assert len({r.seed for r in requests}) == 2 and [r.key for r in requests] == [(0, 0), (0, 1)]
    assert dataclasses.replace(requests[0], seed=0) == expected
    assert config.max_sequence_tokens == config.data.max_prompt_tokens + expected.max_tokens


def test_the_state_of_another_method_is_refused():
    chosen = method("grpo")
    chosen.restore(chosen.state())
    with pytest.raises(CheckpointError, match="passes"):
        chosen.restore({"passes": 3})


def test_sft_trains_on_targets():
    chosen = method("sft")
    groups = chosen.compute_advantages(chosen.generate(Stub()))
    only = groups[0].samples[0]
    assert only.tokens.tolist() == [1, 2, 3, 4, 5] and only.prompt_length == 3
    assert only.weight.tolist() == [0, 0, 0, 0.25, 0.25]
    with pytest.raises(DataError, match="row 9"):
        chosen.select([dataclasses.replace(PROMPT, index=9, target=None)])


def settings_without_effect():
    """(method, key without effect, the settings that make it so) of every method, base classes included."""
    for name, config in METHOD_CONFIGS.items():
        for base in config.__mro__:
            yield from ((name, key, {}) for key in base.__dict__.get("unused", ()))
            for (switch, value), keys in base.__dict__.get("unused_with", {}).items():
                yield from ((name, key, {switch: value}) for key in keys)


@pytest.mark.parametrize("name,key,switches", settings_without_effect())
def test_a_setting_without_effect_is_an_error(name, key, switches):
    settings = {**switches, key: METHOD_CONFIGS[name].model_fields[key].get_default()}
    assert key in METHOD_CONFIGS[name](**settings).unused_keys()
    with pytest.raises(ConfigError, match=r"^method\.\w+ has no effect with method\.\w+=\S+: remove it$"):
        method(name, **settings)


@pytest.mark.parametrize("name", METHOD_CONFIGS)
def test_a_written_configuration_loads_again(name, tmp_path):
    """A dump has every key except those without effect, for every switch of the method."""
    for switches in [{}, *(switches for other, _, switches in settings_without_effect() if other == name)]:
        config = Config(steps=1, method=METHOD_CONFIGS[name](**switches))
        load.write([config], tmp_path / "config.toml")
        (read,) = load.load(tmp_path / "config.toml", [], load_method_config)
        assert read == config and type(read.method) is type(config.method)
        assert read.fingerprint() == config.fingerprint()
        unused = read.method.unused_keys().keys()
        assert set(type(read.method).model_fields) - unused == read.method.model_fields_set
