"""CURE against the worked numbers of its release (arXiv 2508.11016, github bytedance/CURE), and its invariants.

Rollouts are scripted, but everything around them is real: grading and texts, packing, the verifier, the head's
statistics of a toy policy whose logits depend on the token before.
"""

import dataclasses
import math
from collections import Counter
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_kernels import TokenStats, token_stats_from_logits
from megatron_entropy.actor.optimizer import build_schedule
from megatron_entropy.config.schema import BatchConfig, Config, DataConfig, OptimizerConfig, RolloutConfig
from megatron_entropy.data.packing import IGNORE_INDEX, pack, plan_microbatches
from megatron_entropy.errors import ConfigError
from megatron_entropy.methods import build_method, objectives
from megatron_entropy.methods.cer import Cer, CerConfig
from megatron_entropy.methods.cure import Cure, CureConfig, critical_positions
from megatron_entropy.methods.dapo import DapoConfig
from megatron_entropy.methods.sent import Sent, SentConfig
from megatron_entropy.records import Batch, Grade, Group, Metric, Prompt, Sample, refill, samples_of
from megatron_entropy.rewards.pool import RewardPool
from megatron_entropy.rollout.engine import Completion
from megatron_entropy.trainer.rollouts import build_groups, grade_groups

EOS, PAD = 0, 1
CPU = torch.device("cpu")


class Words:
    """A tokenizer of words: `texts[token]`."""

    eos_ids = (EOS,)

    def __init__(self, texts: dict[int, str]) -> None:
        self.texts = texts

    def decode(self, ids) -> str:
        return "".join(self.texts.get(int(i), " word") for i in ids if i not in (EOS, PAD))


class Script:
    """Rollouts with scripted responses: `answer(prompt, number)` is a list of tokens."""

    def __init__(self, prompts, answer, texts=(), logits: torch.Tensor | None = None, budget: int = 10**6) -> None:
        self.prompts, self.answer, self.logits, self.budget = list(prompts), answer, logits, budget
        self.sampled: list[list[Prompt]] = []
        self.scored = 0
        self.tokenizer = Words(dict(texts))
        self.reward_pool = RewardPool(verifier="dapo")

    def take_prompts(self, count: int) -> list[Prompt]:
        taken, self.prompts = self.prompts[:count], self.prompts[count:]
        return taken

    def token_text(self, token: int) -> str:
        return self.tokenizer.decode([token])

    def sample(self, prompts, num_samples: int, *, grade_prefix: bool = False) -> list[Group]:
        self.sampled.append(list(prompts))
        completions = []
        for index, prompt in enumerate(prompts):
            for number in range(num_samples):
                tokens = np.array(self.answer(prompt, number), np.int32)
                completions.append(Completion((index, number), tokens, np.zeros(len(tokens), np.float32), "stop"))
        groups = build_groups(prompts, num_samples, completions, tokenizer=self.tokenizer, policy_version=1)
        return grade_groups(groups, grader=self.reward_pool, tokenizer=self.tokenizer, grade_prefix=grade_prefix)

    def score(self, groups, *, logprob: bool = True) -> list[Group]:
        """As the actor: packed in micro-batches of `budget` positions, then put back in order."""
        self.scored += 1
        assert self.logits is not None
        samples = samples_of(groups)
        filled = list(samples)
        lengths = [len(s.tokens) - 1 for s in samples]
        (micro_batches,) = plan_microbatches(lengths, max_tokens_per_microbatch=self.budget, ranks=1)
        for indices in micro_batches:
            batch = pack(samples, indices, device=CPU)
            stats = token_stats_from_logits(self.logits[batch.tokens], batch.targets)
            edges = batch.boundaries.tolist()
            for index, a, b in zip(batch.order, edges, edges[1:], strict=False):
                if index < 0:
                    continue
                entropy, logprob = (np.concatenate([[0], f[a:b].numpy()]) for f in (stats.entropy, stats.logprob))
                filled[index] = dataclasses.replace(samples[index], entropy=entropy, logprob=logprob)
        return refill(groups, filled)


def prompts(count: int, length: int = 3) -> list[Prompt]:
    return [Prompt(i, "q", tuple(range(11, 11 + length)), "12") for i in range(count)]


