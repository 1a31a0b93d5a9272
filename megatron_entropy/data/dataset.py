"""Prompts of a run: read from files, filtered by length, and taken in an order that depends on (seed, epoch)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_entropy.config.schema import DataConfig
from megatron_entropy.data.limits import exceeded_limit
from megatron_entropy.data.schemas import Message, Row, read_rows
from megatron_entropy.data.tokenizer import Tokenizer
from megatron_entropy.errors import ConfigError, DataError
from megatron_entropy.records import Prompt

MAX_CHARS = 2**22
"""Longest target in characters where its number of tokens is not limited."""


@dataclass(frozen=True)
class Skipped:
    """Counts of rows that were skipped because their prompt or their target is too long."""

    prompt: int = 0
    target: int = 0

    def __str__(self) -> str:
        return f"skipped {self.prompt} rows with too long a prompt, {self.target} with too long a target"


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a data set, in the order of its files, and the counts of skipped rows."""

    prompts: tuple[Prompt, ...]
    skipped: Skipped

    def __len__(self) -> int:
        return len(self.prompts)


def load_prompts(
    files: Sequence[str | Path],
    tokenizer: Tokenizer,
    data: DataConfig,
    *,
    max_target_tokens: int | None = None,
    first_only: bool = False,
) -> PromptSet:
    """Read, template and tokenize a data set.

    A text of more than `Tokenizer.max_token_chars` characters per token of the limit counts as too long and is not
    tokenized.

    Args:
        files: one set may mix the kinds of `readers.READERS`.
        tokenizer: the tokenizer of the model. A target is the worked solution followed by `eos_ids[0]`.
        data: format, columns, template and limit of a prompt; rows with a longer prompt are skipped and counted.
        max_target_tokens: the same for targets, with the end token; None for no limit but `MAX_CHARS`.
        first_only: stop reading a file after its first row within the limits: a quick check of template, tokenizer
            and limits. The template of the first row may use limited time and memory.

    Returns:
        The prompts; `Prompt.index` is the row number over all files, counting skipped rows.

    Raises:
        ConfigError: a template without `{question}`, an unknown schema, or a chat template that fails.
        DataError: see `read_rows`; also when every row is skipped.
    """
    _check_template(data)
    limit = data.max_prompt_tokens
    prompts: list[Prompt] = []
    long_prompts = long_targets = 0
    numbers = itertools.count()
    for file in files:
        is_tried = not first_only
        for row, index in zip(read_rows(file, schema=data.format, columns=data.columns), numbers, strict=False):
            if not is_tried:
                _try_to_render(row, tokenizer, data)
                is_tried = True
            text = _render(row, tokenizer, data)
            tokens = _encode(text, tokenizer, limit, prefix=tokenizer.bos_ids if data.template else ())
            if tokens is None:
                long_prompts += 1
                continue
            target = None
            if row.target is not None:
                target = _encode(row.target, tokenizer, max_target_tokens, suffix=tokenizer.eos_ids[:1])
                if target is None:
                    long_targets += 1
                    continue
            prompts.append(Prompt(index, text, tokens, row.answer, target, semantic_entropy=row.semantic_entropy))
            if first_only:
                break
    skipped = Skipped(long_prompts, long_targets)
    if not prompts:
        names = ", ".join(str(file) for file in files) or "data.train is an empty list"
        raise DataError(f"{names}: no row is left: {skipped} (limits: {limit}, {max_target_tokens} tokens)")
    return PromptSet(tuple(prompts), skipped)


def read_prompts(
    files: Sequence[str | Path], *, schema: str = "auto", columns: Mapping[str, str] | None = None
) -> list[Prompt]:
    """Read all rows as prompts without text and tokens. Much faster than `load_prompts`; enough to select prompts.

    Raises:
        ConfigError, DataError: see `read_rows`.
    """
    rows = (row for file in files for row in read_rows(file, schema=schema, columns=columns))
    return [
        Prompt(index, "", (), row.answer, None if row.target is None else (), semantic_entropy=row.semantic_entropy)
        for index, row in enumerate(rows)
    ]


def _check_template(data: DataConfig) -> None:
    if not data.template:
        return
    if "{question}" not in data.template:
        raise ConfigError(f"data.template must contain {{question}}, got {data.template!r}")
    if data.system:
        raise ConfigError("data.system needs a chat template: write the system message into data.template")


def _render(row: Row, tokenizer: Tokenizer, data: DataConfig) -> str:
    """The templated question."""
    if data.template:
        return data.template.replace("{question}", "\n".join(message.content for message in row.messages))
    system_turn = (Message("system", data.system),) if data.system else ()
    return tokenizer.render((*system_turn, *row.messages), data.chat_options)


def _try_to_render(row: Row, tokenizer: Tokenizer, data: DataConfig) -> None:
    """Raise a `ConfigError` if the template takes too long or too much memory; its other errors come later."""
    if limit := exceeded_limit(lambda: _render(row, tokenizer, data)):
        raise ConfigError(
            f"the tokenizer's chat template fails: it needs more than {limit} for one question; data.template "
            "replaces it"
        )


def _encode(
    text: str,
    tokenizer: Tokenizer,
    limit: int | None,
    *,
    prefix: tuple[int, ...] = (),
    suffix: tuple[int, ...] = (),
) -> tuple[int, ...] | None:
    """The tokens of a text, or None where they are more than `limit`.

    A tokenizer needs about 50 bytes per character, so a text that cannot fit is not given to it.
    """
    if len(text) > (MAX_CHARS if limit is None else limit * tokenizer.max_token_chars):
        return None
    tokens = (*prefix, *tokenizer.encode(text), *suffix)
    return None if limit is not None and len(tokens) > limit else tokens


def epoch_order(n: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a permutation of 0..n-1, [n] int64, the same on every machine.

    It sorts raw Philox words: numpy guarantees their stream across versions, but not that of `permutation`.
    """
    words = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(n)
    return np.argsort(words, kind="stable")


class PromptStream:
    """An endless stream of prompts, epoch after epoch, whose state is one number.

    Args:
        prompts: at least one.
        seed: the order of an epoch depends on it and on the epoch.
        position: number of prompts already taken; the attribute of that name is what a checkpoint saves.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, position: int = 0) -> None:
        assert len(prompts) > 0 and position >= 0, (len(prompts), position)
        self.prompts = prompts
        self.seed = seed
        self.position = position
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def take(self, count: int) -> list[Prompt]:
        """Take the next `count` prompts, across the end of an epoch if need be."""
        taken = [self._at(self.position + offset) for offset in range(count)]
        self.position += count
        return taken

    def _at(self, position: int) -> Prompt:
        epoch, offset = divmod(position, len(self.prompts))
        if epoch != self._epoch:
            self._order = epoch_order(len(self.prompts), seed=self.seed, epoch=epoch)
            self._epoch = epoch
        return self.prompts[self._order[offset]]
