"""Syncs from several ranks to receivers that come and go, without engines.

Proves: over every link each rank's rows arrive, also after the set of engines has changed (new memory may have the old
path), and after an engine was lost in the middle of a sync, which leaves no rank waiting. Not proved here: what vLLM
does with the tensors (tests/engines/test_resharding.py).
"""

from __future__ import annotations

from typing import Any

import host_ipc
import local_ranks
import pytest
import torch
import torch.distributed as dist

from megatron_entropy.distributed import process_groups
from megatron_entropy.errors import EngineLost
from megatron_entropy.weights.buckets import TensorMeta
from megatron_entropy.weights.links import LinkInfo
from megatron_entropy.weights.sync import WeightSync
from megatron_entropy.weights.transport import Receiver

RANKS = 2
NAMES = ("first", "second", "third")
SHAPE = (6, 50)


class Source:
    """Three tensors; rank r holds their rows r, r + 2, ... and writes its version of them."""

    gather_seconds = 0.0

    def __init__(self) -> None:
        self.version = 0

    def metadata(self) -> list[TensorMeta]:
        return [TensorMeta(name, torch.float32, SHAPE) for name in NAMES]

    def read(self, number: int, first: int, count: int, out: torch.Tensor | None, *, in_place: bool) -> None:
        for row in range(first, first + count):
            holder = row % RANKS
            values = expected(number, self.version)[row]
            if in_place or holder == process_groups.rank() == 0:
                assert out is not None
                if holder == process_groups.rank():
                    out[row - first] = values
            elif holder == process_groups.rank():
                dist.send(values, 0)
            elif process_groups.rank() == 0:
                assert out is not None
                dist.recv(out[row - first], holder)


def expected(number: int, version: int) -> torch.Tensor:
    return torch.arange(300.0).view(SHAPE) + 1000 * number + 10_000 * version


class Engine:
    """A receiver in this process that replaces an engine."""

    num_workers = 1

    def __init__(self, index: int, *, dies: bool = False) -> None:
        self.index = index
        self.got: dict[str, torch.Tensor] = {}
        self._dies = dies
        self._receiver: Receiver | None = None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._receiver = Receiver(LinkInfo(**init_info), init_info["rank_offset"])

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: dict[str, Any]) -> float:
        assert self._receiver is not None
        if self._dies:
            self._receiver.close()
            raise EngineLost([self.index], "killed")
        self._receiver.receive([TensorMeta(name, torch.float32, SHAPE) for name in NAMES], self.got.update)
        return 0.0

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        pass


def sync_to_changing_engines(backend: str) -> list[tuple[int, dict[str, list]]]:
    """Run on every rank; returns version and tensors of each engine after each sync, on rank 0."""
    host_ipc.install()  # for "cuda_ipc"
    source = Source()
    weight_sync = WeightSync(source, bucket_bytes=800, checksum=True, timeout=20, backend=backend)
    seen = []
    for engines in ([Engine(0)], [Engine(0), Engine(1)], [Engine(0, dies=True), Engine(1)], [Engine(0), Engine(1)]):
        for _ in range(2):  # the second sync uses the link of the first
            source.version += 1
            try:
                weight_sync.sync(source.version, engines if process_groups.rank() == 0 else None)
            except EngineLost:
                continue
            seen += [(source.version, {name: tensor.tolist() for name, tensor in e.got.items()}) for e in engines]
    weight_sync.close()
    return seen


@pytest.mark.parametrize("backend", ["gloo", "shared_memory", "cuda_ipc"])
def test_every_rank_reaches_every_engine(backend: str) -> None:
    seen = local_ranks.run_on_ranks(sync_to_changing_engines, RANKS, backend, timeout_s=120)[0]
    assert [version for version, _ in seen] == [1, 2, 3, 3, 4, 4, 7, 7, 8, 8]
    for version, got in seen:
        assert got == {name: expected(number, version).tolist() for number, name in enumerate(NAMES)}
