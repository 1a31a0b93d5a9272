"""Entropies from the engines in training: collected, recorded, used instead of a pass of the actor, compared with it.

The engines are scripted here; `tests/engines` has real ones.
"""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_entropy.config.schema import Config, EvalConfig, RolloutConfig
from megatron_entropy.errors import Fault
from megatron_entropy.evaluation.evaluate import evaluate
from megatron_entropy.methods import build_method
from megatron_entropy.methods.cer import CerConfig
from megatron_entropy.methods.cure import CureConfig
from megatron_entropy.methods.sent import SentConfig
from megatron_entropy.monitor.timer import StepTimer
from megatron_entropy.records import Grade, Group, Prompt, refill, samples_of
from megatron_entropy.rollout import recording
from megatron_entropy.rollout.engine import Completion, Request
from megatron_entropy.rollout.entropy import EntropyTable, Recorded, uncut_logprobs
from megatron_entropy.trainer.rollouts import MethodRollouts, build_groups

WORDS = SimpleNamespace(
    eos_ids=(0,), decode=lambda ids: " word" * len(list(ids)), text_of=lambda token: " word" if token else ""
)
ENGINE, ACTOR = 0.25, 0.125
"""What engine and actor add to the entropy of a token, its number."""


def config_of(method=None, *, entropy=True, check_every=10, temperature=0.7):
    rollout = RolloutConfig(entropy=entropy, entropy_check_every=check_every, temperature=temperature)
    return Config(steps=1, method=method or CureConfig(), rollout=rollout, batch={"prompts": 2, "samples": 16})


class Actor:
    """Scores by formula, and keeps the names of the fields that it was asked for."""

    def __init__(self):
        self.passes = []
        self.arch = SimpleNamespace(hidden_size=64)

    def score(self, samples, statistics):
        stats = SimpleNamespace(logprob=None, entropy=None)
        with pytest.MonkeyPatch.context() as patch:
            from megatron_entropy.actor import statistics as module

            patch.setattr(module, "head_statistics", lambda head, *, temperature, entropy: self._note(entropy, stats))
            fields = sorted(statistics(None))
        self.passes.append((len(samples), fields))
        columns = {"logprob": lambda s: -s.tokens - ACTOR, "entropy": lambda s: s.tokens + ACTOR}
        return [dataclasses.replace(s, **{f: columns[f](s).astype(np.float32) for f in fields}) for s in samples]

    def _note(self, entropy, stats):
        stats.logprob, stats.entropy = 0, 0 if entropy else None
        return stats


def rollouts_of(config, monkeypatch):
    """`MethodRollouts` whose engines answer every request with five tokens."""
    numbers = iter(range(10**6))

    def generate(requests, description, file):
        completions = []
        for request in requests:
            tokens = np.array([(next(numbers) * 3 + i * 5) % 17 + 20 for i in range(5)], np.int32)
            entropy = (tokens + ENGINE).astype(np.float32) if config.rollout.entropy else None
            uncut = None if entropy is None else -tokens.astype(np.float32)
            completions.append(Completion(request.key, tokens, np.zeros(5, np.float32), "stop", entropy, uncut))
        return completions

    prompts = iter(Prompt(index, "q", (11, 12, 13), "1") for index in range(1000))
    actor = Actor()
    rollouts = MethodRollouts(
        config,
        stream=SimpleNamespace(position=0, take=lambda count: [next(prompts) for _ in range(count)]),
        tokenizer=WORDS,
        actor=actor,
        service=SimpleNamespace(generate=generate, version=1),
        timer=StepTimer(),
        temperature=config.rollout.temperature,
    )
    monkeypatch.setattr(
        "megatron_entropy.trainer.rollouts.grade_groups",
        lambda groups, **_: refill(groups, [dataclasses.replace(s, grade=Grade(True)) for s in samples_of(groups)]),
    )
    rollouts.begin_step(1)
    return rollouts, actor


def test_records_come_in_any_order_and_what_belongs_to_no_token_is_dropped():
    table = EntropyTable(2, 3)
    rows = np.array([1, 0, -1, 1, 1, 9, 1])
    positions = np.array([1, 0, 0, -2, 0, 0, 3])
    values = np.arange(14, dtype=np.float32).reshape(7, 2)
    table.add([Recorded(rows[:4], positions[:4], values[:4]), Recorded(rows[4:], positions[4:], values[4:])])
    entropy, top = table.response(1, 2)
    assert entropy.tolist() == [8, 0] and top.tolist() == [9, 1]
    with pytest.raises(RuntimeError, match="sampled 1 of 2 tokens of request 0 without recording entropy"):
        table.response(0, 2)


def test_log_probs_before_the_cut_follow_from_those_of_the_most_probable_token():
    full = np.log([0.5, 0.3, 0.15, 0.05]).astype(np.float32)
    cut = full[:2] - np.log(0.8)
    np.testing.assert_allclose(uncut_logprobs(cut, np.repeat(cut[:1], 2), np.repeat(full[:1], 2)), full[:2], atol=1e-6)


