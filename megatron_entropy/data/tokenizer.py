"""Tokenizers of Hugging Face folders (`tokenizer.json`) and of SentencePiece (`tokenizer.model`) behind one interface.

`tokenizer.json` is read by transformers' `PreTrainedTokenizerFast`, which takes the file as it is. `AutoTokenizer`
rebuilds it by the class that the folder names and gives other ids where file and class disagree (`LlamaTokenizerFast`
beside a byte-level file, as in distilled Qwen models). Both libraries are imported when a tokenizer is loaded.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_entropy.data.schemas import Message
from megatron_entropy.errors import ConfigError, TokenizerError


class Tokenizer(abc.ABC):
    """Text to token ids and back.

    Attributes:
        vocab_size: the largest id + 1.
        eos_ids: all ids that end a response, never empty; training targets end with the first.
        pad_id: the padding id. It is never trained, so it may equal an end id.
        bos_ids: the ids before a plain text. Chat templates write their own.
    """

    vocab_size: int
    eos_ids: tuple[int, ...]
    pad_id: int
    bos_ids: tuple[int, ...]

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without begin and end tokens."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, without special tokens and ids beyond the vocabulary (padding rows of a model)."""

    @abc.abstractmethod
    def piece(self, token_id: int) -> str:
        """Return the vocabulary entry of an id as it is stored (`▁so`, `Ġthe`); `<id 99>` beyond the vocabulary."""

    def render(self, messages: Sequence[Message], options: Mapping[str, object] | None = None) -> str:
        """Write a conversation as the prompt of the next assistant turn.

        Args:
            messages: in their order.
            options: variables of the chat template, such as `enable_thinking`.

        Returns:
            The text by the tokenizer's chat template; without a template each message on a line of its own.

        Raises:
            ConfigError: the template refuses the conversation or the options, or is not valid jinja.
        """
        return "".join(f"{message.content}\n" for message in messages)


class HuggingFaceTokenizer(Tokenizer):
    """The tokenizer of a Hugging Face folder, from its `tokenizer.json`.

    End tokens are the union of tokenizer_config.json's `eos_token` (first) and generation_config.json's
    `eos_token_id`; config.json's `eos_token_id` counts where neither has one.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import PreTrainedTokenizerFast

        _read_json(folder / "tokenizer_config.json")  # names the file if it is broken
        try:
            self._tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise TokenizerError(
                f"{folder}: tokenizer.json: not a readable tokenizer, or tokenizer_config.json does not fit it: {error}"
            ) from error
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        self.eos_ids = _eos_ids(folder, self._tokenizer.eos_token_id)
        pad_id = self._tokenizer.pad_token_id
        self.pad_id = self.eos_ids[0] if pad_id is None else pad_id
        self.bos_ids = self._prefix_ids()
        template = self._tokenizer.chat_template
        if isinstance(template, dict) and "default" not in template:
            raise ConfigError(f"{folder}: its chat templates are {', '.join(template)}, none is named default")

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)

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
        import jinja2

        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, **(options or {})
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ConfigError(f"the tokenizer's chat template fails: {error}; data.template replaces it") from error

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
        except (OSError, RuntimeError) as error:
            raise TokenizerError(f"{path}: not a readable SentencePiece model: {error}") from error
        self.vocab_size = self._model.get_piece_size()
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
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path}: not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _eos_ids(folder: Path, declared: int | None) -> tuple[int, ...]:
    found = [] if declared is None else [declared]
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(folder / name).get("eos_token_id")
        if name == "generation_config.json" or not found:
            found += [index for index in (ids if isinstance(ids, list) else [ids]) if isinstance(index, int)]
    if not found:
        raise TokenizerError(
            f"{folder}: no end token: set eos_token in tokenizer_config.json or eos_token_id in generation_config.json"
        )
    return tuple(dict.fromkeys(found))
