"""One rank's files of a sharded checkpoint: planned with the other ranks, copied, then written without them.

Megatron's `dist_checkpointing` decides which rank writes which tensor into which file. Its own asynchronous writers
are processes, which cost a start or 280 MB each and outlive a rank that is killed (or, forked, keep its connections
open, so that the other ranks wait for it forever). Here the plan is Megatron's and the writing is a plain function
for a thread: it ends with its rank, and it releases the interpreter to training while it writes.
"""

from __future__ import annotations

import inspect
import queue
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_entropy.errors import Fault
from megatron_entropy.files import fsync_path
from megatron_entropy.weights.manifest import FileRecord


@dataclass(frozen=True)
class Written:
    """Files of one rank by name, and the locations of its tensors in them, for Megatron's index."""

    files: dict[str, FileRecord]
    results: list[Any]


class Snapshot:
    """A rank's tensors at the time of construction.

    Args:
        tensors: `sharded_state` of the actor.
        folder: of Megatron's files; exists and is empty.
        copy: copy the tensors to separate memory, so that training can continue before they are written.
    """

    def __init__(self, tensors: dict[str, Any], folder: Path, *, copy: bool) -> None:
        """Plan and copy; a collective."""
        plan = _Plan()
        dist_checkpointing.save(tensors, str(folder), sharded_strategy=plan)
        self._writer, self._index = plan.writer, plan.index
        self._buckets = [
            (path, name, (data, [(item, tensor.detach().to("cpu", copy=copy)) for item, tensor in items]))
            for path, name, (data, items) in self._writer.write_buckets or []
        ]
        self._writer.write_buckets = None

    def write(self) -> Written:
        """Write this rank's files, fsync them and read them back for their checksums; no collective.

        Raises:
            Fault: a tensor holds NaN or infinity.
            OSError: the disk is full, for instance. An error of torch may have it as context instead.
        """
        written = Written({}, [])
        transforms = [self._writer.transforms] if hasattr(self._writer, "transforms") else []
        for number, bucket in enumerate(self._buckets):
            for item, tensor in bucket[2][1]:
                if not bool(tensor.isfinite().all()):
                    raise Fault(f"tensor {item.index.fqn} holds values that are not finite")
            outcomes: Any = queue.SimpleQueue()
            pending: Any = queue.Queue()
            pending.put(number)
            FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, outcomes, pending, use_fsync=False)
            _, outcome = outcomes.get()
            if isinstance(outcome, Exception):
                raise outcome
            path = Path(bucket[0])
            fsync_path(path)  # Megatron's fsync comes before the last buffer is flushed
            written.files[bucket[1]] = FileRecord.of(path)
            written.results.extend(outcome)
        self._buckets = []
        return written

    def write_index(self, written: list[Written]) -> None:
        """Write Megatron's index of all ranks' tensors; on rank 0, after all ranks have written."""
        self._writer.finish(self._index, [rank.results for rank in written])


class _Plan(TorchDistSaveShardedStrategy):
    """Megatron's strategy, stopped after planning: one file per rank, nothing written, no queue, no process."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        """Plan; a collective. Data-parallel ranks share the tensors of which each has a copy, by size."""
        replicas: Any = parallel_state.get_data_parallel_group(with_context_parallel=True)
        shared = determine_main_replica_uniform_distribution(sharded_state_dict, replicas)
        distribute_main_replicas_with_precomputed_distribution(sharded_state_dict, replicas, shared)
        filesystem_async._results_queue = queue.SimpleQueue()  # or Megatron starts a process for one
        newer = "async_strategy" in inspect.signature(self.async_save).parameters  # megatron-core 0.17 and later
        self.async_save(sharded_state_dict, checkpoint_dir, **({"async_strategy": "mcore"} if newer else {}))

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *unused: Any) -> Any:
        self.writer, self.index, _ = planned
        return None
