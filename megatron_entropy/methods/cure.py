"""CURE, stage 1 (Li et al. 2025, arXiv 2508.11016): branch where the policy is uncertain.

Against DAPO: of a group's G = n1 (1 + n2) samples only n1 start at the question. Each of these initial responses is cut
once, at a critical token: one of the K tokens with the largest full-vocabulary entropy. It is continued n2 times from
the tokens before the cut; the critical token itself is sampled again. All G samples are one group with one baseline and
the same clipped loss. Only generated tokens are trained: the response prefix of a branch is trained once, in its
parent. Stage 2 is DAPO from the model of stage 1. The entropies that choose the cuts come from a scoring pass, or with
`rollout.entropy` from the engine that sampled the tokens, without one.

Read from the release (github bytedance/CURE, recipe/CURE_First_Stage/dapo_ray_trainer.py); only the abstract of the
paper could be read. The release leaves two choices open: here equal entropies are ordered by position, and the draw
among the K is seeded by the run's seed, the prompt and the response. Differences from the release: every token of the
optimizer step has the same weight, not of a micro-batch; a round draws `generation_prompts`, and after `max_rounds`
rounds a step trains on what it has.

A response without a candidate is continued from the question (`rollout/cut_at_start`, as in the release). A prefix that
exceeds `data.max_prompt_tokens` together with the question is shortened at its end (`rollout/cut_shortened`; the
release does not report it).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np

from megatron_entropy.config.schema import Config
from megatron_entropy.config.types import NonNegativeInt, PositiveInt
from megatron_entropy.distributed.seeds import derive_seed
from megatron_entropy.errors import ConfigError
from megatron_entropy.methods.base import Method, Rollouts
from megatron_entropy.methods.dapo import Dapo, DapoConfig
from megatron_entropy.monitor.dump_rows import Family, families
from megatron_entropy.monitor.history import StageHistory
from megatron_entropy.records import Group, Metric, Prompt, Sample


class Cure(Dapo["CureConfig"]):
    """DAPO with groups that branch at critical tokens."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        needed = self.settings.initial_responses * (1 + self.settings.branches)
        if config.batch.samples != needed:
            raise ConfigError(
                f"batch.samples={config.batch.samples} must be method.initial_responses * (1 + method.branches) = "
                f"{self.settings.initial_responses} * (1 + {self.settings.branches}) = {needed}"
            )

    def sample_groups(self, rollouts: Rollouts, num_prompts: int) -> list[Group]:
        """Return one round of groups: in each the initial responses, then the branches of each of them in order."""
        config = self.settings
        groups = rollouts.sample(rollouts.take_prompts(num_prompts), config.initial_responses)
        if not config.branches:
            return groups
        if config.critical_token == "entropy":
            groups = rollouts.score(groups, logprob=False)
        branch_prompts = [
            self.branch_prompt(group.prompt, number, sample, rollouts.token_text)
            for group in groups
            for number, sample in enumerate(group.samples)
        ]
        branches = iter(rollouts.sample(branch_prompts, config.branches, grade_prefix=config.graded == "answer"))
        return [_with_branches(group, [next(branches) for _ in group.samples]) for group in groups]

    def branch_prompt(self, prompt: Prompt, number: int, sample: Sample, token_text: Callable[[int], str]) -> Prompt:
        """Return the prompt with the tokens before the cut as response prefix.

        Args:
            number: of the sample within its group, for the seed.
            token_text: see `Rollouts.token_text`.
        """
        response = sample.tokens[sample.prompt_length :].tolist()
        rng = np.random.default_rng(derive_seed(self.config.seed, "cut", prompt.index, number, *response))
        if self.settings.critical_token == "entropy":
            order = np.argsort(-sample.response("entropy"), kind="stable")
        else:
            order = rng.permutation(len(response))
        candidates = critical_positions(order, response, token_text, self.settings.top, self.settings.min_characters)
        cut = candidates[rng.integers(len(candidates))] if candidates else 0
        room = max(self.config.data.max_prompt_tokens - len(prompt.tokens), 0)
        self.count("rollout/cut_at_start", not candidates)
        self.count("rollout/cut_shortened", cut > room)
        if candidates:
            self.count("rollout/cut_position", cut / len(response))
            if sample.entropy is not None:
                self.count("rollout/cut_entropy", float(sample.response("entropy")[cut]))
        return dataclasses.replace(prompt, response_prefix=tuple(response[: min(cut, room)]))

    @classmethod
    def explain(cls, history: StageHistory) -> list[str]:
        """Say how many responses were cut, at which entropy, and how often a branch turned out otherwise."""
        seen = CutCounts()
        for step, group in history.groups():
            seen.add(step, families(group))
        if not seen.cuts:
            return super().explain(history)
        entropy = ""
        if seen.cut_entropies and seen.entropies.count:
            entropy = (
                f", on average at {np.mean(seen.cut_entropies):.2f} nats where all of their tokens have "
                f"{seen.entropies.value:.2f}"
            )
        token = "any token" if history.method.get("critical_token") == "random" else "an uncertain token"
        steps = f"step {max(seen.steps)}" if len(seen.steps) == 1 else f"steps {min(seen.steps)} to {max(seen.steps)}"
        became = [
            f"{part.total:,.0f} of {part.count:,.0f} branches of {before} answers ({part.value:.0%}) were {after}"
            for before, after, part in (("wrong", "right", seen.of_wrong), ("right", "wrong", seen.of_right))
            if part.count
        ]
        return [
            f"In {steps} CURE cut {seen.cuts:,} answers to {seen.groups:,} questions before {token}{entropy}.",
            *([f"{', and '.join(became)}."] if became else []),
        ]


