"""Lines of a rollout dump, read: the texts of their tokens, and where a branch leaves its parent.

`rollout_dumps` writes them. What other versions lack is None; lines are read with `DumpRow.model_validate_json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict


class DumpRow(BaseModel):
    """A line of a dump (`monitor.rollout_dumps`); what other versions lack is None."""

    model_config = ConfigDict(allow_inf_nan=False)

    question: str
    response: str
    prompt: int | None = None
    group: int | None = None
    sample: int | None = None
    answer: str | None = None
    semantic_entropy: float | None = None
    length: int | None = None
    finish_reason: str | None = None
    correct: bool | None = None
    extracted: str | None = None
    error: str | None = None
    reward: float | None = None
    advantage: float | None = None
    entropy: float | None = None
    kl_weight: float | None = None
    trained: bool | None = None
    policy_version: int | None = None
    parent: int | None = None
    cut: int | None = None
    pieces: list[str] | None = None
    logprobs: list[float | None] | None = None
    rollout_logprobs: list[float | None] | None = None
    entropies: list[float | None] | None = None
    advantages: list[float | None] | None = None
    kl_weights: list[float | None] | None = None
    reference_logprobs: list[float | None] | None = None
    untrained: list[int] | None = None
    alternatives: list[list[tuple[str, float]]] | None = None

    @property
    def verdict(self) -> str:
        """`right`, `wrong`, or `error` where the verifier has no verdict."""
        return "error" if self.correct is None else "right" if self.correct else "wrong"


BYTE_OF_CHARACTER = {
    chr(byte if byte in (*range(33, 127), *range(161, 173), *range(174, 256)) else 256 + hidden): byte
    for hidden, byte in [
        (sum(b not in (*range(33, 127), *range(161, 173), *range(174, 256)) for b in range(byte)), byte)
        for byte in range(256)
    ]
}
"""Byte-level vocabularies (GPT-2) write every byte as one printable character: `Ġ` is a space."""


def is_byte_level(pieces: Sequence[str]) -> bool:
    """Whether these entries are of a byte-level vocabulary, as far as they tell."""
    return any("Ġ" in piece or "Ċ" in piece for piece in pieces) and not any("▁" in piece for piece in pieces)


def token_texts(pieces: Sequence[str], *, byte_level: bool | None = None) -> list[str]:
    """Return the text of every token from its vocabulary entry.

    The bytes of a character that several tokens share appear with the last of them. Entries of a SentencePiece
    vocabulary (`▁so`, `<0x0A>`) and special tokens are recognized by themselves.

    Args:
        byte_level: None: as `is_byte_level` finds.
    """
    byte_level = is_byte_level(pieces) if byte_level is None else byte_level
    texts, pending = [], b""
    for piece in pieces:
        if byte_level and all(character in BYTE_OF_CHARACTER for character in piece):
            pending += bytes(BYTE_OF_CHARACTER[character] for character in piece)
        elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            try:
                pending += bytes.fromhex(piece[3:5])
            except ValueError:
                pending += piece.encode()
        else:
            pending += piece.replace("▁", " ").encode("utf-8", "replace")
        try:
            texts.append(pending.decode())
        except UnicodeDecodeError as error:
            is_begun = error.reason == "unexpected end of data" and len(pending) < 4
            texts.append(pending[: error.start].decode() if is_begun else pending.decode("utf-8", "replace"))
            pending = pending[error.start :] if is_begun else b""
        else:
            pending = b""
    return texts


def describe_tokens(row: DumpRow) -> dict[str, Any]:
    """Return the lists of a response, one entry a token; a list of another length is left out."""
    texts = token_texts(row.pieces) if row.pieces is not None else [row.response]
    fields = {
        name: values
        for name in ("entropies", "logprobs", "rollout_logprobs", "advantages", "kl_weights", "reference_logprobs")
        if (values := getattr(row, name)) is not None and len(values) == len(texts)
    }
    byte_level = is_byte_level(row.pieces or ())
    if row.alternatives is not None and len(row.alternatives) == len(texts):
        fields["alternatives"] = [
            [(token_texts([piece], byte_level=byte_level)[0] or piece, logprob) for piece, logprob in position]
            for position in row.alternatives
        ]
    return {"texts": texts, "untrained": row.untrained or [], **fields}


def cut_of(row: DumpRow, parent: DumpRow) -> dict[str, Any] | None:
    """Describe where a branch leaves its parent: position, the token there, its entropy, rank and probability."""
    if row.cut is None or not parent.pieces or not 0 <= row.cut < len(parent.pieces):
        return None
    tokens = describe_tokens(parent)
    entropies = tokens.get("entropies")
    entropy = entropies[row.cut] if entropies else None
    logprob = (tokens.get("rollout_logprobs") or tokens.get("logprobs") or {row.cut: None})[row.cut]
    return {
        "position": row.cut,
        "length": len(parent.pieces),
        "text": tokens["texts"][row.cut],
        "entropy": entropy,
        "rank": None if entropy is None else 1 + sum((other or 0.0) > entropy for other in entropies or []),
        "probability": None if logprob is None else math.exp(min(logprob, 0.0)),
    }


def describe_cut(cut: Mapping[str, Any]) -> str:
    """Say where a cut (`cut_of`) lies."""
    rank = f", rank {cut['rank']} by entropy, {cut['entropy']:.3f} nats" if cut["rank"] else ""
    chance = f", sampled with probability {cut['probability']:.3f}" if cut["probability"] is not None else ""
    text = json.dumps(cut["text"], ensure_ascii=False)
    return f"before token {cut['position'] + 1} of {cut['length']} ({text}{rank}{chance})"


class Family(NamedTuple):
    """A response with the branches that continue it after one `cut` (`cut_of`)."""

    number: int
    parent: DumpRow
    branches: list[DumpRow]
    cut: dict[str, Any]


def families(group: Sequence[DumpRow]) -> list[Family]:
    """Return the responses of a group that branch; without pieces in the dump there are none."""
    found = []
    for place, parent in enumerate(group):
        number = place if parent.sample is None else parent.sample
        branches = [row for row in group if row.parent == number and row is not parent]
        if branches and (cut := cut_of(branches[0], parent)):
            found.append(Family(number, parent, branches, cut))
    return found