def config_of(
    method=None, *, samples: int = 16, num_prompts: int = 1, limit: int = 2596, room: int = 1500, **settings
) -> Config:
    return Config(
        steps=1,
        method=method or CureConfig(**settings),
        batch=BatchConfig(prompts=num_prompts, samples=samples),
        rollout=RolloutConfig(max_response_tokens=limit),
        data=DataConfig(max_prompt_tokens=room),
    )


def cure(**settings) -> Cure:
    built = build_method(config_of(**settings))
    assert isinstance(built, Cure)
    return built


def response(tokens, entropy=None, prompt_length: int = 3) -> Sample:
    given_part = range(11, 11 + prompt_length)
    column = None if entropy is None else np.array([*[0] * prompt_length, *entropy], np.float32)
    return Sample(np.array([*given_part, *tokens], np.int32), prompt_length, "stop", "", entropy=column)


def graded(*verdicts: bool, length: int = 4) -> Group:
    made = [dataclasses.replace(response(range(length)), grade=Grade(verdict)) for verdict in verdicts]
    return Group(prompts(1)[0], tuple(made))


def cuts(chosen: Cure, sample: Sample, text, draws: int) -> Counter:
    """Count the cuts of a response over many draws; every draw has another question."""
    found = [chosen.branch_prompt(Prompt(i, "q", (11, 12, 13)), 0, sample, text) for i in range(draws)]
    return Counter(len(branch.response_prefix) for branch in found)


# TV1


@pytest.mark.parametrize(
    "logits,temperature,expected",
    [
        ([0, 0], 1, 0.693147),
        ([math.log(3), 0], 1, 0.562335),
        ([math.log(3), 0], 0.5, 0.325083),
        ([1, 2, 3], 1, 0.832396),
        ([1, 2, 3], 2, 1.020191),
        ([2, 2, 2, 2], 1, 1.386294),
    ],
)
def test_entropy_is_of_the_whole_vocabulary_in_nats(logits, temperature, expected):
    rows = torch.tensor([logits], dtype=torch.float64)
    stats = token_stats_from_logits(rows, torch.tensor([0]), temperature=temperature)
    assert stats.entropy.item() == pytest.approx(expected, abs=1e-6)


# TV2 - TV5, TV17: the critical position

TEXTS = ["To", " solve", " x", " =", " Let", "'s", " consider", "\n\n", " Therefore", r" \[", "<eos>", "<pad>", "<pad>"]
TOKENS = [*range(20, 30), EOS, PAD, PAD]
ENTROPY = [5.0, 0.4, 3.0, 2.9, 2.5, 2.2, 1.9, 1.8, 1.7, 1.6, 0.1, 4.0, 0.0]
WORDS = dict(zip(TOKENS[:10], TEXTS, strict=False))


def text_of(token: int) -> str:
    return Script([], None, WORDS).token_text(token) if token != PAD else ""


@pytest.mark.parametrize("top,expected", [(3, [4, 5, 6]), (20, [4, 5, 6, 8, 9, 1])])
def test_candidates_are_the_first_k_that_may_be_cut(top, expected):
    order = np.argsort(-np.array(ENTROPY), kind="stable")
    assert critical_positions(order, TOKENS, text_of, top, 2) == expected
    found = cuts(cure(top=top), response(TOKENS[:11], ENTROPY[:11]), text_of, 300 * len(expected))
    assert set(found) == set(expected)
    for count in found.values():  # five standard deviations of a uniform draw
        assert count == pytest.approx(300, abs=5 * math.sqrt(300))


@pytest.mark.parametrize("texts", [["To", " x", "=", "\n\n", "�", " ", ""], ["To"], []])
def test_without_a_candidate_branches_start_at_the_question(texts):
    words = dict(enumerate(texts, start=20))
    chosen = cure()
    branch = chosen.branch_prompt(prompts(1)[0], 0, response(words, range(len(words))), lambda token: words[token])
    assert branch == prompts(1)[0] and branch.response_prefix == ()
    counted = chosen.pop_metrics()
    assert counted["rollout/cut_at_start"].value == 1 and counted["rollout/cut_shortened"].value == 0
    assert "rollout/cut_position" not in counted


