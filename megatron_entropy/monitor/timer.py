"""Wall-clock time of a training step, by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

Phase = Literal["generate", "weight_sync", "score", "ref_logprob", "reward", "update", "eval", "save", "other"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""Phases of a step in the order of plots: `other` is what no phase covers."""


class StepTimer:
    """Splits the wall-clock time of a step into phases that add up to the whole.

    `with timer("generate"): ...` adds the time of the block to that phase. Time of a phase inside another counts only
    for the inner one, so no second counts twice.

    Args:
        now: a clock in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._open: list[Phase] = ["other"]
        self._seconds: dict[str, float] = {}
        self._mark = now()

    @contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        """Add the seconds of the `with` block to `phase`."""
        assert phase in PHASES, phase
        self._add_elapsed()
        self._open.append(phase)
        try:
            yield
        finally:
            self._add_elapsed()
            self._open.pop()

    def split(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call, then `other`, then `step`, their sum; start again."""
        self._add_elapsed()
        seconds, self._seconds = self._seconds, {}
        other = seconds.pop("other", 0.0)
        return {**seconds, "other": other, "step": sum(seconds.values()) + other}

    def _add_elapsed(self) -> None:
        now = self._now()
        self._seconds[self._open[-1]] = self._seconds.get(self._open[-1], 0.0) + now - self._mark
        self._mark = now
