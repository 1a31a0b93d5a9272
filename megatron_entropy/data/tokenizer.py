"""Tokenizers of Hugging Face folders (`tokenizer.json`) and of SentencePiece (`tokenizer.model`) behind one interface.

`tokenizer.json` is read by transformers' `PreTrainedTokenizerFast`, which takes the file as it is. `AutoTokenizer`
rebuilds it by the class that the folder names and gives other ids where file and class disagree (`LlamaTokenizerFast`
beside a byte-level file, as in distilled Qwen models). Both libraries are imported when a tokenizer is loaded.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_entropy.data.readers import kind_of
from megatron_entropy.data.schemas import Message
from megatron_entropy.errors import ConfigError, TokenizerError, UserError
from megatron_entropy.files import read_json

MAX_TOKEN_CHARS = 256
"""Upper bound of `Tokenizer.max_token_chars`; tokens of published vocabularies have at most 128 characters."""


class Tokenizer(abc.ABC):
    """Text to token ids and back.

    Attributes:
        vocab_size: the largest id + 1.
        eos_ids: all ids that end a response, never empty; training targets end with the first.
        pad_id: the padding id. It is never trained, so it may equal an end id.
        bos_ids: the ids before a plain text. Chat templates write their own.
        max_token_chars: the most characters that one id stands for, at least 16 and at most `MAX_TOKEN_CHARS`. A text
            of more than n times as many characters has more than n tokens, unless the tokenizer joins runs of unknown
            characters or spaces.
    """

    vocab_size: int
    eos_ids: tuple[int, ...]
    pad_id: int
    bos_ids: tuple[int, ...]
    max_token_chars: int

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without begin and end tokens.

        Raises:
            TokenizerError: the tokenizer cannot read the text.
        """

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, without special tokens and ids beyond the vocabulary (padding rows of a model)."""

    @abc.abstractmethod
    def piece(self, token_id: int) -> str:
        """Return the vocabulary entry of an id as it is stored (`▁so`, `Ġthe`); `<id 99>` beyond the vocabulary."""

    def text_of(self, token: int) -> str:
        """Return the text of one id; empty for end tokens."""
        return "" if token in self.eos_ids else self.decode([token])

    def render(self, messages: Sequence[Message], options: Mapping[str, object] | None = None) -> str:
        """Write a conversation as the prompt of the next assistant turn.

        Args:
            messages: in their order.
            options: variables of the chat template, such as `enable_thinking`.

        Returns:
            The text by the tokenizer's chat template; without a template each message on a line of its own.

        Raises:
            ConfigError: the template refuses the conversation or the options, fails, or is not valid jinja.
        """
        return "".join(f"{message.content}\n" for message in messages)


class HuggingFaceTokenizer(Tokenizer):
    """The tokenizer of a Hugging Face folder, from its `tokenizer.json`.

    End tokens are the union of tokenizer_config.json's `eos_token` (first) and generation_config.json's
    `eos_token_id`; config.json's `eos_token_id` counts where neither has one.
    """

    def __init__(self, folder: Path) -> None:
        settings = _read_json(folder / "tokenizer_config.json")
        try:
            self._load(folder, settings)
        except UserError:
            raise
        except BaseException as error:  # tokenizers raises bare Exception, and PanicException beside it
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise TokenizerError(
                f"{folder}: tokenizer.json: not a readable tokenizer, or tokenizer_config.json or chat_template.jinja "
                f"does not fit it: {_one_line(error)}"
            ) from error
        self.eos_ids = _eos_ids(folder, self._tokenizer.eos_token_id, self.vocab_size)
        pad_id = self._tokenizer.pad_token_id
        self.pad_id = self.eos_ids[0] if pad_id is None else pad_id
        template = self._tokenizer.chat_template
        if isinstance(template, dict) and "default" not in template:
            raise ConfigError(f"{folder}: its chat templates are {', '.join(template)}, none is named default")

    def _load(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import tokenizers
        from transformers import PreTrainedTokenizerFast

        self._tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        vocabulary = self._tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self.max_token_chars = _bounded(max(map(len, vocabulary)))
        self.bos_ids = self._prefix_ids()
        # transformers adds an unknown end token to the vocabulary; the model would never produce it.
        end = self._tokenizer.eos_token
        added = [entry["content"] for entry in settings.get("added_tokens_decoder", {}).values()]
        in_file = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        if end is not None and in_file.token_to_id(end) is None and end not in added:
            raise TokenizerError(f"{folder}: tokenizer_config.json: eos_token {end[:60]!r} is not in tokenizer.json")

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        try:
            return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise TokenizerError(f"the tokenizer fails on {text[:60]!a}: {_one_line(error)}") from error

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        kept = [int(index) for index in ids]
        return self._tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def piece(self, token_id: int) -> str:
        """See `Tokenizer.piece`."""
        piece = self._tokenizer.convert_ids_to_tokens(int(token_id))
        return f"<id {token_id}>" if piece is None else piece

    def render(self, messages: Sequence[Message], options: Mapping[str, object] | None = None) -> str:
        """See `Tokenizer.render`."""
        if not self._tokenizer.chat_template:
            return super().render(messages)
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, **(options or {})
            )
            text.encode()  # a template may write half of a surrogate pair
        except Exception as error:  # a template is a program: it may raise anything
            raise ConfigError(
                f"the tokenizer's chat template fails: {_one_line(error)}; data.template replaces it"
            ) from error
        return text

    def _prefix_ids(self) -> tuple[int, ...]:
        """What the tokenizer's post-processor puts before a text."""
        bare, full = self.encode("0"), self._tokenizer.encode("0")
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return tuple(full[:start])
        return ()


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `tokenizer.model`; its end token is the model's own `</s>`."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
            self.vocab_size = self._model.get_piece_size()
            pieces = [self._model.id_to_piece(index) for index in range(self.vocab_size)]
            self.max_token_chars = _bounded(max(map(len, pieces)))
        except Exception as error:  # OSError, RuntimeError, UnicodeDecodeError of a piece
            raise TokenizerError(f"{path}: not a readable SentencePiece model: {_one_line(error)}") from error
        eos, pad, bos = self._model.eos_id(), self._model.pad_id(), self._model.bos_id()
        if eos < 0:
            raise TokenizerError(f"{path}: the model has no end token: train it with an eos_id")
        self.eos_ids = (eos,)
        self.pad_id = pad if pad >= 0 else eos
        self.bos_ids = (bos,) if bos >= 0 else ()
        self._special_ids = frozenset(
            index for index in range(self.vocab_size) if self._model.is_control(index) or self._model.is_unknown(index)
        )

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return self._model.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        kept = [int(index) for index in ids]
        return self._model.decode([i for i in kept if i < self.vocab_size and i not in self._special_ids])

    def piece(self, token_id: int) -> str:
        """See `Tokenizer.piece`."""
        return self._model.id_to_piece(int(token_id)) if token_id < self.vocab_size else f"<id {token_id}>"


