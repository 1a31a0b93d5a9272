"""What a run tells while it runs: console log, `metrics.jsonl`, TensorBoard, W&B, rollout dumps, a step's clock.

Modules log through `logging.getLogger(__name__)`; `setup_logging` decides once per rank where that goes. Only rank 0
holds a `MetricsWriter`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StepTimer:
    """Splits the wall-clock time of a step into named parts that add up to the whole.

    `with clock("generate"): ...` counts towards that part; a part opened inside another is taken out of the outer
    one, so no second counts twice. What no part covers is `other`.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._open = ["other"]
        self._seconds: dict[str, float] = {}
        self._mark = now()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the seconds of the `with` block towards `part`."""
        self._turn()
        self._open.append(part)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def split(self) -> dict[str, float]:
        """Seconds of each part since the last call, then `other`, then `step`, their sum; starts the next step."""
        self._turn()
        seconds, self._seconds = self._seconds, {}
        other = seconds.pop("other", 0.0)
        return {**seconds, "other": other, "step": sum(seconds.values()) + other}

    def _turn(self) -> None:
        now = self._now()
        self._seconds[self._open[-1]] = self._seconds.get(self._open[-1], 0.0) + now - self._mark
        self._mark = now
