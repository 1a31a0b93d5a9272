"""What methods can use: prompts, graded samples, scores of the actor and of the reference (`methods.base.Rollouts`).

Rank 0 talks to the engines and the verifier and broadcasts the result; every rank has the same groups afterwards. The
seed of a request is a function of run, stage, step, prompt and sample number, so a run can be repeated.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_entropy.actor.actor import Actor
from megatron_entropy.actor.statistics import policy_statistics, reference_statistics
from megatron_entropy.config.schema import Config, EvalConfig
from megatron_entropy.data.dataset import PromptStream
from megatron_entropy.data.tokenizer import Tokenizer
from megatron_entropy.distributed import process_groups
from megatron_entropy.distributed.seeds import derive_seed
from megatron_entropy.monitor.timer import StepTimer
from megatron_entropy.records import Grade, Group, Metric, Prompt, Sample, TokenStatistics, samples_of
from megatron_entropy.rewards import Grader, open_grader
from megatron_entropy.rollout.engine import Completion, Request
from megatron_entropy.trainer import rollout_entropy
from megatron_entropy.trainer.rollout_service import RolloutService


class MethodRollouts:
    """Samples, grades and scores for one stage; every method that moves data is a collective.

    `temperature`: of the policy's distribution, at which it is scored and trained.
    """

    def __init__(
        self,
        config: Config,
        *,
        stream: PromptStream,
        tokenizer: Tokenizer,
        actor: Actor,
        service: RolloutService,
        timer: StepTimer,
        temperature: float,
    ) -> None:
        self.temperature = temperature
        self._config = config
        self._stream = stream
        self._tokenizer = tokenizer
        self._actor = actor
        self._service = service
        self._timer = timer
        self._grader = open_grader(config.reward)
        self._metrics: dict[str, Metric] = {}
        self._times_sampled: Counter[int] = Counter()
        self._step = 0
        self._num_calls = 0

    @property
    def position(self) -> int:
        """Number of training prompts taken so far in the stage."""
        return self._stream.position

    def begin_step(self, step: int) -> None:
        """Start a step; the seeds of its requests depend on its number."""
        self._step = step
        self._num_calls = 0
        self._times_sampled.clear()

    def pop_metrics(self) -> dict[str, Metric]:
        """Return the metrics of the samples since the last call."""
        metrics, self._metrics = self._metrics, {}
        lengths = metrics.get("rollout/length")
        return {**metrics, "rollout/tokens": Metric(lengths.total)} if lengths else metrics

    def take_prompts(self, count: int) -> list[Prompt]:
        """Return the next prompts of the training data."""
        return self._stream.take(count)

    def sample(self, prompts: Sequence[Prompt], num_samples: int, *, grade_prefix: bool = False) -> list[Group]:
        """Sample graded responses to each prompt at the rollout temperature, or continuations of its response prefix.

        Args:
            grade_prefix: the verifier sees the response prefix too, not only the generated tokens.
        """
        config = self._config
        keys = []
        for prompt in prompts:
            keys.append((self._step, prompt.index, self._times_sampled[prompt.index]))
            self._times_sampled[prompt.index] += 1
        groups = self._sample(
            config.name,
            prompts,
            keys,
            num_samples,
            {
                "max_tokens": config.rollout.max_response_tokens,
                "temperature": config.rollout.temperature,
                "top_p": config.rollout.top_p,
            },
            grade_prefix=grade_prefix,
        )
        self._count_samples(groups)
        return groups

    def sample_eval(self, prompts: Sequence[Prompt], config: EvalConfig) -> list[Group]:
        """Sample graded responses to eval prompts; the seeds are the same at every step of every stage."""
        sampling = {
            "max_tokens": config.max_response_tokens or self._config.rollout.max_response_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
            "repetition_penalty": config.repetition_penalty,
        }
        return self._sample("eval", prompts, [(0, prompt.index, 0) for prompt in prompts], config.samples, sampling)

    def score(
        self,
        groups: Sequence[Group],
        *,
        logprob: bool = True,
        entropy: bool = True,
        temperature: float | None = None,
        take_rollout_entropy: bool = True,
    ) -> list[Group]:
        """Fill `logprob` and `entropy`, those of them that are requested; samples that have them keep them.

        Every `rollout.entropy_check_every` steps the pass of the actor also computes entropies that the engines have
        recorded, and compares them; those of the engines are kept.

        Args:
            temperature: None is the policy's.
            take_rollout_entropy: use the entropies that the engines recorded at this temperature.
        """
        temperature = temperature or self.temperature
        if entropy and take_rollout_entropy:
            groups = rollout_entropy.take_rollout_entropy(groups, temperature)

        def is_missing(sample: Sample) -> bool:
            return (logprob and sample.logprob is None) or (entropy and sample.entropy is None)

        def compute(samples: list[Sample]) -> list[Sample]:
            is_checked = logprob and self._compares_entropy(samples)
            computes_entropy = is_checked or (entropy and any(sample.entropy is None for sample in samples))
            statistics = policy_statistics(temperature=temperature, entropy=computes_entropy)
            scored = self._actor.score(samples, statistics)
            if is_checked:
                self._compare_entropy(scored, temperature)
            return rollout_entropy.keep_entropy(samples, scored)

        with self._timer("score"):
            return _fill(groups, is_missing, compute)

    def score_reference(
        self,
        groups: Sequence[Group],
        *,
        temperature: float | None = None,
        statistics: TokenStatistics | None = None,
    ) -> list[Group]:
        """Fill `reference_logprob` by the reference, without gradients.

        Args:
            temperature: None is the policy's.
            statistics: other fields to fill, instead.
        """
        chosen = statistics or reference_statistics(temperature=temperature or self.temperature)
        with self._timer("ref_logprob"):
            return _fill(groups, lambda sample: True, lambda samples: self._actor.score_reference(samples, chosen))

    def update_ema(self, alpha: float) -> None:
        """Move the reference towards the policy: `(1 - alpha) * reference + alpha * policy`."""
        assert self._actor.reference is not None, "the method declares no reference"
        with self._timer("ref_logprob"):
            self._actor.reference.update_ema(alpha)

    def token_text(self, token: int) -> str:
        """Return the text of one token; empty for end tokens."""
        return self._tokenizer.text_of(token)

    def close(self) -> None:
        """Stop the verifier's workers."""
        self._grader.close()

    def _sample(
        self,
        purpose: str,
        prompts: Sequence[Prompt],
        keys: Sequence[tuple[int, ...]],
        num_samples: int,
        sampling: Mapping[str, Any],
        *,
        grade_prefix: bool = False,
    ) -> list[Group]:
        requests = [
            Request(
                key=(index, number),
                tokens=prompt.tokens + prompt.response_prefix,
                seed=derive_seed(self._config.seed, purpose, *key, number),
                **sampling,
            )
            for index, (prompt, key) in enumerate(zip(prompts, keys, strict=True))
            for number in range(num_samples)
        ]
        file = Path(self._config.name) / f"{self._step:06d}_{self._num_calls:02d}_{purpose}.npz"
        self._num_calls += 1
        completions = self._service.generate(requests, description=f"{purpose} step {self._step}", file=file)

        def grade() -> list[Group]:
            groups = build_groups(
                prompts,
                num_samples,
                completions,
                tokenizer=self._tokenizer,
                policy_version=self._service.version,
                entropy_temperature=self._entropy_temperature(sampling),
            )
            return grade_groups(groups, grader=self._grader, tokenizer=self._tokenizer, grade_prefix=grade_prefix)

        with self._timer("reward"):
            return process_groups.run_on_rank_zero(grade)

    def _entropy_temperature(self, sampling: Mapping[str, Any]) -> float | None:
        """Temperature of the policy whose entropies the engines record with these parameters; None: of no policy.

        A repetition penalty changes the distribution that the engine measures, and the actor has none.
        """
        is_policy = self._config.rollout.entropy and sampling.get("repetition_penalty", 1.0) == 1.0
        return sampling["temperature"] if is_policy else None

    def _compares_entropy(self, samples: Sequence[Sample]) -> bool:
        every = self._config.rollout.entropy_check_every
        return bool(every and self._step % every == 0 and any(s.rollout_entropy is not None for s in samples))

    def _compare_entropy(self, scored: Sequence[Sample], temperature: float) -> None:
        metrics = rollout_entropy.differences(scored, temperature)
        if metrics and process_groups.rank() == 0:
            rollout_entropy.log_differences(self._config, self._actor.arch, self._step, metrics)
        for name, metric in metrics.items():
            self._count(name, metric)

    def _count(self, name: str, metric: Metric) -> None:
        self._metrics[name] = self._metrics.get(name, Metric(0.0, 0.0)) + metric

    def _count_samples(self, groups: Sequence[Group]) -> None:
        samples = samples_of(groups)
        for sample in samples:
            grade = sample.grade
            assert grade is not None
            self._count("rollout/length", Metric(sample.response_length))
            self._count("rollout/truncated", Metric(sample.finish_reason == "length"))
            if sample.rollout_entropy is not None:
                entropy = float(sample.response("rollout_entropy").sum(dtype=np.float64))
                self._count("rollout/entropy", Metric(entropy, sample.response_length))
            self._count("reward/errors", Metric(grade.correct is None))
            if grade.correct is not None:
                self._count("reward/accuracy", Metric(grade.correct))
        kinds = Counter(_error_kind(sample.grade) for sample in samples if sample.grade and sample.grade.error)
        for kind, count in kinds.items():
            self._count(f"reward/error_{kind}", Metric(count, len(samples)))


