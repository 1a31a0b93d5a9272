"""Say what decided about a response: its cut, its branches, the parts of its reward, the answers of its group."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_entropy.methods.objectives import soft_overlong_penalty
from megatron_entropy.monitor.dump_rows import DumpRow, cut_of, describe_cut


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
            f"Branch of response {row.parent}, which was cut {describe_cut(cut)}. The token was sampled again; tokens "
            f"before it are trained in response {row.parent} only."
        )
    if children and (cut := cut_of(children[0], row)):
        right = sum(child.correct is True for child in children)
        said.append(
            f"Cut {describe_cut(cut)}. {right} of {len(children)} branches are correct; this response is "
            f"{'correct' if row.correct else 'wrong'}."
        )
    if row.error or row.correct is None and row.reward is None:
        said.append(f"The verifier has no verdict ({row.error or 'none recorded'}), so there is no reward.")
    elif len(terms := [f"{value:.3f} ({name})" for name, value in parts if value]) > 1:
        said.append(f"Reward {row.reward:.3f} = {' + '.join(terms)}.")
    said += _on_training(row, list(group.values()))
    return said


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