def test_only_the_k_most_uncertain_are_drawn_and_each_as_often():
    entropy = [0.0, *np.linspace(3, 1, 25)]
    found = cuts(cure(), response(range(20, 46), entropy), lambda token: "word", 20 * 300)
    assert set(found) == set(range(1, 21))
    for count in found.values():
        assert count / 6000 == pytest.approx(0.05, abs=5 * math.sqrt(0.05 * 0.95 / 6000))


def test_equal_entropies_are_ordered_by_position():
    found = cuts(cure(top=2), response(range(20, 30), [1.0] * 10), lambda token: "word", 50)
    assert set(found) == {1, 2}


def peaked(flat: int, size: int = 40) -> torch.Tensor:
    """A toy policy, logits [token, next token], uncertain only after token `flat`."""
    logits = torch.eye(size).roll(1, 1) * 20
    logits[flat] = 0
    return logits


def test_the_token_drawn_from_the_uncertain_distribution_is_critical():
    """The distribution after response[3] produced response[4]."""
    script = Script(prompts(1), lambda prompt, number: [21, 22, 23, 24, 25, 26, EOS], logits=peaked(24))
    chosen = cure(top=1, initial_responses=1, branches=1, samples=2)
    (group,) = chosen.sample_groups(script, 1)
    assert script.sampled[1][0].response_prefix == (21, 22, 23, 24)
    assert group.samples[0].entropy.argmax() == 3 + 4
    assert chosen.pop_metrics()["rollout/cut_entropy"].value == pytest.approx(math.log(40), abs=1e-5)
    np.testing.assert_allclose(group.samples[0].entropy[3 + 4], math.log(40), rtol=1e-6)


def test_random_mode_draws_among_all_allowed_positions_and_needs_no_entropy():
    chosen = cure(critical_token="random", top=2)
    found = cuts(chosen, response(TOKENS[:11]), text_of, 6 * 300)
    assert set(found) == {1, 4, 5, 6, 8, 9}
    for count in found.values():
        assert count == pytest.approx(300, abs=5 * math.sqrt(300))
    script = Script(prompts(2), lambda prompt, number: [21, 22, EOS])
    chosen.sample_groups(script, 2)
    assert script.scored == 0 and "rollout/cut_entropy" not in chosen.pop_metrics()


@given(
    st.lists(st.tuples(st.floats(0, 11), st.sampled_from(["", " ", "x", " xy", "word"])), max_size=40),
    st.integers(1, 50),
)
def test_a_cut_is_always_allowed_and_among_the_k_most_uncertain(pairs, top):
    entropy, texts = [h for h, _ in pairs], dict(enumerate([text for _, text in pairs], start=20))
    sample = response(texts, entropy)
    chosen = cure(top=top)
    branch = chosen.branch_prompt(prompts(1)[0], 1, sample, texts.__getitem__)
    assert branch == chosen.branch_prompt(prompts(1)[0], 1, sample, texts.__getitem__), "drawn by seed"
    allowed = [i for i, text in enumerate(texts.values()) if i and len(text.strip()) > 1]
    cut = len(branch.response_prefix)
    assert branch.response_prefix == tuple(texts)[:cut]
    if not allowed:
        assert cut == 0
    else:
        surer = sum(np.float32(entropy[i]) > np.float32(entropy[cut]) for i in allowed)
        assert cut in allowed and surer < top


# TV6


@settings(max_examples=30)
@given(st.permutations(range(6)), st.integers(1, 60))
def test_cuts_do_not_depend_on_the_order_of_rows_or_their_micro_batches(order, budget):
    table = torch.randn(40, 40, generator=torch.Generator().manual_seed(1)) * 2

    def answer(prompt, number):
        return [20 + (prompt.index * 7 + number * 3 + i * i) % 19 for i in range(2 + 5 * prompt.index)]

    def branch_prompts(order, budget):
        script = Script([prompts(6)[i] for i in order], answer, logits=table, budget=budget)
        cure(initial_responses=2, branches=1, samples=4, top=3).sample_groups(script, 6)
        return {(s.index, i % 2): s.response_prefix for i, s in enumerate(script.sampled[1])}

    assert branch_prompts(order, budget) == branch_prompts(range(6), 10**6)