@dataclasses.dataclass
class CutCounts:
    """What became of the cuts of a stage. `of_wrong`: right branches of wrong responses; `of_right`: the opposite."""

    steps: set[int] = dataclasses.field(default_factory=set)
    groups: int = 0
    cuts: int = 0
    cut_entropies: list[float] = dataclasses.field(default_factory=list)
    entropies: Metric = Metric(0.0, 0.0)
    of_wrong: Metric = Metric(0.0, 0.0)
    of_right: Metric = Metric(0.0, 0.0)

    def add(self, step: int, found: list[Family]) -> None:
        """Count the responses of one group that branch."""
        self.steps.add(step)
        self.groups += bool(found)
        self.cuts += len(found)
        for family in found:
            known = [entropy for entropy in family.parent.entropies or [] if entropy is not None]
            self.entropies += Metric(sum(known), len(known))
            if family.cut["entropy"] is not None:
                self.cut_entropies.append(family.cut["entropy"])
            verdicts = [branch.correct for branch in family.branches if branch.correct is not None]
            if family.parent.correct is False:
                self.of_wrong += Metric(sum(verdicts), len(verdicts))
            elif family.parent.correct:
                self.of_right += Metric(len(verdicts) - sum(verdicts), len(verdicts))


def critical_positions(
    order: np.ndarray, response: list[int], token_text: Callable[[int], str], top: int, min_characters: int
) -> list[int]:
    """Return the first `top` positions in `order` at which a response may be cut.

    Not allowed are the first token, a special token, and a token of fewer than `min_characters` visible characters
    (digits, signs, brackets, line breaks, bytes that are not text). They do not count towards `top`.

    Args:
        order: positions of the response, best first.
        token_text: text of a token id; empty for special tokens.
    """
    chosen: list[int] = []
    for position in order:
        if len(chosen) == top:
            break
        if position > 0 and len(token_text(response[position]).strip()) >= min_characters:
            chosen.append(int(position))
    return chosen


def _with_branches(group: Group, branches: list[Group]) -> Group:
    children = [
        dataclasses.replace(sample, parent=number)
        for number, branch in enumerate(branches)
        for sample in branch.samples
    ]
    return group.with_samples([*group.samples, *children])


class CureConfig(DapoConfig):
    """Settings of CURE's first stage; values of the release's run_cure_stage_1.sh."""

    method: ClassVar[type[Method[Any]]] = Cure
    unused_with = {("branches", 0): ("critical_token", "top", "min_characters", "graded")}
    name: str = "cure"
    initial_responses: PositiveInt = 4
    """Responses of a group that start at the question; n1."""
    branches: NonNegativeInt = 3
    """Continuations of each initial response; n2. 0 is plain DAPO."""
    critical_token: Literal["entropy", "random"] = "entropy"
    """`entropy`: cut at a token of large entropy. `random`: at any token where a cut is allowed, the release's
    ablation."""
    top: PositiveInt = 20
    """Number of candidate tokens that the cut is drawn from; K, critical_top_k."""
    min_characters: PositiveInt = 2
    """Fewest visible characters of a token at which a response may be cut, as in the release."""
    graded: Literal["generated", "answer"] = "generated"
    """What the verifier sees of a branch: its own tokens only, as in the release, or the response prefix too."""
    overlong_buffer: NonNegativeInt = 512
    """Number of generated tokens before the length limit over which the penalty grows. The response prefix of a branch
    does not count, as in the release. 0: no penalty."""
