"""CurioSFT and its reinforcement learning against the worked numbers of their release (arXiv 2602.02244).

The search for temperatures is proved in `tests/kernels`; here are the losses, the moves of the teacher and the
schedule.
"""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from entropy_kernels import TokenStats, guided_teacher, token_stats_from_logits
from megatron_entropy.actor.optimizer import build_schedule
from megatron_entropy.config.schema import BatchConfig, Config, OptimizerConfig, RolloutConfig
from megatron_entropy.data.packing import pack
from megatron_entropy.errors import CheckpointError, ConfigError, DataError
from megatron_entropy.methods import METHOD_CONFIGS, build_method
from megatron_entropy.methods.curiosft import GuidedTemperature
from megatron_entropy.records import Batch, Grade, Group, HeadInputs, Prompt, Sample, refill, samples_of

LOGITS_A = [2.0, 1.0, 0.0, -1.0]
TAU_A = 1.438572
CPU = torch.device("cpu")


def method(name: str = "curiosft", prompts: int = 2, limit: int = 8192, **settings):
    return build_method(
        Config(
            steps=1,
            method=METHOD_CONFIGS[name](**settings),
            batch=BatchConfig(prompts=prompts, samples=8),
            rollout=RolloutConfig(max_response_tokens=limit),
        )
    )


