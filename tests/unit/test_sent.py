"""SENT, Clip-Cov and KL-Cov against worked numbers, and their properties for any numbers.

The vectors are those of the specification: two responses of five tokens, worked by hand in float64 (`-A*r` and all
selections). Padding is left out because packs have none. Not proved here: that an actor computes these entropies.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from entropy_kernels import TokenStats
from megatron_entropy.config.schema import BatchConfig, Config
from megatron_entropy.data.packing import pack, plan_microbatches
from megatron_entropy.errors import ConfigError, DataError
from megatron_entropy.methods import METHOD_CONFIGS, base, build_method, load_method_config, objectives
from megatron_entropy.methods.cov import ClipCov, KlCov, draw_between
from megatron_entropy.methods.sent import RELEASE, Sent, SentConfig, select_tokens
from megatron_entropy.records import Batch, Grade, Group, Prompt, Sample, samples_of

ROWS = 2
COLUMNS = 5
"""Trained tokens of a row; the specification's flat index counts 6 to a row, its last is padding."""

ADVANTAGE = np.repeat([1.0, -0.5], COLUMNS)
ENTROPY = np.array([0.05, 0.90, 0.10, 0.02, 0.30, 0.01, 0.20, 1.50, 0.07, 0.40])
LOGPROB = np.array([-0.10, -2.00, -0.30, -0.05, -1.00, -0.02, -0.60, -3.00, -0.15, -1.20])
OLD = np.array([-0.20, -1.80, -0.30, -0.10, -1.10, -0.02, -0.50, -2.90, -0.25, -1.40])
REFERENCE = np.array([-0.15, -1.90, -0.40, -0.05, -1.05, -0.04, -0.55, -2.80, -0.20, -1.30])

ASCENDING = [6, 3, 0, 9, 2, 7, 4, 10]
OVER_LOW = [-0.305625, 0.283125, 0.245625, -0.208125, 0.095625, 0.129375, -0.429375, 0.579375]
OVER_ALL = [-0.6165, 0.5940, 0.5565, -0.5190, 0.4065, -0.1815, -0.1185, 0.2685]


def position(flat: int) -> int:
    """Position of the specification's flat index among the trained tokens."""
    return flat // 6 * COLUMNS + flat % 6


