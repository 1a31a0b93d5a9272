"""Questions of a benchmark: rows of a file become user messages with a gold, or are skipped and counted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_entropy.benchmarks.choices import LETTERS, Options, Permute, Shuffle, permuter, read_options
from megatron_entropy.benchmarks.golds import GoldError, GoldReader, gold_for, text_gold, value_of
from megatron_entropy.benchmarks.presets import Preset
from megatron_entropy.benchmarks.sources import find_source, read_source
from megatron_entropy.data.readers import RawRow, column_names, kind_of
from megatron_entropy.errors import DataError
from megatron_entropy.rewards.registry import INLINE, Verifier, load_verifier

Names = tuple[str, ...]
PLACEHOLDER = re.compile(r"\{(question|letters)\}")


@dataclass(frozen=True)
class Question:
    """A question as the model is asked it.

    `id`: unique in the benchmark, from the file or the row's number. `text`: the user message. `answer`: the gold that
    graders read (`golds.gold_for`). `permutation`: of multiple choice options, position -> index in the file.
    `category`: subject, level or type of answer. `system`: message before `text`, or empty.
    """

    benchmark: str
    id: str
    text: str
    answer: str
    permutation: tuple[int, ...] | None = None
    category: str = ""
    system: str = ""


@dataclass(frozen=True)
class Columns:
    """The names that a column has in published files, the preferred one first; `a.b` is inside the object `a`.

    `choices`: all options of a multiple choice question; `options`: columns that hold one option each. `index`: number
    of the correct option, from 0. `context`: text before the question.
    """

    question: Names = ("question", "problem", "prompt")
    answer: Names = ("answer", "expected_answer", "reward_model.ground_truth")
    choices: Names = ()
    options: Names = ()
    index: Names = ()
    category: Names = ()
    context: Names = ()
    id: Names = ("id", "unique_id", "question_id", "idx", "ID")


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: where its questions are, how they are read and how answers are graded.

    `size`: rows of the published file, None where it has no fixed size. `graders`: verifiers, the first gives the main
    score; with `fixed_graders` a preset does not put its own in front. `hub`: its data set on the Hugging Face hub.
    `data`, `prompt`, `samples`, `limit`: set by a suite file; they win over `hub`, preset and command line.
    """

    name: str
    kind: Literal["math", "choice"]
    graders: Names
    columns: Columns = field(default_factory=Columns)
    gold: GoldReader = text_gold
    size: int | None = None
    hub: str = ""
    shuffle: Shuffle = "no"
    fixed_graders: bool = False
    data: str = ""
    prompt: str = ""
    samples: int | None = None
    limit: int | None = None

    def source(self, data_folder: str | Path | None) -> str:
        """Find the benchmark's rows; see `sources.find_source`."""
        return self.data or find_source(self.name, self.hub, data_folder)

    def samples_for(self, preset: Preset) -> int:
        """Return the number of answers to each question."""
        return self.samples or preset.samples_by_benchmark.get(self.name, preset.samples)

    def graders_for(self, preset: Preset) -> Names:
        """Return the graders, the one of the main score first: for mathematics that of the preset."""
        main = (preset.grader,) if self.kind == "math" and preset.grader and not self.fixed_graders else ()
        return tuple(dict.fromkeys((*main, *self.graders)))


@dataclass(frozen=True)
class LoadedQuestions:
    """The questions of a file, in its order.

    `skipped`: reason -> ids of the rows that are not asked. `notes`: what else a reader of the numbers must know, such
    as another number of rows than the published file has.
    """

    questions: list[Question]
    skipped: dict[str, list[str]]
    notes: tuple[str, ...] = ()


def load_questions(
    benchmark: Benchmark, source: str, preset: Preset, *, limit: int | None = None, seed: int = 0
) -> LoadedQuestions:
    """Read the questions of a benchmark.

    Args:
        benchmark: its declaration.
        source: a file, or `hf://ORG/NAME[/CONFIG][:SPLIT]`.
        preset: gives the prompt and the system message.
        limit: only the first rows of the source; `benchmark.limit` where it is None.
        seed: of the order of options.
    Raises:
        DataError: a missing, empty or broken source, a missing column, an empty question, an id that occurs twice, or
            no row with a gold that can be read. The message names the row.
        MissingPackageError: see `read_source`.
    """
    limit = benchmark.limit if limit is None else limit
    graders = _inline_graders(benchmark.graders_for(preset))
    permute = permuter(benchmark.shuffle, benchmark.name, seed)
    questions: list[Question] = []
    skipped: dict[str, list[str]] = {}
    locations: dict[str, str] = {}
    number = unshuffled = 0
    for number, (location, row) in enumerate(read_source(source, benchmark.name), start=1):
        if limit is not None and number > limit:
            number = limit
            break
        identity = _row_id(row, benchmark.columns.id, number - 1)
        if identity in locations:
            raise DataError(f"{location}: the id {identity!r} is also that of {locations[identity]}; make ids unique")
        locations[identity] = location
        try:
            question, is_unshuffled = _read_question(row, location, identity, benchmark, preset, permute)
            _check_gold(question.answer, graders)
        except GoldError as error:
            skipped.setdefault(str(error), []).append(identity)
        else:
            questions.append(question)
            unshuffled += is_unshuffled
    if not questions:
        reasons = "; ".join(f"{reason} ({len(ids)} rows)" for reason, ids in skipped.items())
        raise DataError(f"{source}: {benchmark.name}: no question is left: {reasons or 'the file has no rows'}")
    notes = []
    if benchmark.size is not None and number != min(benchmark.size, limit or benchmark.size):
        notes.append(f"{number} rows were read, the published {benchmark.name} has {benchmark.size}")
    if unshuffled:
        notes.append(f"{unshuffled} questions show their options already: these were not shuffled")
    return LoadedQuestions(questions, skipped, tuple(notes))


