"""Train a SentencePiece model, and convert it so that transformers and vLLM read the same tokens.

The model changes nothing of the text (no normalisation, no added or removed spaces). Each digit and each line break is
a token of its own. So every text over known characters decodes to itself.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_entropy.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

SPACE = "▁"  # SentencePiece's sign for a space
PLAIN_CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }}{{ '\\n' }}{% endfor %}"
"""Each message on a line of its own, which is how a tokenizer without a template is rendered as well."""


def train_sentencepiece(texts: Iterable[str], *, vocab_size: int, path: str | Path) -> None:
    """Train a byte-pair model and write it; the same texts in the same order give the same file.

    Ids 0 to 2 are `<unk>`, `</s>` (end) and `<pad>`; there is no begin token. Characters that `texts` do not contain
    become `<unk>`.

    Args:
        texts: the training texts.
        vocab_size: number of ids with the special ones; at least the number of different characters + 4.
        path: the `.model` file to write.

    Raises:
        TokenizerError: the vocabulary is too small for the characters, or larger than the texts can fill.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            user_defined_symbols=["\n"],
            unk_id=0,
            eos_id=1,
            pad_id=2,
            bos_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except (OSError, RuntimeError) as error:
        message = " ".join(str(error).split())
        raise TokenizerError(f"{path}: SentencePiece cannot train {vocab_size} ids: {message}") from error
    Path(path).write_bytes(model.getvalue())


def save_for_transformers(path: str | Path, folder: str | Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `tokenizer.model` into a model folder.

    transformers and vLLM then give the same ids and texts as SentencePiece itself. The one exception is a text that
    spells out a special token (`</s>`): Hugging Face tokenizers read it as that token.

    Args:
        path: the `.model` file.
        folder: is created if need be.

    Raises:
        TokenizerError: not a model of the kind that `train_sentencepiece` writes: it normalises text, adds a space in
            front, falls back to bytes, or is not a byte-pair model.
    """
    from sentencepiece import sentencepiece_model_pb2 as protos

    path, folder = Path(path), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    messages: Any = protos  # generated classes, invisible to type checkers
    proto = messages.ModelProto.FromString(path.read_bytes())
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if (
        trainer.model_type != messages.TrainerSpec.ModelType.Value("BPE")
        or trainer.byte_fallback
        or normalizer.precompiled_charsmap
        or normalizer.add_dummy_prefix
        or normalizer.remove_extra_whitespaces
    ):
        raise TokenizerError(
            f"{path}: only byte-pair models without normalisation, dummy prefix, byte fallback and space "
            "removal can be written as tokenizer.json; ship a tokenizer.json with the model instead"
        )
    _convert(proto).save(str(folder / "tokenizer.json"))
    special_ids = {
        "eos_token": trainer.eos_id,
        "pad_token": trainer.pad_id,
        "bos_token": trainer.bos_id,
        "unk_token": trainer.unk_id,
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: proto.pieces[index].piece for name, index in special_ids.items() if index >= 0},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
        "chat_template": PLAIN_CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    if path.resolve() != (folder / "tokenizer.model").resolve():
        shutil.copyfile(path, folder / "tokenizer.model")


def _convert(proto: Any) -> tokenizers.Tokenizer:
    """Build the same byte-pair model in the `tokenizers` library."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pieces = proto.pieces
    ids = {piece.piece: index for index, piece in enumerate(pieces)}
    normal = [piece for piece in pieces if piece.type == piece.NORMAL]
    merges = []
    for piece in sorted(normal, key=lambda piece: -piece.score):
        text = piece.piece
        splits = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        known = [(left, right) for left, right in splits if left in ids and right in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    unknown = pieces[proto.trainer_spec.unk_id].piece
    converted = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True))
    converted.normalizer = normalizers.Replace(" ", SPACE)
    converted.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse()])
    converted.add_special_tokens(
        [
            AddedToken(piece.piece, special=True, normalized=False)
            for piece in pieces
            if piece.type in (piece.CONTROL, piece.UNKNOWN)
        ]
    )
    converted.add_tokens(
        [AddedToken(piece.piece, normalized=False) for piece in pieces if piece.type == piece.USER_DEFINED]
    )
    return converted