def flat(mask: np.ndarray) -> set[int]:
    return {int(index) // COLUMNS * 6 + int(index) % COLUMNS for index in np.flatnonzero(mask)}


def method(name: str = "sent", *, updates: int = 2, seed: int = 1, **settings):
    config = METHOD_CONFIGS[name].model_validate({"name": name, **settings})
    return build_method(
        Config(steps=1, seed=seed, method=config, batch=BatchConfig(prompts=2, samples=2, updates=updates))
    )


def column(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(values, np.float64))


def loss_of(
    chosen, *, kl_weight: np.ndarray | None = None, advantage: np.ndarray = ADVANTAGE, logprob: np.ndarray = LOGPROB,
    old: np.ndarray = OLD, reference: np.ndarray = REFERENCE,
) -> tuple[float, np.ndarray]:  # fmt: skip
    """The weighted loss of all tokens, and its gradient by log-probability."""
    count = len(logprob)
    nothing = torch.zeros(count, dtype=torch.int64)
    trained = column(logprob).requires_grad_()
    stats = TokenStats(logprob=trained, entropy=column(np.zeros(count)))
    batch = Batch(
        nothing, nothing, nothing, torch.tensor([0, count], dtype=torch.int32), (0,), column(np.full(count, 1 / count)),
        advantage=column(advantage), logprob=column(old), reference_logprob=column(reference),
        kl_weight=None if kl_weight is None else column(kl_weight),
    )  # fmt: skip
    per_token, _ = chosen.loss(stats, batch)
    loss = (batch.weight * per_token).sum()
    loss.backward()
    assert trained.grad is not None
    return loss.item(), trained.grad.numpy()


def spec_choice(**settings):
    config = SentConfig.model_validate({"name": "sent", **settings})
    return select_tokens(config, entropy=ENTROPY, logprob=LOGPROB, advantage=ADVANTAGE)


@pytest.mark.parametrize(
    "rewards,expected",
    [
        ([1, -1, -1, 1, -1, -1, -1, -1], (1.620183, -0.540061)),
        ([1] * 7 + [-1], (0.353553, -2.474870)),
        ([1] * 8, (0, 0)),
    ],
)
def test_advantages(rewards, expected):
    advantage = objectives.group_advantage(rewards)
    np.testing.assert_allclose([advantage[0], advantage[-1]], expected, atol=1e-6)


def test_low_entropy_tokens_and_their_covariances():
    over_low, over_all = spec_choice(covariance_over="low"), spec_choice(covariance_over="all")
    order = [position(index) for index in ASCENDING]
    assert flat(over_low.low) == set(ASCENDING)
    assert [int(index) for index in np.argsort(ENTROPY, kind="stable")[:8]] == order
    np.testing.assert_allclose(over_low.covariance[order], OVER_LOW, atol=1e-12)
    np.testing.assert_allclose(over_all.covariance[order], OVER_ALL, atol=1e-12)
    np.testing.assert_allclose(over_all.covariance[[position(1), position(8)]], [-0.8685, 1.6185], atol=1e-12)


def test_release_form():
    chosen = spec_choice(form="release")
    assert flat(chosen.high) == {10} and flat(chosen.coefficient == 0.05) == {4}
    assert np.count_nonzero(chosen.coefficient) == 2 and chosen.coefficient[position(10)] == 0.2
    loss, _ = loss_of(method(form="release", kl_coefficient=0.0), kl_weight=chosen.coefficient)
    assert loss == pytest.approx(-0.246721943, abs=1e-9)
    loss, _ = loss_of(method(form="release"), kl_weight=chosen.coefficient)
    assert loss == pytest.approx(-0.246717802, abs=1e-9)


def test_the_release_is_not_ported_with_its_integer_mask():
    """Indexed by int64, `advantages[mask]` gathers rows 0 and 1: the covariances of other tokens (flat 6 would win)."""
    padded = np.ones((ROWS, 6), np.int64)
    padded[:, -1] = 0
    values = [np.pad(v.reshape(ROWS, COLUMNS), ((0, 0), (0, 1))) for v in (ADVANTAGE, LOGPROB)]
    gathered = [v[padded].reshape(-1)[: ROWS * COLUMNS] for v in values]
    low = spec_choice().low
    wrong = objectives.covariance(gathered[1], gathered[0], low)
    assert flat(objectives.top_k_mask(wrong, 1, low)) == {6}
    assert flat(spec_choice(form="release").high) == {10}


def test_paper_form():
    """High covariance among the low-entropy ones with means over all tokens: 3; k3 to the reference, clipped ratio."""
    chosen = spec_choice()
    assert flat(chosen.high) == {3} and flat(chosen.coefficient > 0) == set(ASCENDING)
    assert chosen.coefficient[position(3)] == 0.2 and set(chosen.coefficient) == {0.0, 0.05, 0.2}
    ratio = np.exp(LOGPROB - OLD)
    surrogate = np.maximum(-ADVANTAGE * ratio, -ADVANTAGE * np.clip(ratio, 0.8, 1.2))
    difference = REFERENCE - LOGPROB
    k3 = np.exp(difference) - difference - 1
    loss, _ = loss_of(method(), kl_weight=chosen.coefficient)
    assert loss == pytest.approx((surrogate + chosen.coefficient * k3).mean(), abs=1e-12)


def test_thresholds_in_place_of_fractions():
    chosen = spec_choice(low_rule="threshold", low_threshold=0.3, high_rule="threshold", high_threshold=0.5)
    assert flat(chosen.low) == {6, 3, 0, 9, 2, 7}  # 4 has 0.3 itself
    assert flat(chosen.high) == {3, 0}
    nothing = spec_choice(low_rule="threshold", low_threshold=0.001)
    assert not nothing.low.any() and not nothing.high.any() and not nothing.coefficient.any()


def test_the_low_coefficient_wins_where_highest_and_lowest_meet():
    one = np.array([0.5])
    config = SentConfig.model_validate({"form": "release"})
    assert select_tokens(config, entropy=one, logprob=-one, advantage=one).coefficient.tolist() == [0.05]


def test_of_equal_values_the_first_token_wins():
    config = SentConfig.model_validate({"low_fraction": 0.5})
    same = np.zeros(4)
    chosen = select_tokens(config, entropy=same, logprob=same, advantage=same)
    assert chosen.low.tolist() == [True, True, False, False] and chosen.high.tolist() == [True, False, False, False]


def test_no_token_no_selection():
    empty = np.zeros(0)
    for settings in ({}, RELEASE, {"low_rule": "threshold", "high_rule": "threshold"}):
        chosen = select_tokens(SentConfig.model_validate(settings), entropy=empty, logprob=empty, advantage=empty)
        assert len(chosen.coefficient) == 0


def test_kl_cov_loss():
    chosen = objectives.top_k_mask(objectives.covariance(LOGPROB, ADVANTAGE), objectives.fraction_to_count(10, 0.0002))
    assert flat(chosen) == {8}
    loss, _ = loss_of(method("kl_cov"), kl_weight=chosen * 1.0)
    assert loss == pytest.approx(-0.241221943, abs=1e-9)
    assert loss_of(method("kl_cov"))[0] == pytest.approx(-0.251221943, abs=1e-9)


def test_clip_cov_loss():
    covariances = objectives.covariance(LOGPROB, ADVANTAGE)
    dropped = draw_between(covariances, (1.0, 5.0), fraction=0.0002, seed=7)
    assert flat(dropped) == {8}
    chosen = method("clip_cov", clip_low=0.2, clip_high=0.2)
    assert loss_of(chosen)[0] == pytest.approx(-0.251221943, abs=1e-9)
    loss, gradient = loss_of(chosen, advantage=np.where(dropped, 0.0, ADVANTAGE))
    assert loss == pytest.approx(-0.296463814, abs=1e-9) and gradient[position(8)] == 0


def test_clip_cov_candidates_lie_strictly_within():
    covariances = np.array([1.0, 1.5, 5.0, 4.9, 9.0])
    assert draw_between(covariances, (1.0, 5.0), fraction=1.0, seed=1).tolist() == [False, True, False, True, False]
    assert not draw_between(covariances, (6.0, 7.0), fraction=1.0, seed=1).any()
    assert len(draw_between(np.zeros(0), (1.0, 5.0), fraction=1.0, seed=1)) == 0


def test_clip_cov_draws_evenly():
    covariances = np.full(4, 2.0)
    drawn = sum(draw_between(covariances, (1.0, 5.0), fraction=0.25, seed=seed) for seed in range(2000))
    assert drawn.sum() == 2000 and drawn.min() > 430  # 500 each; 430 is 3.6 standard deviations below


NUMBERS = st.floats(-4, 4, allow_subnormal=False)


@st.composite
def tokens(draw):
    """Entropies, log-probs and advantages of some tokens, rounded so that a shift does not split equal values."""
    count = draw(st.integers(1, 40))
    return tuple(np.round(draw(arrays(np.float64, count, elements=NUMBERS)), 3) for _ in range(3))


@given(tokens(), st.floats(-3, 3), st.floats(-3, 3))
def test_covariance_ignores_a_constant_and_is_0_for_equal_advantages(values, shift, other):
    _, logprob, advantage = values
    base = objectives.covariance(logprob, advantage)
    np.testing.assert_allclose(objectives.covariance(logprob + shift, advantage + other), base, atol=1e-9)
    np.testing.assert_allclose(objectives.covariance(logprob, np.full_like(logprob, shift)), 0, atol=1e-9)


@given(tokens(), st.sampled_from(["paper", "release"]))
def test_without_distance_every_penalty_and_its_gradient_is_0(values, form):
    entropy, logprob, advantage = values
    chosen = method(form=form)
    weight = select_tokens(chosen.settings, entropy=entropy, logprob=logprob, advantage=advantage).coefficient
    loss, gradient = loss_of(
        chosen, kl_weight=weight, advantage=advantage, logprob=logprob, old=logprob, reference=logprob
    )
    assert loss == pytest.approx(-advantage.mean(), abs=1e-9)
    np.testing.assert_allclose(gradient, -advantage / len(advantage), atol=1e-12)


@pytest.mark.parametrize("name,settings", [("kl_cov", {}), ("sent", {"form": "release", "kl_coefficient": 0.0})])
def test_rounding_between_two_passes_is_no_distance(name, settings):
    """|log p - log p_old| has a full gradient however small it is; that of 1e-5 nats would be the sign of noise."""
    noise = np.linspace(-1e-5, 1e-5, len(LOGPROB))
    weight = np.ones(len(LOGPROB))
    _, gradient = loss_of(
        method(name, **settings), kl_weight=weight, advantage=0 * ADVANTAGE, logprob=LOGPROB + noise, old=LOGPROB
    )
    assert not gradient.any()
    _, gradient = loss_of(
        method(name, **settings), kl_weight=weight, advantage=0 * ADVANTAGE, logprob=LOGPROB + 0.001, old=LOGPROB
    )
    np.testing.assert_allclose(gradient, 1 / len(LOGPROB))


@given(tokens(), st.floats(0, 1), st.sampled_from(["all", "low"]), st.floats(0.01, 1))
def test_equal_betas_make_the_covariance_rule_irrelevant(values, beta, over, fraction):
    entropy, logprob, advantage = values
    config = SentConfig.model_validate(
        {"beta_low": beta, "beta_high": beta, "covariance_over": over, "high_fraction": fraction}
    )
    chosen = select_tokens(config, entropy=entropy, logprob=logprob, advantage=advantage)
    np.testing.assert_array_equal(chosen.coefficient, chosen.low * beta)


@given(tokens(), st.sampled_from(["paper", "release"]))
def test_high_tokens_are_low_ones_and_sizes_are_the_fractions(values, form):
    entropy, logprob, advantage = values
    config = SentConfig.model_validate({"form": form, "high_fraction": 0.3})
    chosen = select_tokens(config, entropy=entropy, logprob=logprob, advantage=advantage)
    assert chosen.low.sum() == max(1, int(0.8 * len(entropy)))
    assert chosen.high.sum() == max(1, int(0.3 * chosen.low.sum()))
    assert not (chosen.high & ~chosen.low).any() and not chosen.coefficient[~chosen.low].any()


PROMPT = Prompt(0, "q", (1, 2, 3), "7")


def sample(number: int, *, response: int, correct: bool | None = True) -> Sample:
    rng = np.random.default_rng(number)

    def field() -> np.ndarray:
        values = np.zeros(3 + response, np.float32)
        values[3:] = rng.random(response)
        return values

    grade = Grade(correct, error=None if correct is not None else "timeout")
    drawn = rng.integers(0, 50, 3 + response).astype(np.int32)
    return Sample(drawn, 3, "stop", "", grade=grade, logprob=-3 * field(), entropy=2 * field())


def groups_of(sizes: list[list[int]]) -> list[Group]:
    """Groups of responses of these lengths; the first of each is right."""
    return [
        Group(PROMPT, tuple(sample(10 * i + j, response=n, correct=not j) for j, n in enumerate(group)))
        for i, group in enumerate(sizes)
    ]


def with_advantages(chosen, groups: list[Group]) -> list[Sample]:
    return samples_of(chosen.compute_advantages(chosen.reward(groups)))


SIZES = st.lists(st.lists(st.integers(1, 12), min_size=2, max_size=4), min_size=1, max_size=4)


@given(SIZES, st.sampled_from(["sent", "clip_cov", "kl_cov"]), st.integers(12, 40), st.integers(1, 3))
def test_selection_does_not_depend_on_how_samples_are_packed(sizes, name, budget, ranks):
    """Every plan gives a sample the fields that `compute_advantages` filled, from all samples at once."""
    settings = {"covariance_low": -1.0, "clip_fraction": 0.5} if name == "clip_cov" else {}
    samples = with_advantages(method(name, **settings), groups_of(sizes))
    samples = [dataclasses.replace(s, reference_logprob=s.logprob) for s in samples]
    field = "advantage" if name == "clip_cov" else "kl_weight"
    seen = 0
    lengths = [len(s.tokens) - 1 for s in samples]
    for micro_batches in plan_microbatches(lengths, max_tokens_per_microbatch=budget, ranks=ranks):
        for members in micro_batches:
            batch = pack(samples, members, device=torch.device("cpu"))
            for start, end, number in zip(batch.boundaries, batch.boundaries[1:], batch.order, strict=False):
                if number >= 0:
                    expected = getattr(samples[number], field)[1:]
                    np.testing.assert_array_equal(getattr(batch, field)[start:end].numpy(), expected)
                    seen += 1
    assert seen == len(samples)


@given(SIZES, st.randoms())
def test_the_order_of_groups_does_not_matter(sizes, random):
    groups = groups_of(sizes)
    shuffled = random.sample(groups, len(groups))
    by_tokens = {s.tokens.tobytes(): s for s in with_advantages(method(), groups)}
    for one in with_advantages(method(), shuffled):
        np.testing.assert_array_equal(one.kl_weight, by_tokens[one.tokens.tobytes()].kl_weight)


def test_prompt_tokens_do_not_change_the_selection():
    chosen = method()
    base = with_advantages(chosen, groups_of([[4, 6], [5, 3]]))
    groups = groups_of([[4, 6], [5, 3]])
    noisy = []
    for group in groups:
        members = []
        for one in group.samples:
            fields = {name: getattr(one, name).copy() for name in ("logprob", "entropy")}
            for values in fields.values():
                values[: one.prompt_length] = 77.0
            members.append(dataclasses.replace(one, **fields))
        noisy.append(group.with_samples(members))
    for one, other in zip(base, with_advantages(chosen, noisy), strict=True):
        np.testing.assert_array_equal(one.kl_weight, other.kl_weight)
        assert not one.kl_weight[:3].any() and one.kl_weight[3:].any()


def test_selection_within_sequences_is_that_of_each_chunk():
    groups = groups_of([[4, 6], [5, 3]])
    chunked = method(selection_sequences=2)
    together = with_advantages(chunked, groups)
    alone = [s for group in groups for s in with_advantages(method(), [group])]
    whole = with_advantages(method(), groups)
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one.kl_weight, other.kl_weight)
    assert any(not np.array_equal(a.kl_weight, b.kl_weight) for a, b in zip(together, whole, strict=True))
    metrics = chunked.pop_metrics()
    assert metrics["train/low_entropy_frac"].value == pytest.approx((8 + 6) / 18)
    assert metrics["train/high_covariance_frac"].value == pytest.approx(2 / 18)


