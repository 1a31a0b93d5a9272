"""Prompts of a run: loaded, filtered by length, and handed out in an order that (seed, epoch) decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_entropy.data.schemas import Message, Row, read_rows
from megatron_entropy.data.tokenizer import Tokenizer
from megatron_entropy.errors import ConfigError, DataError
from megatron_entropy.records import Prompt


@dataclass(frozen=True)
class Skipped:
    """Rows left out because they are too long, by what is too long."""

    prompt: int = 0
    target: int = 0

    def __str__(self) -> str:
        return f"skipped {self.prompt} rows with a prompt over the limit, {self.target} with a target over it"


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a data set, in the order of its files, and how many rows were left out."""

    prompts: tuple[Prompt, ...]
    skipped: Skipped

    def __len__(self) -> int:
        return len(self.prompts)


def load_prompts(
    files: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    max_prompt_tokens: int,
    max_target_tokens: int | None = None,
    schema: str = "auto",
    template: str | None = None,
    system: str | None = None,
    chat_options: Mapping[str, object] | None = None,
) -> PromptSet:
    """Read, template and tokenize a data set.

    Args:
        files: JSONL or parquet files; one set may mix both.
        tokenizer: of the model to train. The target is the worked solution with `eos_ids[0]` behind it.
        max_prompt_tokens: rows with a longer prompt are left out and counted.
        max_target_tokens: the same for targets, end token included; None for no limit.
        schema: a name of `schemas.SCHEMAS`, or `auto` (decided for each file).
        template: text with `{question}` in it; None for the tokenizer's chat template.
        system: a system message put before every conversation (chat templates only).
        chat_options: further names for the chat template, such as `enable_thinking`.

    Returns:
        The prompts; `Prompt.index` is the row number over all files, rows left out included.

    Raises:
        ConfigError: a template without `{question}`, or an unknown schema.
        DataError: see `read_rows`; also when no row is left.
    """
    prompts: list[Prompt] = []
    long_prompts = long_targets = index = 0
    for file in files:
        for row in read_rows(file, schema=schema):
            text, tokens = _render(row, tokenizer, template, system, chat_options)
            target = None if row.target is None else (*tokenizer.encode(row.target), tokenizer.eos_ids[0])
            if len(tokens) > max_prompt_tokens:
                long_prompts += 1
            elif target is not None and max_target_tokens is not None and len(target) > max_target_tokens:
                long_targets += 1
            else:
                prompts.append(Prompt(index, text, tokens, row.answer, target, semantic_entropy=row.semantic_entropy))
            index += 1
    skipped = Skipped(long_prompts, long_targets)
    if not prompts:
        names = ", ".join(str(file) for file in files) or "data.train is an empty list"
        raise DataError(f"{names}: no row is left ({skipped}; limits {max_prompt_tokens}, {max_target_tokens})")
    return PromptSet(tuple(prompts), skipped)


def read_prompts(files: Sequence[str | Path], *, schema: str = "auto") -> list[Prompt]:
    """All rows as prompts without tokens, in a fraction of the time of `load_prompts`: enough to choose among them.

    Raises:
        ConfigError: an unknown schema.
        DataError: see `read_rows`.
    """
    rows = (row for file in files for row in read_rows(file, schema=schema))
    return [
        Prompt(index, "", (), row.answer, None if row.target is None else (), semantic_entropy=row.semantic_entropy)
        for index, row in enumerate(rows)
    ]


def _render(
    row: Row,
    tokenizer: Tokenizer,
    template: str | None,
    system: str | None,
    chat_options: Mapping[str, object] | None,
) -> tuple[str, tuple[int, ...]]:
    """The templated question as text and as tokens."""
    if template is None:
        first = (Message("system", system),) if system is not None else ()
        text = tokenizer.render((*first, *row.messages), chat_options)
        return text, tuple(tokenizer.encode(text))
    if "{question}" not in template:
        raise ConfigError(f"data.template must hold {{question}}, got {template!r}")
    if system is not None:
        raise ConfigError("data.system needs a chat template: write the system message into data.template")
    text = template.replace("{question}", "\n".join(message.content for message in row.messages))
    return text, (*tokenizer.bos_ids, *tokenizer.encode(text))


def order(n: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a permutation of 0..n-1, [n] int64, the same wherever and whenever it is asked for.

    Sorts raw Philox words, whose stream numpy guarantees across versions (its `permutation` it does not).
    """
    words = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(n)
    return np.argsort(words, kind="stable")


class PromptStream:
    """An endless walk over the prompts, epoch after epoch, that resumes from a single number.

    Args:
        prompts: at least one.
        seed: with the epoch it decides the order.
        position: number of prompts already taken, as `position` gave it before.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, position: int = 0) -> None:
        assert len(prompts) > 0 and position >= 0, (len(prompts), position)
        self.prompts = prompts
        self.seed = seed
        self.position = position
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts; goes on into the next epoch where one ends."""
        taken = [self._at(self.position + offset) for offset in range(count)]
        self.position += count
        return taken

    def _at(self, position: int) -> Prompt:
        epoch, place = divmod(position, len(self.prompts))
        if epoch != self._epoch:
            self._order = order(len(self.prompts), seed=self.seed, epoch=epoch)
            self._epoch = epoch
        return self.prompts[self._order[place]]
