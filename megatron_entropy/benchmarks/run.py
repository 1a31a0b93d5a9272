"""Sample answers to the questions of benchmarks and grade them; a stopped evaluation goes on where it stopped.

Finished answers are graded and appended by a thread of their own, while the engines generate the next ones. A sample's
seed depends on its benchmark, question and number only, so that the samples are the same for any number of engines and
any number of stops.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from megatron_entropy.benchmarks.folder import EvalFolder
from megatron_entropy.benchmarks.grading import Graders, restore_rows
from megatron_entropy.benchmarks.questions import Question
from megatron_entropy.benchmarks.samples import SampleRow, append_rows, round_entropy
from megatron_entropy.config.architecture import ModelArchitecture
from megatron_entropy.config.schema import Config
from megatron_entropy.data.limits import exceeded_limit
from megatron_entropy.data.schemas import Message
from megatron_entropy.data.tokenizer import Tokenizer
from megatron_entropy.distributed.seeds import derive_seed
from megatron_entropy.errors import ConfigError, TokenizerError
from megatron_entropy.rollout.engine import Completion, Request
from megatron_entropy.trainer.standalone import open_service

REQUESTS_AT_A_TIME = 4096
"""Requests in one call of the engines, which keep their completions until its end."""
SECONDS_BETWEEN_LINES = 30.0
"""Between two lines of progress where the output is not a terminal."""


@dataclass(frozen=True)
class Task:
    """The questions of one benchmark, sampled `samples` times each.

    `prompts`: tokens of each question.
    """

    benchmark: str
    questions: tuple[Question, ...]
    prompts: tuple[tuple[int, ...], ...]
    samples: int
    graders: tuple[str, ...]


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters, as `rollout.engine.Request` has them."""

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    max_tokens: int
    seed: int


class _Slot(NamedTuple):
    """One sample to draw."""

    task: int
    question: int
    sample: int


@dataclass(frozen=True)
class EncodedQuestions:
    """The questions whose prompts can be sampled, their tokens, and reason -> ids of the others."""

    questions: list[Question]
    prompts: list[tuple[int, ...]]
    skipped: dict[str, list[str]]


def encode_questions(questions: Sequence[Question], tokenizer: Tokenizer, *, max_tokens: int) -> EncodedQuestions:
    """Write each question as a conversation and tokenize it; those with too long a prompt are skipped.

    Args:
        questions: of one benchmark.
        tokenizer: without a chat template each message of a prompt is on a line of its own.
        max_tokens: longest prompt.
    Raises:
        ConfigError: the chat template fails, or needs too much time or memory for the first question.
    """
    if questions and (limit := exceeded_limit(lambda: tokenizer.render(_messages(questions[0])))):
        raise ConfigError(f"the tokenizer's chat template fails: it needs more than {limit} for one question")
    found = EncodedQuestions([], [], {})
    for question in questions:
        if len(question.text) > max_tokens * tokenizer.max_token_chars:
            tokens = None
        else:
            try:
                tokens = tuple(tokenizer.encode(tokenizer.render(_messages(question))))
            except TokenizerError:
                found.skipped.setdefault("the tokenizer cannot read it", []).append(question.id)
                continue
        if tokens is None or len(tokens) > max_tokens:
            found.skipped.setdefault(f"prompt over {max_tokens} tokens", []).append(question.id)
            continue
        found.questions.append(question)
        found.prompts.append(tokens)
    return found


def _messages(question: Question) -> list[Message]:
    before = [Message("system", question.system)] if question.system else []
    return [*before, Message("user", question.text)]


def sample_seed(seed: int, benchmark: str, question: str, sample: int) -> int:
    """Return the seed of one sample."""
    return derive_seed(seed, "eval", benchmark, question, sample)