@pytest.mark.parametrize("name", ["sent", "clip_cov", "kl_cov"])
def test_hard_cases_leave_something_or_nothing(name):
    for members in (
        [sample(1, response=0), sample(2, response=4), sample(3, response=4, correct=False)],
        [sample(1, response=4)],
        [sample(1, response=4), sample(2, response=4)],
        [sample(1, response=4, correct=None), sample(2, response=4)],
        [sample(1, response=4, correct=None)],
        [],
    ):
        chosen = method(name)
        for one in with_advantages(chosen, [Group(PROMPT, tuple(members))]):
            assert one.response_length and np.isfinite(one.advantage).all()
        chosen.pop_metrics()
    assert with_advantages(method(name), []) == []


def test_clip_cov_drops_by_advantage_and_a_resumed_run_drops_the_same():
    settings = {"covariance_low": 0.0, "covariance_high": 100.0, "clip_fraction": 0.1}
    groups = groups_of([[9, 12], [11, 8]])
    plain = with_advantages(method("grpo"), groups)
    first, again = (with_advantages(method("clip_cov", **settings), groups) for _ in range(2))
    other = with_advantages(method("clip_cov", seed=2, **settings), groups)
    dropped = [np.flatnonzero(one.advantage != s.advantage).tolist() for one, s in zip(first, plain, strict=True)]
    assert sum(map(len, dropped)) == 4
    for one, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.advantage, same.advantage)
    assert any(not np.array_equal(a.advantage, b.advantage) for a, b in zip(first, other, strict=True))
    assert sum(s.weight.sum() for s in first) == pytest.approx(1)


