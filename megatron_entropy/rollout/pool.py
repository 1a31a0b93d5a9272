"""The rollout engines as Ray actors. Only rank 0 of the trainer has a pool.

    pool = EnginePool(config.rollout, spec)            # returns at once; the engines load in the background
    pool.wait_ready()
    weight_sync.sync(version, pool.clients())          # other ranks: weight_sync.sync(version, None)
    completions, dead = pool.generate(requests, "step 3")

An engine can be killed, run out of memory, fail or hang. Its finished completions are kept, and another engine answers
the remaining requests with the same tokens. The caller repeats (as `trainer.rollout_service.RolloutService` does):

    while missing:
        completions, dead = pool.generate(missing, ...)
        if dead:
            pool.restart(dead)                         # EngineFault when one has died too often
            weight_sync.sync(version, pool.clients())  # new engines have no weights; every engine gets them

`WeightSync.sync` raises `EngineLost` on rank 0 when an engine dies: restart its `indices` and sync again. The death of
one of Ray's head processes ends the run in a `Fault` (see `RayCluster`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import ray
from ray.actor import ActorProxy
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from megatron_entropy.config.schema import RolloutConfig
from megatron_entropy.errors import ConfigError, EngineDied, EngineFault, EngineLost, Fault, UserError
from megatron_entropy.monitor.progress import GenerationProgress
from megatron_entropy.rollout import placement
from megatron_entropy.rollout.engine import Completion, EngineSpec, GenerationUpdate, Request
from megatron_entropy.rollout.ray_cluster import RayCluster, kill_processes, one_line, process_family, start_ray
from megatron_entropy.rollout.vllm_engine import VllmEngine
from megatron_entropy.weights.links import CUDA_IPC, IN_MEMORY

logger = logging.getLogger(__name__)

EngineActor = ActorProxy[VllmEngine]

_SOURCE_ROOT = str(Path(__file__).resolve().parents[2])

START_TIMEOUT = 600.0
"""Seconds an engine may take to load its model."""


@dataclass
class _Slot:
    """One engine and its history; a restart puts a new engine into the slot."""

    actor: EngineActor
    client: EngineClient
    pid: int | None = None
    restarts: int = 0
    reason: str = ""


class EngineClient:
    """vLLM's weight-transfer methods of one engine; each blocks until the engine is done.

    Raises:
        EngineLost: when the engine is dead.
        Fault: when the engine is alive and failed.
    """

    def __init__(self, index: int, actor: EngineActor, num_workers: int, ray_: RayCluster) -> None:
        self.index = index
        self.num_workers = num_workers
        self.has_weights = False
        self._actor = actor
        self._ray = ray_

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Join a transfer group."""
        self._call("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> None:
        """Prepare the model for new weights."""
        self.has_weights = False
        self._call("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> float:
        """Receive all weights; returns the seconds spent loading them into the model."""
        return self._call("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Use the received weights from now on."""
        self._call("finish_weight_update", weight_version)
        self.has_weights = True

    def sleep(self) -> None:
        """Free the GPU memory; the engine has no weights then."""
        self._call("sleep")

    def wake(self, tag: Literal["weights", "kv_cache"]) -> None:
        """Allocate memory of one kind again."""
        self._call("wake", tag)

    def weight_checksums(self) -> list[dict[str, int]]:
        """Compute the checksum of every tensor that each worker uses, by vLLM's name of it; slow."""
        return self._call("weight_checksums")

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return self._ray.run(_call, getattr(self._actor, method), *arguments)
        except RayTaskError as error:
            cause = _cause(error)
            if isinstance(cause, EngineDied):
                raise EngineLost([self.index], str(cause)) from error
            raise cause from error
        except RayError as error:
            raise EngineLost([self.index], one_line(error)) from error


class EnginePool:
    """`config.num_engines` engines: starts them, distributes requests among them, restarts them.

    Args:
        config: the `rollout` table.
        spec: what every engine is built from.
        trainer: the GPUs of its ranks.
        timeout: seconds without an update of a generating engine after which it counts as dead.
    """

    def __init__(
        self,
        config: RolloutConfig,
        spec: EngineSpec,
        *,
        trainer: Sequence[placement.TrainerGpu] = (),
        timeout: float = 300.0,
    ) -> None:
        self._config = config
        self._spec = spec
        self._timeout = timeout
        self._threads = spec.threads or max(1, (os.cpu_count() or 1) // (2 * config.num_engines))
        self._ray, self._owns_gpus = start_ray(config, spec, trainer)
        self._slots = [_Slot(*self._create(index)) for index in range(config.num_engines)]

    @property
    def address(self) -> str:
        """Address of this machine for the engines."""
        return "127.0.0.1" if self._ray.is_ours else ray.util.get_node_ip_address()

    def backend(self, *, trainer_on_one_machine: bool) -> str:
        """Choose the backend of the weight sync: `nccl`, `shared_memory`, `cuda_ipc` or `gloo`.

        Raises:
            ConfigError: for NCCL or CUDA IPC without GPUs, and for shared memory or CUDA IPC between machines.
        """
        setting = self._config.weight_transfer
        is_single_machine = trainer_on_one_machine and self._ray.is_ours
        if setting in ("nccl", CUDA_IPC) and self._spec.device == "cpu":
            raise ConfigError(f"rollout.weight_transfer='{setting}' needs engines on GPUs; set it to 'auto'")
        if setting in IN_MEMORY and not is_single_machine:
            raise ConfigError(
                f"rollout.weight_transfer='{setting}' needs all ranks and engines on one machine; set it to 'auto'"
            )
        if setting == "auto":
            return "nccl" if self._owns_gpus else "shared_memory" if is_single_machine else "gloo"
        return setting

    def wait_ready(self) -> None:
        """Block until every engine has loaded; an engine that dies meanwhile is restarted.

        Raises:
            EngineFault: when an engine could not start, with the reason.
            UserError: when the reason is a mistake of the user.
        """
        for index in range(len(self._slots)):
            while (slot := self._slots[index]).pid is None:
                try:
                    slot.pid = self._ray.run(_call, slot.actor.ready, timeout=START_TIMEOUT)
                except GetTimeoutError as error:
                    raise EngineFault(
                        f"rollout engine {index} has not loaded within {START_TIMEOUT:.0f} s; see that the Ray cluster "
                        "has room for it (ray status)"
                    ) from error
                except RayError as error:
                    cause = _cause(error)
                    if isinstance(cause, UserError):
                        raise cause from None
                    if not isinstance(error, RayActorError) or error.actor_init_failed:
                        raise EngineFault(f"rollout engine {index} could not start: {one_line(cause)}") from error
                    slot.reason = one_line(cause)
                    self.restart([index])

    @property
    def pids(self) -> list[int]:
        """Process id of each engine, on the machine it runs on; waits until all have loaded."""
        self.wait_ready()
        return [slot.pid for slot in self._slots if slot.pid is not None]

    def clients(self) -> list[EngineClient]:
        """Return the client of each engine; a restarted engine has a new one."""
        return [slot.client for slot in self._slots]

    def generate(
        self,
        requests: Sequence[Request],
        description: str,
        on_finished: Callable[[Sequence[Completion]], None] | None = None,
    ) -> tuple[list[Completion], list[int]]:
        """Continue sequences; every engine must have received weights.

        Args:
            requests: with different keys.
            description: for the progress bar and the log.
            on_finished: called with the completions that have just finished, often with none; must return quickly.
        Returns:
            The completions, in the order of `requests`, and the indices of engines that died. If none died there is a
            completion for every request, otherwise those of the dead engines may be missing.
        """
        self.wait_ready()
        for client in self.clients():
            assert client.has_weights, f"rollout engine {client.index} has received no weights"
        order = {request.key: position for position, request in enumerate(requests)}
        assert len(order) == len(requests), "two requests have the same key"
        completions: list[Completion] = []
        dead: list[int] = []
        with GenerationProgress(description, len(requests)) as progress:
            for index, update in self._updates(_distribute(requests, len(self._slots))):
                if isinstance(update, str):
                    dead.append(index)
                    self._slots[index].reason = update
                    logger.warning("rollout engine %d died: %s", index, update)
                else:
                    completions += update
                    progress.advance(len(update), sum(len(completion.tokens) for completion in update))
                    if on_finished is not None:
                        on_finished(update)
        return sorted(completions, key=lambda completion: order[completion.key]), sorted(dead)

    def restart(self, indices: Iterable[int]) -> None:
        """Replace engines by new ones, which have no weights.

        Raises:
            EngineFault: when one was already restarted `rollout.max_restarts` times.
        """
        for index in sorted(set(indices)):
            slot = self._slots[index]
            self._kill(slot)
            if slot.restarts >= self._config.max_restarts:
                raise EngineFault(
                    f"rollout engine {index} died {slot.restarts + 1} times "
                    f"({slot.reason or 'lost in a weight sync'}); "
                    f"rollout.max_restarts={self._config.max_restarts} allows no more"
                )
            actor, client = self._create(index)
            self._slots[index] = _Slot(actor, client, restarts=slot.restarts + 1)
            allowed = self._config.max_restarts
            logger.warning("rollout engine %d is restarted (%d of %d times)", index, slot.restarts + 1, allowed)

    def shutdown(self) -> None:
        """Stop the engines, and Ray if this pool started it."""
        if not self._ray.is_ours:  # otherwise they end with Ray, which would report each kill
            for slot in self._slots:
                self._kill(slot)
        self._slots = []
        self._ray.stop()

    def _create(self, index: int) -> tuple[EngineActor, EngineClient]:
        on_gpu = self._spec.device == "cuda"
        engine = ray.remote(VllmEngine).options(  # type: ignore[attr-defined]
            num_cpus=1,
            num_gpus=self._config.tensor_parallel if on_gpu else 0,
            max_restarts=0,
            max_task_retries=0,
            label_selector=None if self._ray.is_ours else self._ray.run(placement.selector, self._config.nodes),
            # Ray does not pass the driver's sys.path on; with this a checkout works without installation.
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([_SOURCE_ROOT, os.environ.get("PYTHONPATH", "")])}},
        )
        actor = self._ray.run(engine.remote, self._spec, self._config, self._threads)
        return actor, EngineClient(index, actor, self._config.tensor_parallel, self._ray)

    def _kill(self, slot: _Slot) -> None:
        here = slot.pid is not None and self._ray.is_ours
        processes = process_family(slot.pid) if here else []
        with contextlib.suppress(Fault):  # without Ray's head nobody can be called; engines end with the raylet
            self._ray.run(ray.kill, cast(Any, slot.actor))
        kill_processes(processes)  # a suspended process does not react to Ray, nor to the end of its parent

    def _updates(self, shards: list[list[Request]]) -> Iterator[tuple[int, list[Completion] | str]]:
        """Yield completions of an engine as they finish, or the reason why it counts as dead."""
        streams: dict[Any, int] = {
            self._ray.run(self._slots[index].actor.generate_stream.remote, shard): index
            for index, shard in enumerate(shards)
            if shard
        }
        last_update = {index: time.monotonic() for index in streams.values()}
        while streams:
            ready, _ = self._ray.run(ray.wait, list(streams), num_returns=1, timeout=1.0, fetch_local=False)
            for stream in ready:
                index = streams[stream]
                last_update[index] = time.monotonic()
                try:
                    update: GenerationUpdate = self._ray.run(_next, stream)
                    yield index, update.completions
                except StopIteration:
                    del streams[stream]
                except RayError as error:
                    del streams[stream]
                    yield index, one_line(_cause(error))
            for stream, index in list(streams.items()):
                if time.monotonic() - last_update[index] > self._timeout:
                    del streams[stream]
                    yield index, f"no update for {self._timeout:.0f} s"


def _call(method: Any, *arguments: Any, timeout: float | None = None) -> Any:
    """Call a method of a Ray actor and wait for the result."""
    return ray.get(method.remote(*arguments), timeout=timeout)


def _next(stream: Any) -> Any:
    """Wait for the next item of a generator of a Ray actor."""
    return ray.get(next(stream))


def _distribute(requests: Sequence[Request], num_engines: int) -> list[list[Request]]:
    """Distribute requests among the engines: the longest first, each to the engine with the least load."""
    shards: list[list[Request]] = [[] for _ in range(num_engines)]
    load = [0] * num_engines
    for request in sorted(requests, key=lambda request: -(len(request.tokens) + request.max_tokens)):
        index = load.index(min(load))
        shards[index].append(request)
        load[index] += len(request.tokens) + request.max_tokens
    return shards


def _cause(error: BaseException) -> BaseException:
    """Unwrap an engine's error from Ray's: our own errors as they are, others as a one-line `Fault`."""
    inner = getattr(error, "cause", None)
    if isinstance(inner, Fault | UserError):
        return inner
    return Fault(one_line(error if inner is None else inner))