# TV7, TV14: the response prefix of a branch, and its trained tokens


@pytest.mark.parametrize(
    "room,cut,given_part",
    [(8, 3, (21, 22, 23)), (8, 0, ()), (8, 4, (21, 22, 23, 24)), (5, 4, (21, 22)), (3, 4, ())],
)
def test_a_branch_keeps_the_tokens_before_its_cut(room, cut, given_part):
    entropy = np.zeros(5)
    entropy[cut] = 1
    chosen = cure(room=room, top=1)
    only = {21 + cut} if cut else set()
    branch = chosen.branch_prompt(
        prompts(1)[0], 0, response(range(21, 26), entropy), lambda t: "word" if t in only else "x"
    )
    assert branch.response_prefix == given_part and branch.tokens == (11, 12, 13)
    assert chosen.pop_metrics()["rollout/cut_shortened"].value == (cut > room - 3)


def test_a_branch_trains_the_tokens_it_generates_and_no_others():
    def answer(prompt, number):
        return [31, 32, 33, 34, EOS] if prompt.response_prefix else [21, 22, 23, 24, 25]

    script = Script(prompts(1), answer, logits=peaked(23))
    chosen = cure(top=1, initial_responses=1, branches=1, samples=2)
    parent, branch = chosen.compute_advantages(chosen.reward(chosen.sample_groups(script, 1)))[0].samples
    assert branch.tokens.tolist() == [11, 12, 13, 21, 22, 23, 31, 32, 33, 34, EOS]
    assert branch.prompt_length == 6 and branch.parent == 0 and parent.parent is None
    assert np.count_nonzero(branch.weight) == np.count_nonzero(parent.weight) == 5
    assert branch.text == " word" * 4, "generated tokens only"
    batch = pack([branch], [0], device=CPU)
    assert batch.positions.tolist() == list(range(10))
    assert batch.targets.tolist() == [IGNORE_INDEX] * 5 + [31, 32, 33, 34, EOS]
    assert (batch.weight != 0).tolist() == [False] * 5 + [True] * 5


# TV8


@pytest.mark.parametrize("first,branches", [(2, 3), (4, 3), (1, 0), (3, 1)])
def test_a_group_holds_its_first_responses_and_then_their_branches_in_order(first, branches):
    numbers = iter(range(10**6))
    script = Script(prompts(2), lambda prompt, number: [next(numbers) + 100, 30, 31], logits=torch.zeros(200, 200))
    chosen = cure(initial_responses=first, branches=branches, samples=first * (1 + branches))
    groups = chosen.sample_groups(script, 2)
    for index, group in enumerate(groups):
        tags = [s.tokens[s.prompt_length] - 100 for s in group.samples]
        rows = range(index * first, (index + 1) * first)
        assert tags == [*rows, *(2 * first + branches * row + i for row in rows for i in range(branches))]
        assert [s.parent for s in group.samples] == [None] * first + [p for p in range(first) for _ in range(branches)]
        assert group.prompt.response_prefix == () and len(group.samples) == first * (1 + branches)
        for s in group.samples[first:]:  # a branch begins with tokens of its own parent
            own = s.tokens[3 : s.prompt_length]
            np.testing.assert_array_equal(own, group.samples[s.parent].tokens[3 : s.prompt_length])


def test_first_responses_and_branches_must_make_up_the_group():
    with pytest.raises(ConfigError, match=r"batch\.samples=16 .* 4 \* \(1 \+ 2\) = 12"):
        cure(initial_responses=4, branches=2, samples=16)


# TV9 - TV11: rewards, filter, advantages


@pytest.mark.parametrize(
    "right,expected", [(4, (1.677049, -0.559016)), (1, (3.749993, -0.250000)), (0, (0, 0)), (16, (0, 0))]
)
def test_originals_and_branches_share_one_baseline(right, expected):
    chosen = cure(overlong_buffer=0)
    (group,) = chosen.compute_advantages(chosen.reward([graded(*[True] * right, *[False] * (16 - right))]))
    advantages = [s.response("advantage") for s in group.samples]
    np.testing.assert_allclose(advantages[0], expected[0], atol=1e-6)
    np.testing.assert_allclose(advantages[-1], expected[1], atol=1e-6)
    assert chosen.pop_metrics()["train/zero_advantage"].value == (right in (0, 16))