class _Writer:
    """Grades completions and appends their rows in a thread; what is added while it works forms its next batch.

    After the `with` block everything that was added is on disk; after an error a part of it without grades.
    """

    def __init__(
        self, folder: EvalFolder, tasks: Sequence[Task], seed: int, tokenizer: Tokenizer, graders: Graders, done: int
    ) -> None:
        self._folder, self._tasks, self._seed = folder, tasks, seed
        self._tokenizer, self._graders = tokenizer, graders
        self._progress = _Progress(done, sum(task.samples * len(task.questions) for task in tasks))
        self._waiting: list[Completion] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grading")
        self._batch: Future[None] | None = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.flush()
        finally:
            self._thread.shutdown()
            self._append([self._row(completion) for completion in self._waiting])

    def add(self, completions: Sequence[Completion]) -> None:
        """Take finished completions.

        Raises:
            Fault: those before could not be graded or written.
        """
        self._waiting += completions
        self._progress.advance(completions)
        if self._batch is not None and self._batch.done():
            self._batch.result()
            self._batch = None
        if self._batch is None and self._waiting:
            batch, self._waiting = self._waiting, []
            self._batch = self._thread.submit(self._write, batch)

    def flush(self) -> None:
        """Wait until everything that was added is on disk."""
        while self._batch is not None:
            self._batch.result()
            self.add([])

    def _write(self, completions: Sequence[Completion]) -> None:
        """Grade and append; in the thread. Rows that cannot be graded are written without grades."""
        rows = [self._row(completion) for completion in completions]
        graders = {task.benchmark: task.graders for task in self._tasks}
        try:
            grades = self._graders.grade([(row.response, row.answer, graders[row.benchmark]) for row in rows])
            rows = [replace(row, grades=found) for row, found in zip(rows, grades, strict=True)]
        finally:
            self._append(rows)

    def _append(self, rows: Sequence[SampleRow]) -> None:
        for task in self._tasks:
            if of_task := [row for row in rows if row.benchmark == task.benchmark]:
                append_rows(self._folder.rows(task.benchmark), of_task)

    def _row(self, completion: Completion) -> SampleRow:
        slot = _Slot(*completion.key)
        task = self._tasks[slot.task]
        question = task.questions[slot.question]
        return SampleRow(
            benchmark=task.benchmark,
            question=question.id,
            sample=slot.sample,
            seed=sample_seed(self._seed, task.benchmark, question.id, slot.sample),
            permutation=question.permutation,
            category=question.category,
            answer=question.answer,
            response=self._tokenizer.decode(completion.tokens.tolist()),
            length=len(completion.tokens),
            finish_reason=completion.finish_reason,
            entropy=None if completion.entropy is None else round_entropy(completion.entropy),
            grades={},
        )


class _Progress:
    """Prints a line now and then where the output is not a terminal; a terminal shows the engines' progress bar."""

    def __init__(self, done: int, total: int) -> None:
        self._before, self._done, self._total, self._tokens = done, done, total, 0
        self._begin = self._last_line = 0.0

    def advance(self, completions: Sequence[Completion]) -> None:
        """Count finished completions; the first call comes when the engines begin."""
        self._done += len(completions)
        self._tokens += sum(len(completion.tokens) for completion in completions)
        now = time.monotonic()
        if not self._begin:
            self._begin = self._last_line = now
        if sys.stderr.isatty() or (now - self._last_line < SECONDS_BETWEEN_LINES and self._done < self._total):
            return
        if completions and self._done > self._before:
            self._last_line = now
            print(self._line(now - self._begin), file=sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        drawn, missing = self._done - self._before, self._total - self._done
        line = f"{self._done:,} of {self._total:,} samples, {self._tokens / max(seconds, 1e-9):,.0f} tokens/s"
        if drawn < 0.1 * (drawn + missing):  # short answers finish first: too early for an estimate
            return line
        left = seconds / drawn * missing
        return line + (f", {left:.0f} s left" if left < 120 else f", {left / 60:,.0f} min left")


def generate_samples(
    folder: EvalFolder,
    tasks: Sequence[Task],
    sampling: Sampling,
    *,
    config: Config,
    arch: ModelArchitecture,
    tokenizer: Tokenizer,
) -> int:
    """Draw and grade the samples that the folder lacks; the engines start only when there are any.

    Args:
        folder: exists; its files grow while the function runs.
        tasks: what to sample.
        sampling: how.
        config: `model.path`, `rollout`, `reward`, and the longest prompt.
        arch: of the model.
        tokenizer: of the model.
    Returns:
        Number of samples drawn.
    Raises:
        Fault: an engine failed, or a file cannot be written; what is finished stays.
    """
    names = [name for task in tasks for name in task.graders]
    with closing(Graders(names, config.reward)) as graders:
        missing = _find_missing(folder, tasks, graders)
        if not missing:
            return 0
        total = sum(task.samples * len(task.questions) for task in tasks)
        done = total - len(missing)
        with (
            open_service(config, arch, tokenizer) as service,
            _Writer(folder, tasks, sampling.seed, tokenizer, graders, done) as writer,
        ):
            for start in range(0, len(missing), REQUESTS_AT_A_TIME):
                portion = missing[start : start + REQUESTS_AT_A_TIME]
                service.generate(
                    [_request(slot, tasks[slot.task], sampling) for slot in portion],
                    description=f"samples to {done + start + len(portion):,} of {total:,}",
                    file=Path(),
                    on_finished=writer.add,
                )
                writer.flush()
    return len(missing)


def _find_missing(folder: EvalFolder, tasks: Sequence[Task], graders: Graders) -> list[_Slot]:
    """The samples that a folder does not hold yet, in the order of the tasks and questions."""
    missing: list[_Slot] = []
    for number, task in enumerate(tasks):
        rows = restore_rows(folder, task.benchmark, task.graders, graders)
        finished = {row.key for row in rows}
        missing += [
            _Slot(number, index, sample)
            for index, question in enumerate(task.questions)
            for sample in range(task.samples)
            if (question.id, sample) not in finished
        ]
    return missing


def _request(slot: _Slot, task: Task, sampling: Sampling) -> Request:
    return Request(
        key=tuple(slot),
        tokens=task.prompts[slot.question],
        seed=sample_seed(sampling.seed, task.benchmark, task.questions[slot.question].id, slot.sample),
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        repetition_penalty=sampling.repetition_penalty,
    )