def vector(*values: float, dtype=torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def batch_of(reference_logprob=None, weight=None, **fields) -> Batch:
    """A micro-batch of which only the fields of a loss matter."""
    some = next(f for f in (reference_logprob, weight, *fields.values()) if f is not None)
    one = torch.ones_like(some)
    weight = one if weight is None else weight
    return Batch(one, one, one, one, (0,), weight=weight, reference_logprob=reference_logprob, **fields)


class Teacher:
    """Rollouts that log the calls for the teacher: temperatures and statistics of passes, alphas of updates."""

    def __init__(self, *prompts: Prompt) -> None:
        self.prompts, self.log = list(prompts), []

    def take_prompts(self, count: int) -> list[Prompt]:
        return self.prompts[:count]

    def update_ema(self, alpha: float) -> None:
        self.log.append(alpha)

    def score_reference(self, groups, *, temperature=None, statistics=None) -> list[Group]:
        self.log.append(statistics or temperature)
        return refill(groups, [dataclasses.replace(s, reference_logprob=s.constant(-1.0)) for s in samples_of(groups)])


def worked(*lengths: int) -> list[Prompt]:
    return [Prompt(i, "q", (1, 2), None, tuple(range(3, 3 + n))) for i, n in enumerate(lengths)]


# The loss


def distill(logits, label: int, teacher_logits, temperature: float, **settings):
    """Loss of one token and the gradient of the student's logits and of the teacher's."""
    student = torch.tensor([logits], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([teacher_logits], dtype=torch.float64, requires_grad=True)
    tau = torch.tensor([temperature], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([label])
    stats = token_stats_from_logits(student, target)
    with torch.no_grad():  # as the actor's pass
        lq = token_stats_from_logits(teacher, target, temperature=tau).logprob
    loss, metrics = method(**settings).loss(stats, batch_of(lq, reference_temperature=tau.detach()))
    loss.sum().backward()
    assert teacher.grad is None and tau.grad is None
    return loss.item(), student.grad[0].tolist(), stats.logprob.item(), lq.item(), metrics


def test_loss_is_likelihood_plus_k2_to_the_tempered_teacher():
    loss, gradient, lp, lq, metrics = distill(LOGITS_A, 0, LOGITS_A, TAU_A)
    assert lp == pytest.approx(-0.440190, abs=1e-6) and lq == pytest.approx(-0.627154, abs=1e-6)
    assert metrics["policy/teacher_distance"].value == pytest.approx(0.017478, abs=1e-6)
    assert metrics["policy/teacher_temperature"].value == pytest.approx(TAU_A)
    assert loss == pytest.approx(0.457667, abs=1e-6)
    np.testing.assert_allclose(gradient, [-0.289511, 0.192594, 0.070851, 0.026065], atol=1e-6)


def test_gradient_of_the_labels_logprob():
    lp = vector(-0.440190).requires_grad_()
    loss, _ = method().loss(TokenStats(logprob=lp, entropy=vector(0.0)), batch_of(vector(-0.627154)))
    loss.sum().backward()
    assert lp.grad.item() == pytest.approx(-0.813036, abs=1e-6)


def test_the_tempered_distribution_of_the_vector():
    logits, tau = torch.tensor([LOGITS_A] * 4, dtype=torch.float64), TAU_A
    stats = token_stats_from_logits(logits, torch.arange(4), teacher_temperature=tau)
    np.testing.assert_allclose(stats.teacher_logprob.exp(), [0.534110, 0.266525, 0.132998, 0.066367], atol=1e-6)
    assert stats.kl_reverse[0].item() == pytest.approx(0.032291, abs=1e-6)
    assert stats.teacher_entropy[0].item() == pytest.approx(1.135729, abs=1e-6)
    k2 = (stats.logprob.exp() * 0.5 * (stats.logprob - stats.teacher_logprob).square()).sum()
    assert k2.item() == pytest.approx(0.029175, abs=1e-6)


LOGPROBS = st.floats(-12, 0)


@given(LOGPROBS, LOGPROBS, st.floats(0, 3))
def test_gradient_is_that_of_likelihood_times_one_less_the_log_ratio(student, teacher, coefficient):
    lp = vector(student).requires_grad_()
    stats = TokenStats(logprob=lp, entropy=vector(0.0))
    loss, _ = method(coefficient=coefficient).loss(stats, batch_of(vector(teacher)))
    loss.sum().backward()
    assert loss.item() == pytest.approx(-student + coefficient * 0.5 * (student - teacher) ** 2)
    assert lp.grad.item() == pytest.approx(-1 + coefficient * (student - teacher))


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=6), st.data())
def test_a_teacher_that_agrees_leaves_plain_likelihood(logits, data):
    label = data.draw(st.integers(0, len(logits) - 1))
    loss, gradient, lp, lq, metrics = distill(logits, label, logits, 1.0)
    plain, plain_gradient, *_ = distill(logits, label, logits, 1.0, distillation="none")
    assert lp == lq and metrics["policy/teacher_distance"].value == 0
    assert loss == plain == -lp
    np.testing.assert_allclose(gradient, plain_gradient, atol=1e-12)


def test_distance_counts_on_trained_tokens_only():
    stats = TokenStats(logprob=vector(-1.0, -5.0), entropy=vector(0.0, 0.0))
    _, metrics = method().loss(stats, batch_of(vector(-2.0, -1.0), weight=vector(1.0, 0.0)))
    assert metrics["policy/teacher_distance"].value == 0.5


# Switches


@pytest.mark.parametrize(
    "settings,reference,divergence",
    [
        ({}, "ema", "none"),
        ({"teacher": "policy"}, "policy", "none"),
        ({"distillation": "none"}, "none", "none"),
        ({"distillation": "forward"}, "ema", "forward"),
        ({"distillation": "reverse", "teacher": "policy"}, "policy", "reverse"),
    ],
)
def test_reference_and_divergence_of_a_switch(settings, reference, divergence):
    chosen = method(**settings)
    assert (chosen.reference, chosen.divergence) == (reference, divergence)


@pytest.mark.parametrize("kind,expected", [("forward", 3.0), ("reverse", 4.0), ("k2", 1.0 + 0.5 * 0.25), ("none", 1.0)])
def test_distances_to_the_teacher(kind, expected):
    zero, lp = vector(0.0), vector(-1.0)
    stats = TokenStats(logprob=lp, entropy=zero, kl_forward=zero + 2, kl_reverse=zero + 3)
    loss, metrics = method(distillation=kind).loss(stats, batch_of(vector(-1.5)))
    assert loss.item() == expected and ("policy/teacher_distance" in metrics) == (kind != "none")


def test_without_distillation_it_is_sft_with_an_entropy_bonus():
    stats = TokenStats(logprob=vector(-1.0, -2.0), entropy=vector(0.5, 0.25))
    settings = {"entropy_coefficient": 0.1}
    batch = batch_of(weight=vector(0.5, 0.5))
    loss, metrics = method(distillation="none", **settings).loss(stats, batch)
    plain, plain_metrics = method("sft", **settings).loss(stats, batch)
    assert loss.equal(plain) and metrics == plain_metrics
    np.testing.assert_allclose(loss, [0.95, 1.975])
    teacher = Teacher()
    assert method(distillation="none").score_reference([], teacher) == [] and not teacher.log


@pytest.mark.parametrize(
    "settings,expected",
    [
        ({"temperature_bounds": (1.2, 1.4)}, GuidedTemperature(bounds=(1.2, 1.4))),
        ({"guided": False, "temperature": 1.3}, 1.3),
    ],
)
def test_temperature_of_the_teacher(settings, expected):
    teacher = Teacher(*worked(2, 3))
    chosen = method(**settings)
    chosen.score_reference(chosen.generate(teacher), teacher)
    assert teacher.log == [expected]


def test_guided_statistics_are_those_of_the_kernel():
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(6, 8, generator=generator), torch.randn(32, 8, generator=generator)
    head = HeadInputs(hidden, weight, torch.arange(6), group=None, sequence_parallel=False, vocab_size=30)
    expected = guided_teacher(hidden, weight, head.targets, bounds=(1.2, 1.4), top=16, vocab_size=30)
    fields = GuidedTemperature(bounds=(1.2, 1.4), top=16)(head)
    assert fields["reference_logprob"].equal(expected.logprob)
    assert fields["reference_temperature"].equal(expected.temperature)


@pytest.mark.parametrize(
    "settings,key,reason",
    [
        ({"temperature": 1.3}, "temperature", "guided=true"),
        ({"guided": False, "temperature_bounds": (1.1, 1.5)}, "temperature_bounds", "guided=false"),
        ({"teacher": "policy", "ema_every": 1}, "ema_every", 'teacher="policy"'),
        ({"distillation": "none", "coefficient": 0.5}, "coefficient", 'distillation="none"'),
    ],
)
def test_a_setting_without_effect_is_an_error(settings, key, reason):
    with pytest.raises(ConfigError, match=f"^method.{key} has no effect with method.{reason}: remove it$"):
        method(**settings)


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_a_fixed_temperature_reaches_the_divergence(kind):
    """`Actor.update` takes the teacher's temperature from the batch."""
    teacher = Teacher(*worked(2, 3))
    chosen = method(guided=False, temperature=1.3, distillation=kind)
    for s in samples_of(chosen.score_reference(chosen.generate(teacher), teacher)):
        np.testing.assert_allclose(s.reference_temperature, s.constant(1.3))


# The teacher moves


def test_the_teacher_moves_before_its_sixth_pass_and_every_fifth_after_it():
    teacher = Teacher()
    chosen = method(guided=False)
    for _ in range(12):
        chosen.score_reference([], teacher)
    assert teacher.log == [1.0] * 5 + [0.99] + [1.0] * 5 + [0.99] + [1.0] * 2


def test_the_policy_as_its_own_teacher_never_moves():
    teacher = Teacher()
    chosen = method(guided=False, teacher="policy")
    for _ in range(7):
        chosen.score_reference([], teacher)
    assert teacher.log == [1.0] * 7


@given(st.integers(0, 25), st.integers(1, 7))
def test_a_resumed_teacher_moves_when_it_would_have(passed, every):
    whole, begun = Teacher(), Teacher()
    straight, first, second = (method(guided=False, ema_every=every) for _ in range(3))
    for _ in range(30):
        straight.score_reference([], whole)
    for _ in range(passed):
        first.score_reference([], begun)
    second.restore(first.state())
    for _ in range(30 - passed):
        second.score_reference([], begun)
    assert begun.log == whole.log


def test_the_state_of_other_methods_is_refused():
    chosen = method()
    chosen.restore({})
    assert chosen.state() == {"passes": 0}
    with pytest.raises(CheckpointError, match="other"):
        chosen.restore({"passes": 3, "other": 1})
    with pytest.raises(CheckpointError, match="passes"):
        method("sft").restore(chosen.state())


# Normalization


@pytest.mark.parametrize("micro_batch,expected", [(1, 1.493612), (0, 2.011584), (2, 2.011584)])
def test_normalization(micro_batch, expected):
    """One token of loss a and three of loss b: the mean of means is the release's, the global mean the default."""
    chosen = method(micro_batch=micro_batch)
    samples = samples_of(chosen.compute_advantages(chosen.generate(Teacher(*worked(1, 3)))))
    total = sum(s.weight.sum(dtype=np.float64) * loss for s, loss in zip(samples, (0.457667, 2.529556), strict=True))
    assert total == pytest.approx(expected, abs=1e-6)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(0, 10))