@pytest.mark.parametrize("entropy,passes", [(False, 1), (True, 0)])
def test_cure_cuts_without_a_pass(monkeypatch, entropy, passes):
    config = config_of(entropy=entropy)
    rollouts, actor = rollouts_of(config, monkeypatch)
    groups = build_method(config).sample_groups(rollouts, 2)
    assert len(actor.passes) == passes
    prefixes = [sample.prompt_length - 3 for group in groups for sample in group.samples[4:]]
    rollouts.score(groups)
    first, every = (8, ["entropy", "logprob"]), ["entropy", "logprob"]
    assert actor.passes == ([(32, ["logprob"])] if entropy else [first, (24, every)])
    other, _ = rollouts_of(config_of(entropy=not entropy), monkeypatch)
    again = build_method(config_of(entropy=not entropy)).sample_groups(other, 2)
    assert prefixes == [sample.prompt_length - 3 for group in again for sample in group.samples[4:]]


@pytest.mark.parametrize("method,source", [(CerConfig(), ENGINE), (SentConfig(), ACTOR)])
def test_the_actor_computes_what_is_missing(monkeypatch, method, source):
    config = config_of(method)
    rollouts, actor = rollouts_of(config, monkeypatch)
    built = build_method(config)
    groups = rollouts.score(built.generate(rollouts), take_rollout_entropy=built.takes_rollout_entropy)
    assert actor.passes == [(32, ["logprob"] if source == ENGINE else ["entropy", "logprob"])]
    for sample in samples_of(groups):
        np.testing.assert_array_equal(sample.response("entropy"), sample.response("tokens") + source)
        assert sample.rollout_entropy[:3].tolist() == [0, 0, 0]
    assert samples_of(rollouts.score(groups))[0] is samples_of(groups)[0] and len(actor.passes) == 1
    assert rollouts.pop_metrics()["rollout/entropy"].count == 32 * 5


def test_an_entropy_at_another_temperature_is_not_taken(monkeypatch):
    rollouts, actor = rollouts_of(config_of(), monkeypatch)
    groups = rollouts.sample(rollouts.take_prompts(1), 2)
    rollouts.score(groups, temperature=1.0)
    assert actor.passes == [(2, ["entropy", "logprob"])]


@pytest.mark.parametrize(
    "settings,passes",
    [({}, []), ({"temperature": 0.6, "top_p": 0.9}, []), ({"repetition_penalty": 1.1}, [(2, ["entropy", "logprob"])])],
)
def test_evaluation_needs_no_pass_unless_the_engine_measured_another_distribution(monkeypatch, settings, passes):
    rollouts, actor = rollouts_of(config_of(), monkeypatch)
    metrics, groups = evaluate(rollouts, rollouts.take_prompts(2), EvalConfig(**settings))
    tokens = np.concatenate([sample.response("tokens") for sample in samples_of(groups)])
    assert actor.passes == passes
    assert metrics["eval/entropy"].value == pytest.approx(tokens.mean() + (ACTOR if passes else ENGINE))


def test_both_sources_are_compared_every_few_steps_and_the_engines_values_stay(monkeypatch, caplog):
    rollouts, actor = rollouts_of(config_of(check_every=2), monkeypatch)
    with caplog.at_level("INFO"):
        for step in (1, 2, 3):
            rollouts.begin_step(step)
            groups = rollouts.score(rollouts.sample(rollouts.take_prompts(1), 2))
            metrics = rollouts.pop_metrics()
            assert ("rollout/entropy_diff" in metrics) == (step == 2)
            for sample in samples_of(groups):
                np.testing.assert_array_equal(sample.response("entropy"), sample.response("tokens") + ENGINE)
            if step == 2:
                found = {name: metrics[f"rollout/{name}"].value for name in ("entropy_diff", "entropy_diff_max")}
                assert found == {"entropy_diff": ENGINE - ACTOR, "entropy_diff_max": ENGINE - ACTOR}
                assert metrics["rollout/logprob_diff"].value == metrics["rollout/logprob_diff_max"].value == ACTOR
    assert [fields for _, fields in actor.passes] == [["logprob"], ["entropy", "logprob"], ["logprob"]]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(
        "step 2: engine (float32) against trainer (float32) over 10 tokens: entropy differs by 1.2e-01"
    )


def test_recorded_completions_keep_their_entropies(tmp_path):
    requests = [Request((number,), (5, 6), 1, 8, 1.0) for number in range(2)]
    column = [np.array(values, np.float32) for values in ([-1, -2], [-3])]
    completions = [
        Completion((n,), np.arange(len(c), dtype=np.int32), c, "stop", -c, 2 * c) for n, c in enumerate(column)
    ]
    recording.write(tmp_path / "a.npz", requests, completions)
    for one, other in zip(recording.read(tmp_path / "a.npz", requests, needs_entropy=True), completions, strict=True):
        for field in dataclasses.fields(Completion):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))
    plain = [dataclasses.replace(c, entropy=None, uncut_logprobs=None) for c in completions]
    recording.write(tmp_path / "b.npz", requests, plain)
    assert [c.entropy for c in recording.read(tmp_path / "b.npz", requests)] == [None, None]
    with pytest.raises(Fault, match=r"b.npz was recorded without entropies; set rollout.entropy=false"):
        recording.read(tmp_path / "b.npz", requests, needs_entropy=True)


def test_entropies_are_not_used_by_a_stage_that_does_not_want_them():
    completion = Completion((0,), np.zeros(1, np.int32), *[np.zeros(1, np.float32)], "stop", np.ones(1), np.ones(1))
    (group,) = build_groups([Prompt(0, "q", (1,))], 1, [completion], tokenizer=WORDS, policy_version=1)
    assert isinstance(group, Group) and group.samples[0].rollout_entropy is None
