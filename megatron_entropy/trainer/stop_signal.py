"""SIGINT and SIGTERM: the run stops at the end of a step, after a checkpoint."""

from __future__ import annotations

import logging
import os
import signal
from types import FrameType

from megatron_entropy.distributed import process_groups

log = logging.getLogger(__name__)


class Stopped(Exception):
    """The run was stopped by a signal; its checkpoint is complete and can be resumed."""


class StopSignal:
    """Remembers that SIGINT or SIGTERM was received."""

    def __init__(self) -> None:
        self._is_received = False
        self.listen()

    def listen(self) -> None:
        """Install the handlers. Call it again after Ray has started: Ray replaces them by its own."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def is_received(self) -> bool:
        """Whether any rank has received a stop signal; a collective."""
        return bool(process_groups.largest(self._is_received))

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._is_received = True
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            log.warning("%s received: stopping after this step", signal.Signals(number).name)