def test_weights_sum_to_one(lengths, micro_batch):
    chosen = method(prompts=len(lengths), micro_batch=micro_batch)
    samples = samples_of(chosen.compute_advantages(chosen.generate(Teacher(*worked(*lengths)))))
    assert sum(s.weight.sum(dtype=np.float64) for s in samples) == pytest.approx(1)
    assert not any(s.weight[: s.prompt_length].any() for s in samples)


def test_only_the_solution_is_trained():
    chosen = method(prompts=1)
    (sample,) = samples_of(chosen.compute_advantages(chosen.generate(Teacher(*worked(3)))))
    batch = pack([sample], [0], device=CPU)
    assert batch.targets[batch.weight != 0].tolist() == [3, 4, 5]


# The learning rate

FACTOR_FOUR = {0: 1e-9, 30: 5.0005e-6, 60: 1e-5, 178: 9.92050e-6, 356: 9.50677e-6, 533: 8.77301e-6}
TRUE_HORIZON = {0: 1e-9, 30: 5.0005e-6, 60: 1e-5, 533: 1.1e-9}


@pytest.mark.parametrize("decay_steps,expected", [(4 * 534, FACTOR_FOUR), (0, TRUE_HORIZON)])
def test_learning_rate_of_the_release(decay_steps, expected):
    """Step 0 is the first update: the schedule moves after the optimizer."""
    config = OptimizerConfig(
        lr=1e-5, min_lr=1e-9, warmup_lr=1e-9, warmup_steps=60, schedule="cosine", decay_steps=decay_steps
    )
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=0)
    schedule = build_schedule(config, optimizer, 534)
    rates = []
    for _ in range(534):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step(increment=1)
    for step, rate in expected.items():
        assert rates[step] == pytest.approx(rate, rel=1e-5 if rate != 1.1e-9 else 0.01)


