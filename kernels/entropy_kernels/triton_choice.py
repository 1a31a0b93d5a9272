"""Chooses between the plain and the warp-specialised form of the forward kernel by timing both on the device.

Once per process and shape. Both forms must agree first: neither has run on a GPU yet. Their sums
are taken in another order, so results may differ in the last bits between processes that chose
differently; ENTROPY_KERNELS_SPECIALIZED=0 (plain) or 1 (specialised where it exists) fixes the choice.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Form = TypeVar("Form")
"""Tile and launch settings of a form of the kernel."""
LOG = logging.getLogger(__name__)
VARIABLE = "ENTROPY_KERNELS_SPECIALIZED"
LAUNCHES = 5
TOLERANCE = 1e-3
"""Relative and absolute difference of sums in another order; a wrong kernel is off by more."""
chosen: dict[tuple, Any] = {}
"""The choices of this process, by shape."""


def choose(shape: tuple, plain: Form, specialized: Form, launch: Callable[[Form], Tensor]) -> Form:
    """The form that the environment names, or else the faster one.

    Args:
        shape: what the speed depends on.
        launch: run one form; returns its output, [splits, 7, rows] on the device.

    Raises:
        ValueError: the environment variable is neither auto, 0 nor 1.
    """
    setting = os.environ.get(VARIABLE, "auto")
    if setting not in ("auto", "0", "1"):
        raise ValueError(f"{VARIABLE} is {setting!r}; known: auto, 0, 1")
    if setting != "auto":
        return specialized if setting == "1" else plain
    if shape not in chosen:
        if not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
            return plain
        chosen[shape] = _faster(shape, plain, specialized, launch)
    return chosen[shape]


def _faster(shape: tuple, plain: Form, specialized: Form, launch: Callable[[Form], Tensor]) -> Form:
    expected = launch(plain).clone()
    if not torch.allclose(launch(specialized), expected, TOLERANCE, TOLERANCE, equal_nan=True):
        LOG.warning("forward kernel for %s: the forms disagree, taking the plain one; please report this", shape)
        return plain
    times = [_milliseconds(lambda form=form: launch(form)) for form in (plain, specialized)]
    best = specialized if times[1] < times[0] else plain
    name = "specialized" if best is specialized else "plain"
    LOG.info("forward kernel for %s: plain %.3f ms, specialized %.3f ms, taking %s", shape, *times, name)
    return best


def _milliseconds(call: Callable[[], object]) -> float:
    """Time of one of several calls on the current stream; the kernel is compiled already."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(LAUNCHES):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / LAUNCHES
