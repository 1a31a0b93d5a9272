"""Everything about an evaluation that can be checked before its engines start: questions, prompts, graders, length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_entropy.benchmarks.folder import BenchmarkRecord, digest_prefixes
from megatron_entropy.benchmarks.golds import gold_for
from megatron_entropy.benchmarks.presets import Preset
from megatron_entropy.benchmarks.questions import Benchmark, Question, load_questions
from megatron_entropy.benchmarks.run import Task, encode_questions
from megatron_entropy.benchmarks.sources import HUB
from megatron_entropy.benchmarks.suite import load_suite
from megatron_entropy.config.schema import RewardConfig
from megatron_entropy.data.tokenizer import Tokenizer
from megatron_entropy.errors import ConfigError, DataError
from megatron_entropy.rewards import load_verifier
from megatron_entropy.rewards.client import check_grader


@dataclass
class Prepared:
    """What an evaluation will do.

    `digests`: of each benchmark's first n questions, n = 0, 1, ... `notes`: lines for the user, such as skipped
    questions.
    """

    tasks: list[Task] = field(default_factory=list)
    records: dict[str, BenchmarkRecord] = field(default_factory=dict)
    digests: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt) for task in self.tasks for prompt in task.prompts)

    @property
    def num_samples(self) -> int:
        """Number of samples of all tasks."""
        return sum(task.samples * len(task.questions) for task in self.tasks)


def load_suites(names: Sequence[str]) -> list[Benchmark]:
    """Return the benchmarks of several suites, each once.

    Raises:
        ConfigError: see `load_suite`.
    """
    return list({benchmark.name: benchmark for name in names for benchmark in load_suite(name)}.values())


def prepare(
    benchmarks: Sequence[Benchmark],
    preset: Preset,
    tokenizer: Tokenizer,
    *,
    data_folder: str | None,
    limit: int | None,
    graders: Sequence[str],
    seed: int,
    max_prompt_tokens: int,
) -> Prepared:
    """Load and tokenize the questions of all benchmarks.

    Args:
        benchmarks: with different names.
        preset: of prompts, graders and numbers of samples.
        tokenizer: of the model.
        data_folder: with benchmark files, or None.
        limit: rows of each benchmark; None for all.
        graders: in place of the benchmarks' own; empty for these.
        seed: of the order of options.
        max_prompt_tokens: questions with a longer prompt are skipped, counted and listed.
    Raises:
        UserError: a source, a row, a chat template or a grader cannot be used, or no question is left.
    """
    found = Prepared()
    for name in graders:
        load_verifier(name)
    for benchmark in benchmarks:
        source = benchmark.source(data_folder)
        loaded = load_questions(benchmark, source, preset, limit=limit, seed=seed)
        encoded = encode_questions(loaded.questions, tokenizer, max_tokens=max_prompt_tokens)
        skipped = {**loaded.skipped, **encoded.skipped}
        if not encoded.questions:
            raise DataError(f"{source}: {benchmark.name}: no question is left: {_describe(skipped)}")
        task = Task(
            benchmark=benchmark.name,
            questions=tuple(encoded.questions),
            prompts=tuple(encoded.prompts),
            samples=benchmark.samples_for(preset),
            graders=tuple(dict.fromkeys(graders)) or benchmark.graders_for(preset),
        )
        digests = digest_prefixes([_identity(question) for question in task.questions])
        found.tasks.append(task)
        found.digests[benchmark.name] = digests
        found.records[benchmark.name] = BenchmarkRecord(
            source=source if source.startswith(HUB) else "/".join(Path(source).parts[-2:]),
            samples=task.samples,
            graders=task.graders,
            questions=len(task.questions),
            digest=digests[-1],
            skipped=skipped,
        )
        found.notes += [f"{benchmark.name}: {note}" for note in loaded.notes]
        if skipped:
            found.notes.append(f"{benchmark.name}: {_describe(skipped)}; listed in eval.json")
    return found


def _identity(question: Question) -> str:
    return "\0".join((question.id, question.system, question.text, question.answer, str(question.permutation)))


def _describe(skipped: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{len(ids)} questions skipped: {reason}" for reason, ids in skipped.items())


def check_graders(tasks: Sequence[Task], config: RewardConfig) -> None:
    """Let every grader grade one answer, with a gold of the data.

    Raises:
        ConfigError: a grader cannot be used, or no reward server answers.
    """
    for name in dict.fromkeys(name for task in tasks for name in task.graders):
        task = next(task for task in tasks if name in task.graders)
        check_grader(config.model_copy(update={"verifier": name}), gold_for(name, task.questions[0].answer))


def check_length(prepared: Prepared, max_tokens: int, max_positions: int) -> None:
    """See that every prompt and the longest answer to it fit into the model's context.

    Raises:
        ConfigError: they do not; the message names both numbers.
    """
    longest = prepared.longest_prompt
    if longest + max_tokens <= max_positions:
        return
    advice = f"lower --max-tokens to at most {max_positions - longest}" if longest < max_positions else ""
    if max_tokens < max_positions:
        advice += (", or " if advice else "") + (
            f"skip questions with a longer prompt: --max-prompt-tokens {max_positions - max_tokens}"
        )
    raise ConfigError(
        f"the longest prompt ({longest} tokens) and an answer of {max_tokens} tokens do not fit into the model's "
        f"{max_positions} positions; {advice or 'lower --max-prompt-tokens and --max-tokens'}"
    )
