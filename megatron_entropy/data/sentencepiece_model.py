"""Train a SentencePiece model, and write it so that transformers and vLLM read the same tokens.

Models trained here change nothing of the text (no normalisation, no added or removed spaces) and never join digits or
line breaks with anything, so every text over known characters comes back exactly.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_entropy.data.tokenizer import PLAIN_CHAT_TEMPLATE, SentencePieceTokenizer
from megatron_entropy.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

SPACE = "▁"  # SentencePiece's sign for a space


def train_sentencepiece(texts: Iterable[str], *, vocab_size: int, path: str | Path) -> SentencePieceTokenizer:
    """Train a byte-pair model and write it; the same texts in the same order give the same file.

    Ids 0 to 2 are `<unk>`, `</s>` (end) and `<pad>`; there is no begin token. Each digit and each line break is a token
    of its own. Characters that `texts` do not hold become `<unk>`.

    Args:
        texts: what to learn from.
        vocab_size: number of ids, special ones included; at least the number of different characters + 4.
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
    path = Path(path)
    path.write_bytes(model.getvalue())
    return SentencePieceTokenizer(path)


def save_for_transformers(tokenizer: SentencePieceTokenizer, folder: str | Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `tokenizer.model` into a model folder.

    transformers' AutoTokenizer and vLLM then give the same ids and texts as the model itself. The one exception is a
    text that spells out a special token (`</s>`): Hugging Face tokenizers read it as that token.

    Raises:
        TokenizerError: the model normalises text, adds a space in front, or is not a byte-pair model, which
            `train_sentencepiece` never does; such a model cannot be converted exactly here.
    """
    from sentencepiece import sentencepiece_model_pb2 as protos

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    messages: Any = protos  # generated classes, invisible to type checkers
    proto = messages.ModelProto.FromString(tokenizer.model.serialized_model_proto())
    kinds = messages.TrainerSpec.ModelType
    rules = proto.normalizer_spec
    if (
        proto.trainer_spec.model_type != kinds.Value("BPE")
        or proto.trainer_spec.byte_fallback
        or rules.precompiled_charsmap
        or rules.add_dummy_prefix
        or rules.remove_extra_whitespaces
    ):
        raise TokenizerError(
            f"{tokenizer.path}: only byte-pair models without normalisation, dummy prefix, byte fallback and space "
            "removal can be written as tokenizer.json; ship a tokenizer.json with the model instead"
        )
    _convert(proto, tokenizer).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokenizer.special_tokens,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
        "chat_template": PLAIN_CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    if tokenizer.path.resolve() != (folder / "tokenizer.model").resolve():
        shutil.copyfile(tokenizer.path, folder / "tokenizer.model")


def _convert(proto: Any, tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    """The same byte-pair model in the `tokenizers` library."""
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
    unknown = tokenizer.special_tokens["unk_token"]
    converted = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True))
    converted.normalizer = normalizers.Replace(" ", SPACE)
    converted.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse()])
    converted.add_special_tokens(
        [AddedToken(pieces[index].piece, special=True, normalized=False) for index in sorted(tokenizer.special_ids)]
    )
    converted.add_tokens(
        [AddedToken(piece.piece, normalized=False) for piece in pieces if piece.type == piece.USER_DEFINED]
    )
    return converted