@pytest.mark.parametrize("limit,length,expected", [
    (2596, 2084, 0), (2596, 2085, -0.001953125), (2596, 2596, -1),
    (3584, 3072, 0), (3584, 3073, -0.001953125), (3584, 3328, -0.5), (3584, 3584, -1),
])  # fmt: skip
@pytest.mark.parametrize("correct", [True, False])
def test_overlong_penalty_adds_to_the_verdict(limit, length, expected, correct):
    (group,) = cure(limit=limit).reward([graded(correct, length=length)])
    assert group.samples[0].reward == (1 if correct else -1) + expected


def test_a_response_prefix_does_not_count_as_length():
    long = dataclasses.replace(response(range(2000), prompt_length=1003), grade=Grade(True))
    (group,) = cure().reward([Group(prompts(1)[0], (long,))])
    assert group.samples[0].reward == 1


@pytest.mark.parametrize("right,kept", [(0, False), (1, True), (15, True), (16, False)])
def test_unanimous_groups_are_dropped_at_any_length(right, kept):
    """The right answers come last, among the branches: originals all wrong but a branch right is a mixed group."""
    groups = [graded(*[False] * (16 - right), *[True] * right, length=2500)]
    chosen = cure(max_rounds=1)
    chosen.sample_groups = lambda rollouts, count: groups
    assert bool(chosen.generate(Script([], None))) == kept
    assert chosen.pop_metrics()["rollout/mixed_groups"].value == kept


def test_a_step_trains_on_the_first_groups_that_were_kept():
    mixed, unanimous = graded(True, *[False] * 15), graded(*[False] * 16)
    made = [Group(Prompt(i, "q", (1,)), (mixed if i % 5 < 3 else unanimous).samples) for i in range(1000)]
    chosen = cure(num_prompts=512, generation_prompts=1000)
    chosen.sample_groups = lambda rollouts, count: made[:count]
    groups = chosen.generate(Script([], None))
    assert [g.prompt.index for g in groups] == [i for i in range(1000) if i % 5 < 3][:512]
    assert sum(len(g.samples) for g in groups) == 8192


# TV12, TV13: the loss


@pytest.mark.parametrize(
    "advantage,ratio,expected,has_gradient",
    [
        (1, 0.5, -0.5, True), (1, 1.1, -1.1, True), (1, 1.28, -1.28, None), (1, 1.5, -1.28, False),
        (-1, 0.5, 0.8, False), (-1, 1.1, 1.1, True), (-1, 1.5, 1.5, True), (-1, 50, 10, False),
    ],
)  # fmt: skip
def test_token_loss_of_the_release(advantage, ratio, expected, has_gradient):
    logprob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    batch = Batch(zero, zero, zero, zero, (0,), weight=zero + 1, advantage=zero + advantage, logprob=zero)
    loss, _ = cure().loss(TokenStats(logprob=logprob, entropy=zero), batch)
    loss.sum().backward()
    assert loss.item() == pytest.approx(expected)
    assert has_gradient is None or bool(logprob.grad) == has_gradient


@pytest.mark.parametrize("micro_batches", [[[0, 1]], [[0], [1]]])
def test_a_token_weighs_the_same_in_every_micro_batch(micro_batches):
    """The deliberate difference: two micro-batches give 0.5 in the release, 0.25 here."""
    samples = objectives.token_mean([response([20]), response([21, 22, 23])])
    total = 0.0
    for indices in micro_batches:
        batch = pack(samples, indices, device=CPU)
        total += float((batch.weight * (batch.targets == 20)).sum())
    assert total == 0.25


# TV15: what the verifier sees

ANSWERS = {20: " So\nAnswer", 21: ":", 22: " 12", 23: "\nAnswer: 12\n", 24: r"Answer: \boxed{12}", 25: "Answer: 3\n"}


