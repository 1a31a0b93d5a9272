"""Where samples come from: prompts, engines, verifier and actor behind the one door a method sees (`Rollouts`).

Rank 0 drives the engines and the verifier and shares what they answer; every rank holds the same groups afterwards.
Every request carries a seed that is a function of (run, stage, step, prompt, sample), so a run can be repeated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_entropy.actor.actor import Actor
from megatron_entropy.config.schema import Config
from megatron_entropy.data.dataset import PromptStream
from megatron_entropy.data.tokenizer import Tokenizer
from megatron_entropy.distributed import process_groups
from megatron_entropy.distributed.seeds import derive_seed
from megatron_entropy.errors import EngineLost, Fault
from megatron_entropy.monitor.timer import StepTimer
from megatron_entropy.records import Grade, Group, GuidedTemperature, Metric, Prompt, Sample
from megatron_entropy.rewards.pool import RewardPool
from megatron_entropy.rollout import recording
from megatron_entropy.rollout.engine import Completion, Request
from megatron_entropy.rollout.pool import EnginePool
from megatron_entropy.weights.sync import WeightSync

log = logging.getLogger(__name__)


class Sampler:
    """Samples, grades and scores for one stage; every method that moves data is a collective."""

    def __init__(
        self,
        config: Config,
        *,
        stream: PromptStream,
        tokenizer: Tokenizer,
        actor: Actor,
        push: WeightSync | None,
        pool: EnginePool | None,
        clock: StepTimer,
        temperature: float,
        reference: Literal["none", "initial", "ema", "policy"] = "none",
    ) -> None:
        """Put the parts together.

        Args:
            temperature: of the policy's distribution, where it is scored.
            reference: what the method calls so.
            push: on every rank; None when the stage needs no engines.
            pool: the engines, on rank 0 only.
        """
        self.config = config
        self.stream = stream
        self.actor = actor
        self.clock = clock
        self.temperature = temperature
        self.version = 0
        self._reference = reference
        self._is_stale = True
        self._tokenizer = tokenizer
        self._push = push
        self._pool = pool
        reward = config.reward
        self._grader = RewardPool(verifier=reward.verifier, workers=reward.workers, timeout=reward.timeout)
        self._metrics: dict[str, Metric] = {}
        self._drawn: Counter[int] = Counter()
        self._step = 0
        self._calls = 0
        self._colocated = config.rollout.colocate and push is not None
        if self._colocated:
            self._end_turn()

    def begin_step(self, step: int) -> None:
        """Start counting for a step; seeds depend on its number."""
        self._step = step
        self._calls = 0
        self._drawn.clear()
        self._metrics.clear()

    def metrics(self) -> dict[str, Metric]:
        """What has been counted since the step began; `rollout/tokens` is the number of all that were generated."""
        lengths = self._metrics.get("rollout/length")
        return {**self._metrics, "rollout/tokens": Metric(lengths.total)} if lengths else dict(self._metrics)

    def count(self, name: str, metric: Metric) -> None:
        """Add to a metric of the step."""
        self._metrics[name] = self._metrics.get(name, Metric(0.0, 0.0)) + metric

    def take(self, count: int) -> list[Prompt]:
        """The next prompts of the training data."""
        return self.stream.take(count)

    def sample(self, prompts: Sequence[Prompt], samples: int, *, grade_prefix: bool = False) -> list[Group]:
        """So many graded responses to each prompt, or continuations of its given part, at the rollout temperature."""
        rollout = self.config.rollout
        keys = []
        for prompt in prompts:
            keys.append((self._step, prompt.index, self._drawn[prompt.index]))
            self._drawn[prompt.index] += 1
        groups = self._ask(
            self.config.name, prompts, keys, samples, rollout.temperature, rollout.top_p, grade_prefix=grade_prefix
        )
        self._count_rollouts(groups)
        return groups

    def sample_for_evaluation(self, prompts: Sequence[Prompt], samples: int, temperature: float) -> list[Group]:
        """The same for held-out prompts; the seeds depend on neither stage nor step, so evaluations compare."""
        keys = [(0, prompt.index, 0) for prompt in prompts]
        return self._ask("eval", prompts, keys, samples, temperature, 1.0)

    def score(self, groups: Sequence[Group], *, entropy: bool = True, temperature: float | None = None) -> list[Group]:
        """The groups with `logprob` (and `entropy`) filled by the actor, by default at the policy's temperature.

        Samples that have them already keep them.
        """

        def compute(samples: list[Sample]) -> list[Sample]:
            return self.actor.score(samples, temperature=temperature or self.temperature, entropy=entropy)

        def lacks(sample: Sample) -> bool:
            return sample.logprob is None or (entropy and sample.entropy is None)

        with self.clock("score"):
            return _fill(groups, lacks, compute)

    def score_reference(
        self, groups: Sequence[Group], temperature: float | GuidedTemperature | None = None
    ) -> list[Group]:
        """The groups with `reference_logprob` filled by the reference, by default at the policy's temperature."""
        assert self._reference != "none", "the method has declared no reference"

        def compute(samples: list[Sample]) -> list[Sample]:
            chosen = self.temperature if temperature is None else temperature
            return self.actor.score_reference(samples, temperature=chosen, by_policy=self._reference == "policy")

        with self.clock("teacher"):
            return _fill(groups, lambda sample: True, compute)

    def update_ema(self, share: float) -> None:
        """The reference becomes `(1 - share) * reference + share * policy`."""
        assert self.actor.reference is not None and self._reference == "ema"
        with self.clock("teacher"):
            self.actor.reference.move(share)

    def text(self, token: int) -> str:
        """The text of a single token; nothing for special tokens."""
        return "" if token in self._tokenizer.eos_ids else self._tokenizer.decode([token])

    def weights_changed(self) -> None:
        """The actor was updated: its weights are pushed before the engines are next asked."""
        self._is_stale = True

    def close(self) -> None:
        """Leave the engines (they stay) and stop the verifier's workers."""
        if self._push is not None:
            self._push.close()
        self._grader.close()

    def _sync_weights(self) -> None:
        """Send the actor's weights to every engine, restarting engines that die on the way."""
        while not self._try_sync():
            pass

    def _try_sync(self) -> bool:
        """Push once; False when an engine was lost and is being made anew. A collective."""
        assert self._push is not None, "the stage was built without engines"
        if self._colocated:
            self._end_turn()

        def attempt() -> tuple[int, ...]:
            assert self._push is not None and self._pool is not None
            try:
                self._push.push(self.version, self._pool.clients())
            except EngineLost as lost:
                log.warning("weights could not be pushed: %s", lost.reason)
                return lost.indices
            return ()

        process_groups.run_on_rank_zero(
            self._wait_ready
        )  # a fault told after the others are in the push would not reach them
        lost = self._wake("weights")
        if not lost:
            if process_groups.rank() != 0:
                self._push.push(self.version, None)
            lost = process_groups.run_on_rank_zero(attempt)
        if self._colocated:
            self.actor.offload()
            process_groups.barrier()
        if not lost:
            lost = self._wake("kv_cache")
        if lost:
            process_groups.run_on_rank_zero(lambda: self._restart(lost))
        return not lost

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Colocated engines work inside: whatever happens there, the GPUs are the actor's again afterwards."""
        if not self._colocated:
            yield
            return
        try:
            yield
        except BaseException:  # of one rank alone, perhaps: no collective here
            with contextlib.suppress(Fault):
                if self._pool is not None:
                    self._sleep()
            self.actor.onload()
            raise
        self._end_turn()

    def _wake(self, part: Literal["weights", "kv_cache"]) -> tuple[int, ...]:
        """Bring a part of colocated engines back; returns those that were lost. A collective."""

        def wake() -> tuple[int, ...]:
            assert self._pool is not None
            try:
                for client in self._pool.clients():
                    client.wake(part)
            except EngineLost as lost:
                return lost.indices
            return ()

        return process_groups.run_on_rank_zero(wake) if self._colocated else ()

    def _wait_ready(self) -> None:
        assert self._pool is not None
        self._pool.wait_ready()

    def _restart(self, indices: Sequence[int]) -> None:
        assert self._pool is not None
        self._pool.restart(indices)
        self._pool.wait_ready()

    def _end_turn(self) -> None:
        """The engines' memory goes, the actor's comes back; a collective."""
        process_groups.run_on_rank_zero(self._sleep)
        self.actor.onload()

    def _sleep(self) -> None:
        assert self._pool is not None
        self._pool.wait_ready()
        for client in self._pool.clients():
            with contextlib.suppress(EngineLost):  # seen when it is next asked
                client.sleep()

    def _ask(
        self,
        purpose: str,
        prompts: Sequence[Prompt],
        keys: Sequence[tuple[int, ...]],
        samples: int,
        temperature: float,
        top_p: float,
        *,
        grade_prefix: bool = False,
    ) -> list[Group]:
        requests = [
            Request(
                key=(place, number),
                tokens=prompt.tokens + prompt.response_prefix,
                seed=derive_seed(self.config.seed, purpose, *key, number),
                max_tokens=self.config.rollout.max_response_tokens,
                temperature=temperature,
                top_p=top_p,
            )
            for place, (prompt, key) in enumerate(zip(prompts, keys, strict=True))
            for number in range(samples)
        ]
        rollout = self.config.rollout
        file = Path(self.config.name) / f"{self._step:06d}_{self._calls:02d}_{purpose}.npz"
        self._calls += 1
        answers = [] if rollout.replay else self._answers(requests, purpose)

        def graded() -> list[Group]:
            completions = recording.read(Path(rollout.replay) / file, requests) if rollout.replay else answers
            if rollout.record:
                recording.write(Path(rollout.record) / file, requests, completions)
            return self._graded(prompts, samples, {c.key: c for c in completions}, grade_prefix)

        with self.clock("reward"):
            return process_groups.run_on_rank_zero(graded)

    def _answers(self, requests: list[Request], purpose: str) -> list[Completion]:
        """The engines' answers, by the actor's present weights; on rank 0 only."""
        with self._turn():
            if self._is_stale or self._colocated:  # engines that slept have lost their weights
                self.version += self._is_stale
                with self.clock("push"):
                    self._sync_weights()
                self._is_stale = False
            with self.clock("generate"):
                return list(self._complete(requests, purpose).values())

    def _complete(self, requests: list[Request], purpose: str) -> dict[tuple[int, ...], Completion]:
        """Have every request answered, whatever happens to the engines; the answers are on rank 0 only."""
        answered: dict[tuple[int, ...], Completion] = {}

        def attempt() -> bool:
            assert self._pool is not None
            missing = [request for request in requests if request.key not in answered]
            completions, dead = self._pool.generate(missing, f"{purpose} step {self._step}")
            answered.update({completion.key: completion for completion in completions})
            self._pool.restart(dead)
            return bool(dead)

        while process_groups.run_on_rank_zero(attempt):
            self._sync_weights()
        return answered

    def _graded(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        completions: dict[tuple[int, ...], Completion],
        grade_prefix: bool,
    ) -> list[Group]:
        drafts = [
            [self._sample(prompt, completions[place, number]) for number in range(samples)]
            for place, prompt in enumerate(prompts)
        ]
        answers = [
            (self._answer(prompt, sample, grade_prefix), prompt.answer or "")
            for prompt, group in zip(prompts, drafts, strict=True)
            for sample in group
        ]
        grades = iter(self._grader.grade(answers))
        return [
            Group(prompt, tuple(dataclasses.replace(sample, grade=next(grades)) for sample in group))
            for prompt, group in zip(prompts, drafts, strict=True)
        ]

    def _answer(self, prompt: Prompt, sample: Sample, grade_prefix: bool) -> str:
        """What the verifier sees of a sample."""
        if not (grade_prefix and prompt.response_prefix):
            return sample.text
        return self._tokenizer.decode(sample.tokens[len(prompt.tokens) :].tolist())

    def _sample(self, prompt: Prompt, completion: Completion) -> Sample:
        known = prompt.tokens + prompt.response_prefix
        return Sample(
            tokens=np.concatenate([np.array(known, np.int32), completion.tokens]),
            prompt_length=len(known),
            finish_reason=completion.finish_reason,
            text=self._tokenizer.decode(completion.tokens.tolist()),
            policy_version=self.version,
            rollout_logprob=np.concatenate([np.zeros(len(known), np.float32), completion.logprobs]),
        )

    def _count_rollouts(self, groups: Sequence[Group]) -> None:
        for sample in (s for group in groups for s in group.samples):
            assert sample.grade is not None
            self.count("rollout/length", Metric(sample.response_length))
            self.count("rollout/truncated", Metric(sample.finish_reason == "length"))
            self.count("reward/errors", Metric(sample.grade.correct is None))
            if sample.grade.correct is not None:
                self.count("reward/accuracy", Metric(sample.grade.correct))
            elif sample.grade.error:
                self.count(f"reward/error_{_kind(sample.grade)}", Metric(1.0, len(groups) * len(groups[0].samples)))


def _fill(
    groups: Sequence[Group], lacks: Callable[[Sample], bool], compute: Callable[[list[Sample]], list[Sample]]
) -> list[Group]:
    """The groups with what `compute` makes of those samples that lack something, in one call."""
    missing = [sample for group in groups for sample in group.samples if lacks(sample)]
    filled = iter(compute(missing) if missing else [])
    return [group.with_samples([next(filled) if lacks(s) else s for s in group.samples]) for group in groups]


def _kind(grade: Grade) -> str:
    return (grade.error or "").split(":")[0].lower()
