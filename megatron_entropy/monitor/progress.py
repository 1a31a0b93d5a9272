"""Progress of a generation: a bar on a terminal, and one line in the log."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

INFO_SECONDS = 10.0
"""A generation of this length or longer is logged at INFO, a shorter one at DEBUG."""


class GenerationProgress:
    """Counts finished samples and their tokens inside a `with` block.

    Args:
        description: what is generated, for example `step 3`.
        num_samples: number of samples to generate.
    """

    def __init__(self, description: str, num_samples: int) -> None:
        self._description = description
        self._num_samples = num_samples
        self._samples = 0
        self._tokens = 0
        self._begin = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> GenerationProgress:
        self._begin = time.monotonic()
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]} tokens/s"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._bar.add_task(self._description, total=self._num_samples, rate="-")
        return self

    def advance(self, samples: int, tokens: int) -> None:
        """Add finished samples and the tokens generated for them."""
        self._samples += samples
        self._tokens += tokens
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=samples, rate=f"{self._rate():,.0f}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        seconds = time.monotonic() - self._begin
        logger.log(
            logging.INFO if seconds >= INFO_SECONDS else logging.DEBUG,
            "%s: %d of %d samples, %d tokens, %.1f s, %.0f tokens/s",
            self._description,
            self._samples,
            self._num_samples,
            self._tokens,
            seconds,
            self._rate(),
        )

    def _rate(self) -> float:
        return self._tokens / max(time.monotonic() - self._begin, 1e-9)