def _row_id(row: RawRow, names: Names, number: int) -> str:
    _, value = _pick(row, names)
    return str(number) if value is None or not str(value).strip() else str(value).strip()


def _pick(row: RawRow, names: Names) -> tuple[str | None, object]:
    """The first of the columns that has a value, else the first that exists, else None."""
    present = [name for name in names if name in row or value_of(row, name) is not None]
    filled = [name for name in present if value_of(row, name) is not None]
    name = next(iter(filled or present), None)
    return name, None if name is None else value_of(row, name)


def _require(row: RawRow, names: Names, what: str, location: str) -> tuple[str, object]:
    name, value = _pick(row, names)
    if name is None:
        raise DataError(
            f"{location}: no column for the {what}: wanted {' or '.join(names)}, found {column_names(row)}; a suite "
            f'file names another one with columns.{what} = "NAME"'
        )
    return name, value


def _read_question(
    row: RawRow, location: str, identity: str, benchmark: Benchmark, preset: Preset, permute: Permute
) -> tuple[Question, bool]:
    """The question of a row, and whether its options could not be shuffled because its text already shows them.

    Raises:
        DataError: a missing column or an empty question.
        GoldError: the gold cannot be read.
    """
    columns = benchmark.columns
    system, text = _conversation(*_require(row, columns.question, "question", location), location)
    _, context = _pick(row, columns.context)
    if isinstance(context, str) and context.strip():
        text = f"{context.strip()}\n\n{text}"
    answer_column, _ = _require(row, columns.answer, "answer", location)
    permutation, letters, is_unshuffled = None, "", False
    if benchmark.kind == "math":
        answer = benchmark.gold(row, answer_column)
    else:
        options, permutation = _order_options(row, location, identity, columns, answer_column, permute)
        if options.are_in(text):
            is_unshuffled = benchmark.shuffle != "no"
            permutation = tuple(range(len(options.texts)))
        else:
            text = f"{text}\n\n{options.show(permutation)}"
        answer, letters = options.letter(permutation), LETTERS[: len(options.texts)]
    template = benchmark.prompt or (preset.prompt if benchmark.kind == "math" else preset.choice_prompt)
    values = {"question": text, "letters": letters}
    text = PLACEHOLDER.sub(lambda match: values[match[1]], template)
    _, category = _pick(row, columns.category)
    category = "" if category is None else str(category)
    question = Question(benchmark.name, identity, text, answer, permutation, category, system or preset.system)
    _check_unicode(question)
    return question, is_unshuffled


def _order_options(
    row: RawRow, location: str, identity: str, columns: Columns, answer: str, permute: Permute
) -> tuple[Options, tuple[int, ...]]:
    choices = separate = None
    if columns.options and all(name in row for name in columns.options):
        separate = columns.options
    else:
        choices, _ = _require(row, columns.choices or columns.options, "choices", location)
    index, _ = _pick(row, columns.index)
    try:
        options = read_options(row, choices, separate or (), answer, index)
    except GoldError:
        permute(identity, 4)  # a row that is skipped takes its draw of simple-evals' sequence
        raise
    return options, permute(identity, len(options.texts))


def _conversation(name: str, value: object, location: str) -> tuple[str, str]:
    """The system message and the question of a column: a text, or messages of a system and one user turn."""
    turns = value if isinstance(value, list) else [{"role": "user", "content": value}]
    texts: dict[str, str] = {}
    for turn in turns:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, turn)
        if role not in ("system", "user") or role in texts or not isinstance(content, str):
            raise DataError(f"{location}: column {name!r} must hold a question, found {kind_of(content)}")
        texts[role] = content.strip()
    if not texts.get("user"):
        raise DataError(f"{location}: column {name!r} must hold a question, found {kind_of(value)}")
    return texts.get("system", ""), texts["user"]


def _check_unicode(question: Question) -> None:
    try:
        f"{question.id}{question.system}{question.text}{question.answer}{question.category}".encode()
    except UnicodeEncodeError:
        raise GoldError("a text is not valid Unicode") from None


def _inline_graders(names: Names) -> dict[str, Verifier]:
    """Graders that run in this process, in linear time."""
    return {name: load_verifier(name) for name in names if name in INLINE}


def _check_gold(answer: str, graders: Mapping[str, Verifier]) -> None:
    """Let graders read the gold as an answer to itself.

    Raises:
        GoldError: a grader cannot read it.
    """
    for name, verifier in graders.items():
        gold = gold_for(name, answer)
        if verifier(f"\\boxed{{{gold}}}", gold).correct is None:
            raise GoldError(f"the grader {name} cannot read the answer")
