"""Multiple choice: the options of a row, the correct one, and the order in which they are shown."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_entropy.benchmarks.golds import GoldError, value_of
from megatron_entropy.data.readers import RawRow
from megatron_entropy.distributed.seeds import derive_seed

LETTERS = "ABCDEFGHIJ"
"""Letters of the options as shown; graders read no others."""
STATED_LETTER = re.compile(r"(?:\\boxed\{)?\(?([A-J])\)?[.:]?\}?")
Shuffle = Literal["no", "per_question", "simple_evals"]
"""Order of the options: that of the file, drawn for each question, or the draws of simple-evals."""
Permute = Callable[[str, int], tuple[int, ...]]
"""From a question's id and its number of options to `permutation`: position -> index in the file."""


@dataclass(frozen=True)
class Options:
    """The options of a question in the order of its file, and the index of the correct one."""

    texts: tuple[str, ...]
    correct: int

    def show(self, permutation: Sequence[int]) -> str:
        """Write the options as lines `A) text`, in the order of a permutation."""
        return "\n".join(f"{LETTERS[position]}) {self.texts[index]}" for position, index in enumerate(permutation))

    def letter(self, permutation: Sequence[int]) -> str:
        """Return the letter of the correct option in the order of a permutation."""
        return LETTERS[tuple(permutation).index(self.correct)]

    def are_in(self, question: str) -> bool:
        """Whether the text of a question already shows all options behind their letters."""
        return all(
            re.search(rf"(?<!\w){letter}\W{{1,3}}\s*{re.escape(text)}", question) is not None
            for letter, text in zip(LETTERS, self.texts, strict=False)
        )


def read_options(row: RawRow, choices: str | None, separate: Sequence[str], answer: str, index: str | None) -> Options:
    """Read the options of a row and find the correct one.

    Args:
        row: of a file.
        choices: column with all options: a list of texts, a list of {text, label}, an object {text: [...], label:
            [...]} as ARC has it, or an object label -> text. None: they are in columns of their own.
        separate: the columns with one option each, where `choices` is None.
        answer: column with the label, the text or the number (from 0) of the correct option.
        index: column with the number of the correct option (from 0), which must agree; or None.
    Raises:
        GoldError: no options, more than the graders have letters for, an empty option, or no single correct one.
    """
    if choices is None:
        texts, labels = [value_of(row, column) for column in separate], None
    else:
        texts, labels = _texts_and_labels(value_of(row, choices))
    while texts and texts[-1] == "N/A":  # MMLU-Pro's first release fills up to ten options
        texts = texts[:-1]
    if not texts or not all(isinstance(text, str | int | float) and str(text).strip() for text in texts):
        raise GoldError("an option is empty or not a text")
    if len(texts) > len(LETTERS):
        raise GoldError(f"there are more than {len(LETTERS)} options")
    stripped = tuple(str(text).strip() for text in texts)
    numbered = [str(label).strip() for label in labels[: len(texts)]] if labels else list(LETTERS[: len(texts)])
    if len(set(numbered)) < len(texts):
        raise GoldError("the labels of the options are not all there or not all different")
    stated = value_of(row, index) if index else None
    correct = _correct_option(value_of(row, answer), stripped, numbered, stated, is_text=answer in separate)
    if stated is not None and str(stated).strip() != str(correct):
        raise GoldError("the answer and the number of the correct option disagree")
    return Options(stripped, correct)


def _texts_and_labels(value: object) -> tuple[list[object], list[object] | None]:
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        return value["text"], value.get("label") or None
    if isinstance(value, dict):
        return list(value.values()), list(value)
    items = list(value) if isinstance(value, list | tuple) else []
    if items and all(isinstance(item, dict) for item in items):
        return [item.get("text") for item in items], [item.get("label") for item in items]
    return items, None


def _correct_option(
    answer: object, texts: Sequence[str], labels: Sequence[str], stated: object, *, is_text: bool
) -> int:
    """Index of the option that an answer names by label, number or text."""
    if isinstance(answer, str) and not is_text:
        label = match[1] if (match := STATED_LETTER.fullmatch(answer.strip())) else answer.strip()
        if label in labels:
            position = labels.index(label)
            if stated is None and label in texts and texts.index(label) != position:
                raise GoldError("the answer is the label of one option and the text of another")
            return position
    if isinstance(answer, int) and not isinstance(answer, bool):
        if str(answer) in labels:
            return labels.index(str(answer))
        if 0 <= answer < len(texts):
            return answer
    same = [number for number, text in enumerate(texts) if isinstance(answer, str) and text == answer.strip()]
    if len(same) > 1:
        raise GoldError("the answer is the text of more than one option")
    if not same:
        raise GoldError("the answer is neither the label, the number nor the text of an option")
    return same[0]


def permuter(shuffle: Shuffle, benchmark: str, seed: int) -> Permute:
    """Return the function that orders the options of a benchmark's questions.

    `per_question` draws a permutation from a generator seeded by (seed, benchmark, id), so it depends on no other
    question. `simple_evals` takes one draw after another from `random.Random(0)`, in the order of the file and
    whatever the seed; it equals the first of simple-evals' four repeats. Source: simple-evals, `gpqa_eval.py`.
    """
    if shuffle == "no":
        return lambda _id, count: tuple(range(count))
    if shuffle == "simple_evals":
        generator = random.Random(0)
        return lambda _id, count: tuple(generator.sample(range(count), count))

    def draw(question: str, count: int) -> tuple[int, ...]:
        own = random.Random(derive_seed(seed, "options", benchmark, question))
        return tuple(own.sample(range(count), count))

    return draw