def build_groups(
    prompts: Sequence[Prompt],
    num_samples: int,
    completions: Sequence[Completion],
    *,
    tokenizer: Tokenizer,
    policy_version: int,
    entropy_temperature: float | None = None,
) -> list[Group]:
    """Build one ungraded group per prompt.

    Args:
        completions: `num_samples` of the first prompt, then those of the second, and so on.
        entropy_temperature: of the completions' entropies; None: they are not used.
    """
    assert len(completions) == len(prompts) * num_samples, (len(completions), len(prompts), num_samples)

    def build(prompt: Prompt, completion: Completion) -> Sample:
        prompt_tokens = prompt.tokens + prompt.response_prefix

        def padded(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else np.concatenate([np.zeros(len(prompt_tokens), np.float32), values])

        sample = Sample(
            tokens=np.concatenate([np.array(prompt_tokens, np.int32), completion.tokens]),
            prompt_length=len(prompt_tokens),
            finish_reason=completion.finish_reason,
            text=tokenizer.decode(completion.tokens.tolist()),
            policy_version=policy_version,
            rollout_logprob=padded(completion.logprobs),
            alternatives=completion.alternatives,
        )
        if entropy_temperature is None:
            return sample
        return dataclasses.replace(
            sample,
            rollout_entropy=padded(completion.entropy),
            rollout_uncut_logprob=padded(completion.uncut_logprobs),
            rollout_temperature=entropy_temperature,
        )

    remaining = iter(completions)
    return [Group(prompt, tuple(build(prompt, next(remaining)) for _ in range(num_samples))) for prompt in prompts]


def grade_groups(
    groups: Sequence[Group], *, grader: Grader, tokenizer: Tokenizer, grade_prefix: bool = False
) -> list[Group]:
    """Fill `grade` of every sample.

    Args:
        grade_prefix: the verifier sees the response prefix too, not only the generated tokens.
    """

    def response_text(prompt: Prompt, sample: Sample) -> str:
        if not (grade_prefix and prompt.response_prefix):
            return sample.text
        return tokenizer.decode(sample.tokens[len(prompt.tokens) :].tolist())

    pairs = [(response_text(g.prompt, sample), g.prompt.answer or "") for g in groups for sample in g.samples]
    grades = iter(grader.grade(pairs))
    return [g.with_samples([dataclasses.replace(s, grade=next(grades)) for s in g.samples]) for g in groups]


def _fill(
    groups: Sequence[Group], is_missing: Callable[[Sample], bool], compute: Callable[[list[Sample]], list[Sample]]
) -> list[Group]:
    """Replace the samples for which `is_missing` by what one call of `compute` returns for them."""
    missing = [sample for sample in samples_of(groups) if is_missing(sample)]
    filled = iter(compute(missing) if missing else [])
    return [group.with_samples([next(filled) if is_missing(s) else s for s in group.samples]) for group in groups]


def _error_kind(grade: Grade) -> str:
    return (grade.error or "").split(":")[0].lower()