def test_kl_cov_penalizes_the_highest_covariances():
    groups = groups_of([[9, 12], [11, 8]])
    samples = with_advantages(method("kl_cov", penalty_fraction=0.1, penalty_coefficient=0.7), groups)
    weights = objectives.concat_response_tokens(samples, "kl_weight")
    covariances = objectives.covariance(
        objectives.concat_response_tokens(samples, "logprob"), objectives.concat_response_tokens(samples, "advantage")
    )
    assert (weights > 0).sum() == 4
    np.testing.assert_allclose(weights[weights > 0], 0.7, rtol=1e-6)
    assert covariances[weights > 0].min() >= covariances[weights == 0].max()


def test_references():
    assert method().reference == "initial"
    assert method(form="release").reference == "initial"
    assert method(form="release", kl_coefficient=0.0).reference == "none"
    assert method("kl_cov").reference == method("clip_cov").reference == "none"
    assert isinstance(method("kl_cov"), KlCov) and isinstance(method("clip_cov"), ClipCov)


def prompts(entropies: list[float | None]) -> list[Prompt]:
    return [dataclasses.replace(PROMPT, index=3 * i, semantic_entropy=value) for i, value in enumerate(entropies)]


SPEC_ENTROPIES = [0, 2.079442, 0.693147, 0, 1.386294, 0.900256, 0.735622, 0.376770]


