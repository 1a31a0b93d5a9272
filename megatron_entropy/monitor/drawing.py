"""Responses as the report draws them: tokens shaded by entropy, and a response with the branches that leave it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from megatron_entropy.monitor.dump_rows import DumpRow, Family, describe_cut, describe_tokens, families
from megatron_entropy.monitor.history import StageHistory

WINDOW = 120
"""Tokens that are drawn on each side of a cut."""
KEPT = 24
"""Tokens before the cut that are drawn again before a branch."""

Drawn = dict[str, Any]


def draw_samples(rows: Iterable[DumpRow], count: int = 2) -> list[Drawn]:
    """Draw the first `count` correct and the first `count` wrong samples of a dump."""
    chosen: dict[bool, list[Drawn]] = {True: [], False: []}
    for row in rows:
        if row.correct is not None and len(chosen[row.correct]) < count:
            values = {"reward": row.reward, "entropy": row.entropy}
            facts = [f"expected {row.answer}", f"found {row.extracted}", f"{row.finish_reason}"]
            facts += [f"{name} {value:.3f}" for name, value in values.items() if value is not None]
            drawn = {"question": row.question, "tokens": _draw_tokens(row), "facts": ", ".join(facts)}
            chosen[row.correct].append(drawn | {"verdict": _verdict(row)})
    return chosen[True] + chosen[False]


def draw_tree(stage: StageHistory) -> Drawn | None:
    """Draw one response of a stage with its branches; None where nothing branches.

    It takes the one that shows most: a wrong response with a right branch before others, then one where a new token at
    the cut tells right branches from wrong ones, then the one whose token at the cut was least probable.
    """
    found = ((step, family) for step, group in stage.groups() for family in families(group))
    best = max(found, key=lambda pair: _interest(pair[1]), default=None)
    return None if best is None else _draw_family(*best)


def _interest(family: Family) -> tuple[bool, int, float]:
    """Whether a branch fixed a wrong response, how many verdicts follow the new token, how improbable the old was."""
    old = (family.parent.pieces or [])[family.cut["position"]]
    is_decisive = [branch.correct == ((branch.pieces or [])[:1] != [old]) for branch in family.branches]
    return _is_fixed(family), sum(is_decisive), -(family.cut["probability"] or 0.0)


def _is_fixed(family: Family) -> bool:
    return family.parent.correct is False and any(branch.correct for branch in family.branches)


def _draw_family(step: int, family: Family) -> Drawn:
    parent, cut = family.parent, family.cut["position"]
    tokens = _draw_tokens(parent)
    tokens[cut]["cut"] = True
    start, end = max(0, cut - WINDOW), cut + WINDOW
    kept = describe_tokens(parent)["texts"][:cut]
    return {
        "step": step,
        "question": parent.question,
        "answer": parent.answer,
        "place": describe_cut(family.cut),
        "is_fixed": _is_fixed(family),
        "parent": {
            "name": f"response {family.number}",
            "tokens": _cut_off(tokens[start:end], before=start > 0, after=end < len(tokens)),
            **_outcome(parent),
        },
        "branches": [
            {
                "name": f"branch {number}",
                "kept": ("…" if cut > KEPT else "") + "".join(kept[-KEPT:]),
                "tokens": _cut_off(_draw_tokens(branch)[:WINDOW], after=len(branch.pieces or ()) > WINDOW),
                **_outcome(branch),
            }
            for number, branch in enumerate(family.branches, start=1)
        ],
    }


def _outcome(row: DumpRow) -> Drawn:
    reward = f", reward {row.reward:.2f}" if row.reward is not None else ""
    return {"verdict": _verdict(row), "facts": f"answer {row.extracted}{reward}"}


def _verdict(row: DumpRow) -> str:
    return "correct" if row.correct else "wrong" if row.correct is False else "ungraded"


def _cut_off(tokens: Sequence[Drawn], *, before: bool = False, after: bool = False) -> list[Drawn]:
    more = [{"text": "…", "color": "", "title": ""}]
    return [*more * before, *tokens, *more * after]


def _draw_tokens(row: DumpRow) -> list[Drawn]:
    tokens = describe_tokens(row)
    entropies = tokens.get("entropies")
    if row.pieces is None or entropies is None:
        return [{"text": text, "color": "", "title": ""} for text in tokens["texts"]]
    return [
        {"text": text, "color": shade(entropy or 0.0), "title": f"{entropy} nats"}
        for text, entropy in zip(tokens["texts"], entropies, strict=True)
    ]


def shade(entropy: float) -> str:
    """Return the background of a token as CSS: white at 0 nats, full colour from 2 nats on."""
    return f"rgba(240, 140, 40, {min(max(entropy, 0.0) / 2.0, 1.0) ** 0.6:.2f})"