@pytest.mark.parametrize(
    "reused,generated,graded_as,correct",
    [
        ((20, 21), [22, EOS], "generated", False),
        ((20, 21), [22, EOS], "answer", True),
        ((30,), [23, EOS], "generated", True),
        ((30,), [24, EOS], "generated", True),
        ((), [25, 23, EOS], "generated", True),
        ((), [23, 25, EOS], "generated", False),
        ((23,), [30, EOS], "generated", False),
        ((23,), [30, EOS], "answer", True),
    ],
)
def test_a_branch_is_graded_by_its_own_tokens_or_the_whole_answer(reused, generated, graded_as, correct):
    first = [*reused, 39, EOS]
    logits = peaked(reused[-1] if reused else 13)
    script = Script(prompts(1), lambda p, n: generated if len(script.sampled) == 2 else first, ANSWERS, logits)
    chosen = cure(top=1, initial_responses=1, branches=1, samples=2, graded=graded_as, min_characters=1)
    (group,) = chosen.sample_groups(script, 1)
    assert script.sampled[1][0].response_prefix == reused
    assert group.samples[1].grade.correct == correct
    (rewarded,) = chosen.reward([group])
    assert rewarded.samples[1].reward == (1 if correct else -1)


# TV16


def rates(updates: int, **settings) -> list[float]:
    """The learning rate of each optimizer update of a stage: the schedule moves after the optimizer."""
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=0)
    schedule = build_schedule(OptimizerConfig(lr=1e-6, **settings), optimizer, updates)
    seen = []
    for _ in range(updates):
        seen.append(optimizer.param_groups[0]["lr"])
        schedule.step(increment=1)
    return seen


def test_warm_up_is_the_releases_with_one_update_a_step():
    seen = rates(20, warmup_steps=10)
    np.testing.assert_allclose([seen[0], seen[1], seen[5], *seen[10:]], [0, 1e-7, 5e-7, *[1e-6] * 10], rtol=1e-12)


def test_with_sixteen_updates_a_step_warm_up_agrees_at_the_first_of_each():
    """The release steps its schedule once a step; here it moves with every update: 160 stand for 10 steps."""
    seen = rates(16 * 20, warmup_steps=160)
    np.testing.assert_allclose(seen[::16], [min(1, step / 10) * 1e-6 for step in range(20)], rtol=1e-12)
    assert seen[1] > 0 and max(seen) == pytest.approx(1e-6)


# TV18


def test_without_branches_it_is_dapo():
    numbers = np.random.default_rng(1).integers(20, 28, (40, 16))

    def run(config):
        script = Script(prompts(40), lambda p, n: [int(numbers[p.index, n]), EOS], {20: "Answer: 12"})
        built = build_method(config_of(config, num_prompts=8))
        groups = built.generate(script)
        filled = [g.with_samples(dataclasses.replace(s, logprob=s.constant(-1)) for s in g.samples) for g in groups]
        samples = samples_of(built.compute_advantages(built.reward(filled)))
        batch = pack(samples, range(len(samples)), device=CPU)
        stats = TokenStats(logprob=torch.linspace(-3, 0, len(batch.tokens)), entropy=torch.zeros(len(batch.tokens)))
        loss, _ = built.loss(stats, batch)
        return (
            script.sampled,
            [s.tokens.tolist() for s in samples],
            batch.weight,
            batch.advantage,
            loss,
            built.pop_metrics(),
        )

    left = run(CureConfig(initial_responses=16, branches=0))
    right = run(DapoConfig(overlong_buffer=512))
    for a, b in zip(left, right, strict=True):
        assert a.equal(b) if isinstance(a, torch.Tensor) else a == b
    assert left[0] and len(left[1]) == 8 * 16


# Hard cases


def test_responses_of_no_or_one_token_are_branched_at_the_question():
    script = Script(prompts(2), lambda p, n: [[], [EOS]][p.index], logits=torch.zeros(40, 40))
    chosen = cure(initial_responses=2, branches=1, samples=4)
    groups = chosen.compute_advantages(chosen.reward(chosen.sample_groups(script, 2)))
    assert [len(g.samples) for g in groups] == [0, 4] and not any(s.advantage.any() for s in samples_of(groups))
    counted = chosen.pop_metrics()
    assert counted["rollout/cut_at_start"] == Metric(4, 4) and counted["train/empty"] == Metric(4, 8)
    assert counted["train/zero_advantage"] == Metric(2, 2)


