"""Look at the collectives of a piece of code: count them, run them alone, run the code without them.

All of them pass through `torch.distributed.ProcessGroup`, whose methods are replaced for a while. A call's bytes are
those of its larger side: what an all-gather returns, what a reduce-scatter takes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._C import _distributed_c10d as c10d
from torch._C._distributed_c10d import ProcessGroup

OPERATIONS = {
    "allreduce": "all-reduce",
    "allreduce_coalesced": "all-reduce",
    "allgather": "all-gather",
    "_allgather_base": "all-gather",
    "all_gather_single": "all-gather",
    "allgather_into_tensor_coalesced": "all-gather",
    "all_gather_single_coalesced": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "_reduce_scatter_base": "reduce-scatter",
    "reduce_scatter_single": "reduce-scatter",
    "reduce_scatter_tensor_coalesced": "reduce-scatter",
    "reduce_scatter_single_coalesced": "reduce-scatter",
    "alltoall": "all-to-all",
    "alltoall_base": "all-to-all",
    "all_to_all_single": "all-to-all",
    "broadcast": "broadcast",
    "send": "send",
    "recv": "receive",
}
"""Method of a process group -> name of the operation."""
IN_PLACE = {"all-reduce", "broadcast", "send"}
"""Without communication their tensor holds numbers already."""
PLACEHOLDER = 0.01
"""What tensors of other ranks hold when they do not arrive: memory as it comes may hold NaN or slow denormals."""


@dataclass(frozen=True)
class Call:
    """One call of a process group's method."""

    operation: str
    method: Callable[..., Any]
    group: ProcessGroup
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    num_bytes: int

    def repeat(self) -> None:
        """Run it again, on tensors of its own."""
        work = self.method(self.group, *map(_empty_like, self.arguments), **self.keywords)
        if work is not None:
            work.wait()


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    """Collect the calls of the block; one-rank groups are left out."""
    calls: list[Call] = []

    def replace(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(group: ProcessGroup, *arguments: Any, **keywords: Any) -> Any:
            if group.size() > 1:
                size = max(sum(tensor.nbytes for tensor in _tensors(argument)) for argument in arguments)
                kept = tuple(_describe(argument) for argument in arguments)
                calls.append(Call(OPERATIONS[name], method, group, kept, keywords, size))
            return method(group, *arguments, **keywords)

        return call

    with _replaced(replace):
        yield calls


@contextlib.contextmanager
def without_communication() -> Iterator[None]:
    """Let every operation on floating point numbers return at once; counts and shapes are still exchanged.

    The numbers are wrong then, the work of each rank is the same. Stages of a pipeline do not wait for one another.
    """

    def replace(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(group: ProcessGroup, *arguments: Any, **keywords: Any) -> Any:
            tensors = [tensor for argument in arguments for tensor in _tensors(argument)]
            if not tensors or not tensors[0].is_floating_point():
                return method(group, *arguments, **keywords)
            if OPERATIONS[name] not in IN_PLACE:
                with torch.no_grad():
                    for tensor in _tensors(arguments[0]):
                        tensor.fill_(PLACEHOLDER)
            future: torch.futures.Future = torch.futures.Future()
            future.set_result(list(_tensors(arguments[0])))
            return c10d._create_work_from_future(future)  # type: ignore[attr-defined]

        return call

    with _replaced(replace):
        yield


def count(calls: Sequence[Call]) -> dict[str, dict[str, int]]:
    """Return the number and bytes of the calls by operation."""
    found: dict[str, dict[str, int]] = {}
    for call in calls:
        entry = found.setdefault(call.operation, {"calls": 0, "bytes": 0})
        entry["calls"] += 1
        entry["bytes"] += call.num_bytes
    return found


def run_alone(calls: Sequence[Call]) -> dict[str, float]:
    """Repeat the calls without the code between them; a collective over the ranks that made them.

    Returns:
        Seconds by operation. Sends between two ranks are left out: without their code they may wait for one another.
    """
    seconds: dict[str, float] = {}
    for call in calls:
        if call.operation not in ("send", "receive"):
            begin = time.perf_counter()
            call.repeat()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[call.operation] = seconds.get(call.operation, 0.0) + time.perf_counter() - begin
    return seconds


@contextlib.contextmanager
def _replaced(replace: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    originals = {name: vars(ProcessGroup)[name] for name in OPERATIONS if name in vars(ProcessGroup)}
    try:
        for name in originals:
            setattr(ProcessGroup, name, replace(name, getattr(ProcessGroup, name)))
        yield
    finally:
        for name, descriptor in originals.items():  # what getattr returns would not bind to a group again
            setattr(ProcessGroup, name, descriptor)


@dataclass(frozen=True)
class _Description:
    """A tensor without its memory."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def _tensors(argument: Any) -> Iterator[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, list | tuple):
        for inner in argument:
            yield from _tensors(inner)


def _describe(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return _Description(argument.shape, argument.dtype, argument.device)
    return [_describe(inner) for inner in argument] if isinstance(argument, list | tuple) else argument


def _empty_like(argument: Any) -> Any:
    if isinstance(argument, _Description):
        return torch.zeros(argument.shape, dtype=argument.dtype, device=argument.device)
    return [_empty_like(inner) for inner in argument] if isinstance(argument, list) else argument
