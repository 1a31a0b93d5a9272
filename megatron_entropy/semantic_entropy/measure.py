"""Sample answers to every question and compute the entropy of their clusters; a stopped measurement continues."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_entropy.config.architecture import ModelArchitecture
from megatron_entropy.config.schema import Config
from megatron_entropy.data.tokenizer import Tokenizer
from megatron_entropy.distributed.seeds import derive_seed
from megatron_entropy.errors import ConfigError
from megatron_entropy.methods.semantic_entropy import Weight, semantic_entropy
from megatron_entropy.records import Prompt
from megatron_entropy.rollout.engine import Request
from megatron_entropy.semantic_entropy.clusters import UNREADABLE, AnswerJudge
from megatron_entropy.semantic_entropy.tables import user_writer
from megatron_entropy.trainer.standalone import open_service

if TYPE_CHECKING:
    from megatron_entropy.trainer.rollout_service import RolloutService

REQUESTS_AT_A_TIME = 2048
"""Requests between two writes of the finished answers."""
WEIGHTS: tuple[Weight, ...] = ("count", "likelihood", "length_norm")


@dataclass(frozen=True)
class Answers:
    """The answers to one question.

    `row`: of the question, over all files. `clusters`: number of each answer's cluster, `UNREADABLE` without an answer.
    `logprobs`: nats, summed over the tokens. `lengths`: tokens, the end token included. `correct`: None where the
    verifier could not decide.
    """

    row: int
    clusters: list[int]
    logprobs: list[float]
    lengths: list[int]
    correct: list[bool | None]

    def columns(self, *, weight: Weight, invalid: str) -> dict[str, Any]:
        """Compute the columns to write beside the question.

        Args:
            weight: of an answer in `semantic_entropy`.
            invalid: `shared` or `own` cluster for unreadable answers.
        """
        own = itertools.count(UNREADABLE, -1)
        clusters = [next(own) if c == UNREADABLE and invalid == "own" else c for c in self.clusters]
        entropies = {
            name: semantic_entropy(clusters, weight=name, logprobs=self.logprobs, lengths=self.lengths)
            for name in WEIGHTS
        }
        judged = [verdict for verdict in self.correct if verdict is not None]
        return {
            "semantic_entropy": entropies[weight],
            **{f"semantic_entropy_{name}": value for name, value in entropies.items()},
            "semantic_clusters": len(set(clusters)),
            "semantic_samples": len(clusters),
            "semantic_accuracy": sum(judged) / len(judged) if judged else None,
        }


COLUMNS = tuple(Answers(0, [0], [0.0], [1], [None]).columns(weight="count", invalid="shared"))


def measure(
    config: Config, prompts: Sequence[Prompt], arch: ModelArchitecture, tokenizer: Tokenizer, partial: Path
) -> dict[int, Answers]:
    """Sample and cluster the answers to every prompt, continuing what `partial` holds.

    Args:
        config: `model.path`, `rollout`, `reward`, `seed` and, for the number of answers, `batch.samples`.
        prompts: the questions.
        arch: of the model.
        tokenizer: of the model.
        partial: file of finished answers; grows while the function runs.
    Returns:
        Answers by row.
    Raises:
        ConfigError: `partial` is of a measurement with other settings, or cannot be written.
    """
    done = read_partial(partial, _settings(config))
    missing = [prompt for prompt in prompts if prompt.index not in done]
    if not missing:
        return done
    size = max(1, REQUESTS_AT_A_TIME // config.batch.samples)
    with open_service(config, arch, tokenizer) as service, closing(AnswerJudge(config.reward)) as judge:
        with partial.open("a") as file:
            for start in range(0, len(missing), size):
                chunk = missing[start : start + size]
                description = f"questions {len(done) + 1} to {len(done) + len(chunk)} of {len(prompts)}"
                if not sys.stderr.isatty():  # a terminal shows the engines' progress bar
                    print(description, file=sys.stderr, flush=True)
                for answers in _sample(config, chunk, service, judge, tokenizer, description):
                    done[answers.row] = answers
                    file.write(json.dumps(asdict(answers)) + "\n")
                file.flush()
    return done


def _sample(
    config: Config,
    prompts: Sequence[Prompt],
    service: RolloutService,
    judge: AnswerJudge,
    tokenizer: Tokenizer,
    description: str,
) -> Iterator[Answers]:
    rollout, num_samples = config.rollout, config.batch.samples
    requests = [
        Request(
            key=(prompt.index, number),
            tokens=prompt.tokens,
            seed=derive_seed(config.seed, "semantic_entropy", prompt.index, number),
            max_tokens=rollout.max_response_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
        )
        for prompt in prompts
        for number in range(num_samples)
    ]
    completions = service.generate(requests, description=description, file=Path())
    groups = [completions[start : start + num_samples] for start in range(0, len(completions), num_samples)]
    texts = [[tokenizer.decode(completion.tokens.tolist()) for completion in group] for group in groups]
    judged = judge.judge([(prompt.answer, group) for prompt, group in zip(prompts, texts, strict=True)])
    for prompt, group, (correct, clusters) in zip(prompts, groups, judged, strict=True):
        logprobs = [float(completion.logprobs.sum(dtype=np.float64)) for completion in group]
        yield Answers(prompt.index, clusters, logprobs, [len(completion.tokens) for completion in group], correct)


def _settings(config: Config) -> dict[str, Any]:
    """Everything that decides the answers, for the header of the partial file."""
    settings = {f"data.{key}": getattr(config.data, key) for key in ("format", "template", "tokenizer")}
    settings |= {f"rollout.{key}": getattr(config.rollout, key) for key in ("temperature", "top_p", "dtype")}
    return settings | {
        "model.path": config.model.path,
        "data.train": [[file, Path(file).stat().st_size] for file in config.data.train],
        "data.max_prompt_tokens": config.data.max_prompt_tokens,
        "rollout.max_response_tokens": config.rollout.max_response_tokens,
        "batch.samples": config.batch.samples,
        "reward.verifier": config.reward.verifier,
        "seed": config.seed,
    }


def read_partial(partial: Path, settings: Mapping[str, Any]) -> dict[int, Answers]:
    """Read the finished answers of a stopped measurement, and drop a last line that was cut short.

    Raises:
        ConfigError: the measurement had other settings, or the file cannot be written.
    """
    done: dict[int, Answers] = {}
    if partial.exists():
        lines = [line for line in map(_json_or_none, partial.read_text().splitlines()) if line is not None]
        before = lines[0].get("settings", {}) if lines else dict(settings)
        for name, value in settings.items():
            if before.get(name) != value:
                raise ConfigError(
                    f"{partial}: belongs to a measurement with {name}={before.get(name)}, this one has {value}; repeat "
                    "the earlier command to finish it, or delete the file"
                )
        done = {line["row"]: Answers(**line) for line in lines[1:]}
    with user_writer(partial) as temporary:
        header = {"settings": dict(settings)}
        temporary.write_text("".join(json.dumps(line) + "\n" for line in [header, *map(asdict, done.values())]))
    return done


def _json_or_none(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None