@pytest.mark.parametrize("stage,expected", [(1, [0, 3, 7, 2]), (2, [6, 5, 4, 1])])
def test_a_stage_trains_on_its_range(stage, expected):
    chosen = method(curriculum_stages=2, curriculum_stage=stage)
    assert [prompt.index // 3 for prompt in chosen.select(prompts(SPEC_ENTROPIES))] == expected


@pytest.mark.parametrize("stage,expected", [(1, [0, 3, 7, 2, 6, 5, 4]), (2, [1])])
def test_a_threshold_is_the_lower_end_of_a_stage(stage, expected):
    chosen = method(
        curriculum_stages=2, curriculum_stage=stage, curriculum_split="threshold", curriculum_thresholds=[2.0]
    )
    assert [prompt.index // 3 for prompt in chosen.select(prompts(SPEC_ENTROPIES))] == expected


def test_one_stage_needs_no_entropies():
    assert len(method().select(prompts([None, None]))) == 2


def test_a_missing_semantic_entropy_is_an_error_with_the_command():
    chosen = method(curriculum_stages=2)
    with pytest.raises(DataError, match=r"row 3 of data.train has no column semantic_entropy.*semantic-entropy"):
        chosen.select(prompts([0.5, None]))


def test_an_empty_stage_is_an_error_with_the_numbers():
    chosen = method(curriculum_stages=2, curriculum_stage=2, curriculum_split="threshold", curriculum_thresholds=[3])
    with pytest.raises(ConfigError, match=r"curriculum_stage=2 of 2 .* 3 prompts .* 0.000 to 1.000 .* 3, 0"):
        chosen.select(prompts([0.0, 0.5, 1.0]))
    with pytest.raises(ConfigError, match=r"curriculum_stage=1 of 3"):
        method(curriculum_stages=3).select(prompts([0.0]))


@pytest.mark.parametrize(
    "name,settings,message",
    [
        ("sent", {"curriculum_stage": 2}, "curriculum_stage=2 is above method.curriculum_stages=1"),
        ("sent", {"curriculum_stages": 2, "curriculum_split": "threshold"}, "must be 1 ascending"),
        (
            "sent",
            {"curriculum_stages": 2, "curriculum_thresholds": [1.0]},
            r'curriculum_thresholds has no effect with method.curriculum_split="quantile"',
        ),
        (
            "sent",
            {"curriculum_stages": 3, "curriculum_split": "threshold", "curriculum_thresholds": [2.0, 1.0]},
            "must be 2 ascending",
        ),
        ("sent", {"beta_low": 0.5}, "beta_low=0.5 is above method.beta_high=0.2"),
        ("kl_cov", {"kl_coefficient": 0.1}, 'method.kl_coefficient has no effect with method.name="kl_cov": remove it'),
        ("clip_cov", {"covariance_low": 5.0}, "covariance_low=5.0 must be below"),
    ],
)
def test_settings_that_do_not_fit(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        method(name, **settings)


@pytest.mark.parametrize(
    "name,settings,warnings",
    [("sent", {"form": "release"}, 1), ("kl_cov", {}, 1), ("sent", {}, 0), ("clip_cov", {}, 0)],
)
def test_a_penalty_that_one_update_makes_inert_is_a_warning(monkeypatch, name, settings, warnings):
    """It is logged once, on rank 0, although several parts of a run build the method."""
    logged: list[str] = []
    monkeypatch.setattr(base.log, "warning", lambda text, *values: logged.append(text % values))
    for updates, rank, expected in [(2, "0", 0), (1, "1", 0), (1, "0", warnings), (1, "0", warnings)]:
        if not logged:
            base.warn_once.cache_clear()
        monkeypatch.setenv("RANK", rank)
        method(name, updates=updates, **settings)
        assert len(logged) == expected and all("batch.updates=1" in text and "no effect" in text for text in logged)


def test_a_form_changes_defaults_only(tmp_path):
    """Explicit settings win over `form`, and a resolved configuration that is read back is the same."""
    from megatron_entropy.config import load

    file = tmp_path / "sent.toml"
    file.write_text('steps = 1\n[method]\nname = "sent"\nform = "release"\nclip = true\n[batch]\nupdates = 2\n')
    read = load.load(file, ["--method.beta_high=0.4"], load_method_config)
    settings = read[0].method
    assert isinstance(settings, SentConfig)
    assert settings.clip and settings.penalized == "extremes" and settings.beta_high == 0.4
    assert settings.kl_coefficient == 0.001 and settings.selection_sequences == 4
    file.write_text(load.to_toml(read))
    assert load.load(file, [], load_method_config) == read
    assert isinstance(build_method(read[0]), Sent)
