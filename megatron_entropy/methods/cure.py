"""CURE, stage 1 (Li et al. 2025, arXiv 2508.11016): branch where the policy is unsure.

Against DAPO: of a group's G = n1 (1 + n2) samples only n1 start at the question. Each of these is cut once at a
critical token, one of the K most uncertain by the actor's full-vocabulary entropy, and continued n2 times from the
tokens before it; the critical token itself is sampled anew. All G are one group: one baseline, the same clipped loss,
on generated tokens only (what is re-used of the parent is trained once, in the parent). Stage 2 is DAPO from stage 1's
model.

Read from the release (github bytedance/CURE, recipe/CURE_First_Stage/dapo_ray_trainer.py); of the paper only the
abstract could be read. What the release leaves open is pinned here: equal entropies are ordered by position; the draw
among the K is seeded by the run's seed, the prompt and the response. Different from it: tokens weigh the same over the
whole optimizer step, not per micro-batch; a round draws `generation_prompts`, and after `max_rounds` rounds a step
trains on what it has.

A response without a candidate is continued from the question (`rollout/cut_at_start`, as in the release); a prefix
longer than `data.max_prompt_tokens` loses its end (`rollout/cut_shortened`, the release does so silently).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from megatron_entropy.config.schema import Config
from megatron_entropy.distributed.seeds import derive_seed
from megatron_entropy.errors import ConfigError
from megatron_entropy.methods.base import Method, Rollouts
from megatron_entropy.methods.dapo import Dapo, DapoConfig
from megatron_entropy.records import Group, Prompt, Sample


class Cure(Dapo):
    """DAPO whose groups branch at critical tokens."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert isinstance(config.method, CureConfig)
        self.settings: CureConfig = config.method
        wanted = self.settings.initial_responses * (1 + self.settings.branches)
        if config.batch.samples != wanted:
            raise ConfigError(
                f"batch.samples={config.batch.samples} must be method.initial_responses * (1 + method.branches) = "
                f"{self.settings.initial_responses} * (1 + {self.settings.branches}) = {wanted}"
            )

    def explore(self, rollouts: Rollouts, prompts: int) -> list[Group]:
        """One round: first responses, their cuts, the branches; each group's branches stand behind its first ones."""
        config = self.settings
        initial_responses = rollouts.sample(rollouts.take(prompts), config.initial_responses)
        if not config.branches:
            return initial_responses
        if config.critical_token == "entropy":
            initial_responses = rollouts.score(initial_responses)
        branch_prompts = [
            self._branch_prompt(group.prompt, number, sample, rollouts.text)
            for group in initial_responses
            for number, sample in enumerate(group.samples)
        ]
        branches = iter(rollouts.sample(branch_prompts, config.branches, grade_prefix=config.graded == "answer"))
        return [_with_branches(group, [next(branches) for _ in group.samples]) for group in initial_responses]

    def _branch_prompt(self, prompt: Prompt, number: int, sample: Sample, text: Callable[[int], str]) -> Prompt:
        """The prompt with the part of a response that its branches keep."""
        response = sample.tokens[sample.prompt_length :].tolist()
        rng = np.random.default_rng(derive_seed(self.config.seed, "cut", prompt.index, number, *response))
        if self.settings.critical_token == "entropy":
            order = np.argsort(-sample.response("entropy"), kind="stable")
        else:
            order = rng.permutation(len(response))
        candidates = critical_positions(order, response, text, self.settings.top, self.settings.min_characters)
        cut = candidates[rng.integers(len(candidates))] if candidates else 0
        room = max(self.config.data.max_prompt_tokens - len(prompt.tokens), 0)
        self.count("rollout/cut_at_start", not candidates)
        self.count("rollout/cut_shortened", cut > room)
        if candidates:
            self.count("rollout/cut_position", cut / len(response))
            if sample.entropy is not None:
                self.count("rollout/cut_entropy", float(sample.response("entropy")[cut]))
        return dataclasses.replace(prompt, response_prefix=tuple(response[: min(cut, room)]))


def critical_positions(
    order: np.ndarray, response: list[int], text: Callable[[int], str], top: int, min_characters: int
) -> list[int]:
    """The first `top` places in `order` at which a response may be cut.

    Never the first token, a special token, or one of fewer than `min_characters` visible characters (digits, signs,
    brackets, line breaks, bytes that are no text). Places that may not be cut do not count towards `top`.

    Args:
        order: places of the response, the most wanted first.
        text: of a token id; nothing for special tokens.
    """
    chosen: list[int] = []
    for place in order:
        if len(chosen) == top:
            break
        if place > 0 and len(text(response[place]).strip()) >= min_characters:
            chosen.append(int(place))
    return chosen


def _with_branches(group: Group, branches: list[Group]) -> Group:
    grown = [
        dataclasses.replace(sample, parent=number)
        for number, branch in enumerate(branches)
        for sample in branch.samples
    ]
    return group.with_samples([*group.samples, *grown])


class CureConfig(DapoConfig):
    """Settings of CURE's first stage, those of the release's run_cure_stage_1.sh."""

    method: ClassVar[type[Method]] = Cure
    name: Literal["cure"] = "cure"  # type: ignore[assignment]
    initial_responses: PositiveInt = 4
    """n1."""
    branches: NonNegativeInt = 3
    """n2, of each first response; 0 is plain DAPO."""
    critical_token: Literal["entropy", "random"] = "entropy"
    """`random`: any place that may be cut, the release's ablation."""
    top: PositiveInt = 20
    """K, critical_top_k."""
    min_characters: PositiveInt = 2
    graded: Literal["generated", "answer"] = "generated"
    """What the verifier sees of a branch: as released its own tokens only, or the re-used ones too."""
    overlong_buffer: int = 512
    """Over generated tokens; what a branch re-uses does not count, as in the release."""
