"""Tokenizers of Hugging Face folders (`tokenizer.json`) and of SentencePiece (`tokenizer.model`) behind one door.

`tokenizer.json` is read with the `tokenizers` library and chat templates are rendered with jinja2, as transformers does
inside, so that nothing here imports transformers or torch.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_entropy.data.chat import render_chat
from megatron_entropy.data.schemas import Message
from megatron_entropy.errors import ConfigError, TokenizerError

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

PLAIN_CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{{ '\\n' }}{% endfor %}"
"""What a tokenizer without a chat template gets: each message on a line of its own, `{question}\\n`."""


class Tokenizer(abc.ABC):
    """Text to token ids and back.

    Attributes:
        vocab_size: one more than the largest id.
        eos_ids: all ids that end a response, the one that ends training targets first; never empty.
        pad_id: the id that fills; it is never trained, so it may equal an end id.
        bos_ids: what the tokenizer puts before a plain text; chat templates write their own.
        special_ids: ids that `decode` leaves out (control tokens, the unknown token).
        chat_template: jinja source.
    """

    vocab_size: int
    eos_ids: tuple[int, ...]
    pad_id: int
    bos_ids: tuple[int, ...] = ()
    special_ids: frozenset[int]
    special_tokens: Mapping[str, str]
    chat_template: str = PLAIN_CHAT_TEMPLATE

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text; no begin or end token is added."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ids and ids beyond the vocabulary (padding rows of a model) are left out."""

    @abc.abstractmethod
    def piece(self, token_id: int) -> str:
        """The vocabulary entry of one id as it is stored (`▁so`, `Ġthe`); `<id 99>` beyond the vocabulary."""

    def render(self, messages: Sequence[Message], options: Mapping[str, object] | None = None) -> str:
        """A conversation as the prompt of the next assistant turn, by the chat template.

        Args:
            messages: in their order.
            options: further names the template knows, such as `enable_thinking`.

        Raises:
            ConfigError: the template refuses the conversation or is not valid jinja.
        """
        return render_chat(self.chat_template, messages, {**self.special_tokens, **(options or {})})


class HuggingFaceTokenizer(Tokenizer):
    """The tokenizer of a Hugging Face folder, from its `tokenizer.json`.

    End tokens are the union of tokenizer_config.json's `eos_token` (first) and generation_config.json's
    `eos_token_id`; config.json is asked where both are silent.
    """

    def __init__(self, folder: Path) -> None:
        import tokenizers

        path = folder / "tokenizer.json"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{path}: not a readable tokenizer: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        settings = _read_json(folder / "tokenizer_config.json")
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1
        self.special_tokens = {
            name: _token_text(settings[name])
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if settings.get(name)
        }
        self.eos_ids = _end_ids(folder, ids.get(self.special_tokens.get("eos_token", "")))
        self.pad_id = ids.get(self.special_tokens.get("pad_token", ""), self.eos_ids[0])
        self.bos_ids = _begin_ids(self._tokenizer)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self.chat_template = _chat_template(folder, settings) or PLAIN_CHAT_TEMPLATE

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return self._tokenizer.decode([int(index) for index in ids], skip_special_tokens=True)

    def piece(self, token_id: int) -> str:
        """See `Tokenizer.piece`."""
        piece = self._tokenizer.id_to_token(int(token_id))
        return f"<id {token_id}>" if piece is None else piece


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `tokenizer.model`. Its end token is the model's own `</s>`."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise TokenizerError(f"{path}: not a readable SentencePiece model: {error}") from error
        self.path = path
        self.vocab_size = self._model.get_piece_size()
        eos, pad, bos = self._model.eos_id(), self._model.pad_id(), self._model.bos_id()
        if eos < 0:
            raise TokenizerError(f"{path}: the model has no end token: train it with an eos_id")
        self.eos_ids = (eos,)
        self.pad_id = pad if pad >= 0 else eos
        self.bos_ids = (bos,) if bos >= 0 else ()
        self.special_ids = frozenset(
            index for index in range(self.vocab_size) if self._model.is_control(index) or self._model.is_unknown(index)
        )
        names = {"eos_token": eos, "pad_token": pad, "bos_token": bos, "unk_token": self._model.unk_id()}
        self.special_tokens = {name: self._model.id_to_piece(index) for name, index in names.items() if index >= 0}

    @property
    def model(self) -> sentencepiece.SentencePieceProcessor:
        """The library's own object."""
        return self._model

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        return self._model.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        kept = [int(index) for index in ids]
        return self._model.decode([i for i in kept if i < self.vocab_size and i not in self.special_ids])

    def piece(self, token_id: int) -> str:
        """See `Tokenizer.piece`."""
        return self._model.id_to_piece(int(token_id)) if token_id < self.vocab_size else f"<id {token_id}>"


def load_tokenizer(path: str | Path, *, vocab_size: int | None = None) -> Tokenizer:
    """Load the tokenizer of a model folder, or a single `tokenizer.json` or SentencePiece `.model` file.

    In a folder `tokenizer.json` is preferred to `tokenizer.model`, as transformers and vLLM do.

    Args:
        path: folder or file.
        vocab_size: rows of the model's embedding; more are fine (padding), fewer are not.

    Raises:
        TokenizerError: no tokenizer there, an unreadable one, no end token, or more ids than `vocab_size`.
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


def _read_json(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path}: not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _token_text(token: object) -> str:
    """A token in tokenizer_config.json is a text or an object with `content`."""
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _end_ids(folder: Path, declared: int | None) -> tuple[int, ...]:
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


def _begin_ids(tokenizer: tokenizers.Tokenizer) -> tuple[int, ...]:
    """What the tokenizer's post-processor puts before a text."""
    bare = tokenizer.encode("0", add_special_tokens=False).ids
    full = tokenizer.encode("0", add_special_tokens=True).ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start])
    return ()


def _chat_template(folder: Path, settings: Mapping[str, object]) -> str | None:
    """The chat template: its own file, or the one of tokenizer_config.json (of several the one named default)."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {entry["name"]: entry["template"] for entry in found}
        if "default" not in named:
            raise ConfigError(f"{folder}: its chat templates are {', '.join(named)}, none is named default")
        found = named["default"]
    return found if isinstance(found, str) else None