def test_k_larger_than_the_response_takes_every_allowed_position():
    assert critical_positions(np.array([2, 0, 1]), [20, 21, 22], lambda token: "word", 10**6, 2) == [2, 1]


def test_a_group_of_one_has_zero_advantage():
    chosen = cure(initial_responses=1, branches=0, samples=1)
    (group,) = chosen.compute_advantages(chosen.reward([graded(True)]))
    assert not group.samples[0].advantage.any() and chosen.pop_metrics()["train/zero_advantage"].value == 1


def test_special_tokens_have_no_text():
    script = Script([], None, {20: " word"})
    assert [script.token_text(token) for token in (EOS, PAD, 20)] == ["", "", " word"]


# Two methods in one


class CureCer(Cure, Cer):
    """Groups branch at critical tokens; confidence is rewarded."""


class CureCerConfig(CureConfig, CerConfig):
    method: ClassVar[type] = CureCer
    name: str = "cure_cer"
    kl_coefficient: float = 0.001  # CER's; CureConfig inherits another default


def test_two_methods_combine_in_one_class():
    config = CureCerConfig(initial_responses=1, branches=1, top=1, graded="answer", entropy_weight=2)
    chosen = build_method(config_of(config, samples=2))
    assert isinstance(chosen, CureCer) and chosen.settings is config and chosen.reference == "initial"
    script = Script(prompts(1), lambda p, n: [30, EOS] if p.response_prefix else [23, 31, 32, EOS], ANSWERS, peaked(31))
    (group,) = chosen.sample_groups(script, 1)
    assert script.sampled[1][0].response_prefix == (23, 31)
    scored = script.score([group])
    (rewarded,) = chosen.reward(scored)
    for s in rewarded.samples:
        teca = s.response("entropy").mean()
        assert s.reward == pytest.approx((1 + 2 * (1 + math.exp(-teca))) / 2)
    assert chosen.pop_metrics()["rollout/cut_entropy"].value > 3
    with pytest.raises(ConfigError, match=r"batch\.samples"):
        build_method(config_of(config, samples=3))


class CureSent(Cure, Sent):
    """Groups branch at critical tokens; tokens of low entropy are penalized."""


class CureSentConfig(CureConfig, SentConfig):
    method: ClassVar[type] = CureSent
    name: str = "cure_sent"


@pytest.mark.parametrize("form", ["paper", "release"])
def test_a_method_can_sample_as_one_and_penalize_as_another(form):
    config = CureSentConfig.model_validate(
        {"form": form, "initial_responses": 1, "branches": 1, "top": 1, "low_fraction": 0.5, "overlong_buffer": 0}
    )
    built = build_method(config_of(config, samples=2).model_copy(update={"batch": BatchConfig(samples=2, updates=2)}))
    assert isinstance(built, CureSent) and built.reference == "initial" and built.settings is config
    assert config.clip == (form == "paper") and config.clip_high == 0.28
    script = Script(prompts(1), lambda p, n: [30, EOS] if p.response_prefix else [23, 31, 32, EOS], ANSWERS, peaked(31))
    (group,) = built.compute_advantages(built.reward(script.score(built.sample_groups(script, 1))))
    advantages = [s.response("advantage")[0] for s in group.samples]
    np.testing.assert_allclose(advantages, [math.sqrt(0.5), -math.sqrt(0.5)], atol=1e-5)
    penalized = np.concatenate([s.response("kl_weight") for s in group.samples])
    assert set(penalized) <= {np.float32(b) for b in (0, config.beta_low, config.beta_high)}
    counted = built.pop_metrics()
    assert counted["train/low_entropy_frac"].value == 0.5 and counted["rollout/cut_entropy"].value > 3


def test_the_length_penalty_of_one_adds_to_the_reward_of_the_other():
    chosen = build_method(config_of(CureCerConfig(), limit=2596))
    long = dataclasses.replace(graded(True, length=2596).samples[0], entropy=np.zeros(2599, np.float32))
    (group,) = chosen.reward([Group(prompts(1)[0], (long,))])
    assert group.samples[0].reward == 1.5 - 1