def load_tokenizer(path: str | Path, *, vocab_size: int | None = None) -> Tokenizer:
    """Load the tokenizer of a model folder, or a single `tokenizer.json` or SentencePiece `.model` file.

    In a folder `tokenizer.json` is preferred to `tokenizer.model`, as in transformers and vLLM.

    Args:
        path: folder or file.
        vocab_size: rows of the model's embedding. The tokenizer may have fewer ids (padding), not more.

    Raises:
        TokenizerError: no tokenizer there, an unreadable one, no end token, or more ids than `vocab_size`.
        ConfigError: several chat templates, none of them named default.
    """
    path = Path(path)
    candidates = [path / "tokenizer.json", path / "tokenizer.model"] if path.is_dir() else [path]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise TokenizerError(f"{path}: no tokenizer.json and no tokenizer.model there")
    tokenizer = SentencePieceTokenizer(file) if file.suffix == ".model" else HuggingFaceTokenizer(file.parent)
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"{file}: the tokenizer has {tokenizer.vocab_size} ids, but the model's vocab_size is {vocab_size}"
        )
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, TokenizerError) if os.path.lexists(path) else {}


def _eos_ids(folder: Path, declared: int | None, vocab_size: int) -> tuple[int, ...]:
    found = [] if declared is None else [declared]
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(folder / name).get("eos_token_id")
        if ids is None or (name == "config.json" and found):
            continue
        for index in ids if isinstance(ids, list) else [ids]:
            if type(index) is not int or not 0 <= index < vocab_size:
                raise TokenizerError(
                    f"{folder / name}: eos_token_id must be ids of the tokenizer, 0 to {vocab_size - 1}, "
                    f"found {kind_of(index)}"
                )
            found.append(index)
    if not found:
        raise TokenizerError(
            f"{folder}: no end token: set eos_token in tokenizer_config.json or eos_token_id in generation_config.json"
        )
    return tuple(dict.fromkeys(found))


def _bounded(longest: int) -> int:
    return min(max(longest, 16), MAX_TOKEN_CHARS)


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
