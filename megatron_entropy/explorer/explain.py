"""Say what decided about a response: its cut, its branches, the parts of its reward, the answers of its group."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_entropy.explorer.index import DumpRow
from megatron_entropy.methods.objectives import soft_overlong_penalty

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


def reward_parts(row: DumpRow, stage: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return what the reward is the sum of, by the settings of the stage; the reward alone where they do not tell."""
    if row.reward is None:
        return []
    try:
        parts = _parts(row, stage)
    except (KeyError, TypeError, ValueError, AttributeError):  # settings of another method or version
        parts = []
    if not parts or abs(sum(value for _, value in parts) - row.reward) > 1e-4:
        return [("reward", row.reward)]
    return parts


def _parts(row: DumpRow, stage: Mapping[str, Any]) -> list[tuple[str, float]]:
    method, is_right = stage["method"], row.correct
    if method["name"] == "cer":
        if not is_right:
            return [("wrong answer", 0.0)]
        teca = row.entropy or 0.0
        return [
            ("correct answer", (method["accuracy_weight"] + method["entropy_weight"]) / 2),
            (f"confidence exp(-TECA), TECA {teca:.3f} nats", method["entropy_weight"] * math.exp(-teca) / 2),
        ]
    parts = [("correct answer", method["correct_reward"]) if is_right else ("wrong answer", method["wrong_reward"])]
    if method.get("overlong_buffer"):
        penalty = soft_overlong_penalty(
            row.length or 0, limit=stage["rollout"]["max_response_tokens"], buffer=method["overlong_buffer"]
        )
        parts.append(("length penalty", method["overlong_factor"] * penalty))
    return parts


def clusters(rows: Sequence[DumpRow]) -> dict[str, Any]:
    """Group the responses to a question by the answer that the verifier extracted, most frequent first.

    Returns:
        `entropy`: of the answers in nats, the count-weighted semantic entropy where equal answers are equal texts; and
        `answers`, each with its text (None: not readable), its count, and whether it is correct.
    """
    counts = Counter(row.extracted for row in rows)
    verdicts = {row.extracted: row.correct for row in rows}
    fractions = [count / len(rows) for count in counts.values()]
    return {
        "entropy": abs(sum(-fraction * math.log(fraction) for fraction in fractions)),
        "answers": [{"text": text, "count": count, "correct": verdicts[text]} for text, count in counts.most_common()],
    }


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


def sentences(row: DumpRow, number: int, group: Mapping[int, DumpRow], parts: Sequence[tuple[str, float]]) -> list[str]:
    """Explain a response in a few sentences.

    Args:
        number: of the response in its group.
        group: rows of the group by their number.
        parts: of the reward (`reward_parts`).
    """
    said = []
    parent = group.get(row.parent) if row.parent is not None else None
    children = [child for child in group.values() if child.parent == number]
    if parent is not None and (cut := cut_of(row, parent)):
        said.append(
            f"Branch of response {row.parent}, which was cut {_place(cut)}. The token was sampled again; tokens before "
            f"it are trained in response {row.parent} only."
        )
    if children and (cut := cut_of(children[0], row)):
        right = sum(child.correct is True for child in children)
        said.append(
            f"Cut {_place(cut)}. {right} of {len(children)} branches are correct; this response is "
            f"{'correct' if row.correct else 'wrong'}."
        )
    if row.error or row.correct is None and row.reward is None:
        said.append(f"The verifier has no verdict ({row.error or 'none recorded'}), so there is no reward.")
    elif len(terms := [f"{value:.3f} ({name})" for name, value in parts if value]) > 1:
        said.append(f"Reward {row.reward:.3f} = {' + '.join(terms)}.")
    said += _on_training(row, list(group.values()))
    return said


def _place(cut: Mapping[str, Any]) -> str:
    rank = f", rank {cut['rank']} by entropy, {cut['entropy']:.3f} nats" if cut["rank"] else ""
    chance = f", sampled with probability {cut['probability']:.3f}" if cut["probability"] is not None else ""
    text = json.dumps(cut["text"], ensure_ascii=False)
    return f"before token {cut['position'] + 1} of {cut['length']} ({text}{rank}{chance})"


def _on_training(row: DumpRow, group: Sequence[DumpRow]) -> list[str]:
    said = []
    rewards = {other.reward for other in group if other.reward is not None}
    if row.advantage == 0 and len(rewards) == 1:
        said.append("All responses of the group earned the same, so the advantage is 0: nothing is learned from them.")
    elif row.advantage is not None:
        verb = "raised" if row.advantage > 0 else "lowered"
        said.append(f"Advantage {row.advantage:+.3f}: the probability of its tokens is {verb}.")
    if row.trained is False:
        said.append("It was left out of training.")
    elif row.untrained:
        said.append(f"{len(row.untrained)} tokens have no weight in the loss.")
    if row.kl_weights:
        weights = Counter(weight for weight in row.kl_weights if weight)
        counts = ", ".join(f"{count} with weight {weight:g}" for weight, count in sorted(weights.items()))
        said.append(f"Tokens with a KL penalty: {counts or 'none'}.")
    elif row.kl_weight:
        said.append(f"Every token has a KL penalty with weight {row.kl_weight:g}.")
    return said
