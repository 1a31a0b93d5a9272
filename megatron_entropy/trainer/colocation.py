"""The GPU memory that the actor and colocated engines use alternately (`rollout.colocate`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal, Protocol

from megatron_entropy.distributed import process_groups
from megatron_entropy.errors import EngineLost, Fault
from megatron_entropy.rollout.pool import EnginePool


class Offloadable(Protocol):
    """A model that can move its memory from the GPU to the host and back, as `actor.Actor` does."""

    def offload(self, *, keep_weights: bool = False) -> None:
        """Free the GPU memory, all of it or all but the weights."""
        ...

    def onload(self) -> None:
        """Restore what `offload` freed; nothing when nothing is offloaded."""
        ...


class EngineTurn:
    """A context in which colocated engines use the GPUs; outside it the memory belongs to the actor.

    Inside, memory changes hands in steps, because a weight sync needs the weights of both sides and the engines' KV
    cache fits only without the actor: `offload_actor(keep_weights=True)`, `wake("weights")`, sync, `offload_actor()`,
    `wake("kv_cache")`, generate. Engines that sleep lose their weights. Nothing happens when the engines are not
    colocated. Every method is a collective.
    """

    def __init__(self, actor: Offloadable, pool: EnginePool | None, *, is_colocated: bool) -> None:
        """Give the memory to the actor, which must be offloaded while the engines load.

        Args:
            pool: on rank 0 only.
        """
        self.is_colocated = is_colocated
        self._actor = actor
        self._pool = pool
        self.return_to_actor()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Give the memory back to the actor at the end, also after an error."""
        try:
            yield
        except BaseException:
            # The error may have occurred on this rank alone, so no collective is allowed here.
            if self.is_colocated:
                with contextlib.suppress(Fault):
                    if self._pool is not None:
                        self._sleep()
                self._actor.onload()
            raise
        self.return_to_actor()

    def wake(self, tag: Literal["weights", "kv_cache"]) -> tuple[int, ...]:
        """Allocate the engines' memory of one kind; returns the engines that were lost."""

        def wake_all() -> tuple[int, ...]:
            assert self._pool is not None
            try:
                for client in self._pool.clients():
                    client.wake(tag)
            except EngineLost as lost:
                return lost.indices
            return ()

        return process_groups.run_on_rank_zero(wake_all) if self.is_colocated else ()

    def offload_actor(self, *, keep_weights: bool = False) -> None:
        """Free the actor's GPU memory on all ranks, all of it or all but the weights."""
        if self.is_colocated:
            self._actor.offload(keep_weights=keep_weights)
            process_groups.barrier()

    def return_to_actor(self) -> None:
        """Free the engines' GPU memory and restore the actor's."""
        if self.is_colocated:
            process_groups.run_on_rank_zero(self._sleep)
            self._actor.onload()

    def _sleep(self) -> None:
        assert self._pool is not None
        self._pool.wait_ready()
        for client in self._pool.clients():
            with contextlib.suppress(EngineLost):  # the next call to the engine reports it
                client.sleep()