# Reinforcement learning as released


def rl_loss(advantage, lp, old):
    logprob = vector(*lp).requires_grad_()
    stats = TokenStats(logprob=logprob, entropy=torch.zeros_like(logprob))
    batch = batch_of(advantage=vector(*advantage), logprob=vector(*old))
    loss, metrics = method("curio_rl").loss(stats, batch)
    loss.sum().backward()
    return loss.detach(), logprob.grad, metrics


def test_released_loss():
    loss, gradient, metrics = rl_loss([1.0, -1, 1, 1], [-0.5, -0.5, -0.1, -2], [-0.5] * 4)
    np.testing.assert_allclose(loss, [-1, -0.5, -1.2, -0.8])
    np.testing.assert_allclose(gradient, [-1, 1, 0, 0])
    assert metrics["policy/clip_frac"].value == 0.5


@given(st.floats(-3, 3), LOGPROBS, LOGPROBS)
def test_released_loss_has_a_gradient_within_the_clip_range_or_where_the_answer_was_bad(advantage, lp, old):
    loss, gradient, _ = rl_loss([advantage], [lp], [old])
    ratio = np.exp(lp - old)
    assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()
    if advantage < 0:
        assert loss.item() == pytest.approx(-advantage * lp) and gradient.item() == pytest.approx(-advantage)
    elif advantage > 0 and not 0.79 < ratio < 1.21:
        assert gradient.item() == 0
    elif advantage > 0 and 0.81 < ratio < 1.19 and lp < 0:
        assert gradient.item() == pytest.approx(-advantage * ratio)


def answers(*verdicts: bool, length: int = 4) -> Group:
    tokens = np.zeros(2 + length, np.int32)
    return Group(worked(1)[0], tuple(Sample(tokens, 2, "stop", "", grade=Grade(verdict)) for verdict in verdicts))


@pytest.mark.parametrize(
    "rewards,expected",
    [((True, *[False] * 7), [2.474867, *[-0.353552] * 7]), ((True,) * 8, [0.0] * 8), ((False,), [0.0])],
)
def test_advantages_and_the_constant_divisor(rewards, expected):
    chosen = method("curio_rl")
    (group,) = chosen.compute_advantages(chosen.reward([answers(*rewards)]))
    np.testing.assert_allclose([s.response("advantage")[0] for s in group.samples], expected, atol=1e-6)
    for s in group.samples:
        np.testing.assert_allclose(s.response("weight"), 1 / (8192 * len(rewards)), rtol=1e-6)
    assert chosen.pop_metrics()["train/zero_advantage"].value == (not any(expected))


# Hard cases


@pytest.mark.parametrize("name", ["sft", "curiosft"])
def test_a_data_set_without_solutions_is_refused(name):
    with pytest.raises(DataError, match=f"method {name} .*row 1 .*no target"):
        method(name).select([worked(3)[0], Prompt(1, "q", (1,), "7")])


@pytest.mark.parametrize("micro_batch", [0, 1, 5])
def test_solutions_without_a_token_and_steps_without_a_group_divide_by_nothing(micro_batch):
    chosen = method(micro_batch=micro_batch)
    groups = chosen.compute_advantages(chosen.generate(Teacher(*worked(0, 0))))
    assert len(groups) == 2 and not any(s.weight.any() for s in samples_of(groups))
    assert chosen.compute_advantages([]) == []


@pytest.mark.filterwarnings("error")
def test_empty_answers_of_the_released_loss_are_left_out_and_counted():
    chosen = method("curio_rl")
    groups = [answers(True, False, length=0), answers(True, False)]
    first, second = chosen.compute_advantages(chosen.reward(groups))
    assert not first.samples and len(second.samples) == 2
    counted = chosen.pop_metrics()
    assert counted["train/empty"].value == 0.5 and counted["train/zero_advantage"].value == 0.5
