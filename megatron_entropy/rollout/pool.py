"""The rollout engines as Ray actors, seen from trainer rank 0, the only rank that knows of them.

    pool = EnginePool(config.rollout, spec)      # returns at once; engines load while the trainer builds its model
    pool.wait_ready()
    push.push(version, pool.clients())           # other ranks: push.push(version, None)
    done, dead = pool.generate(requests, "step 3")

Engines die: killed, out of memory, by an error of their own, by hanging. Nothing that was finished before is lost, and
a request answered by another engine or a second time gets the same tokens, so the caller's loop is

    while missing:
        done, dead = pool.generate(missing, ...)
        if dead:
            pool.restart(dead)                   # EngineFault when one has died too often
            push.push(version, pool.clients())   # new engines have no weights; all are pushed to

and the same around a push: `WeightSync.push` raises `EngineLost` on rank 0, whose `indices` are for `restart`, and
then all ranks push again. Ray's own head processes are another matter: nothing works without them, and their death ends
the run in a `Fault` (`RayCluster`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import ray
from ray.actor import ActorProxy
from ray.exceptions import RayActorError, RayError, RayTaskError

from megatron_entropy.config.schema import RolloutConfig
from megatron_entropy.errors import ConfigError, EngineFault, EngineLost, Fault, UserError
from megatron_entropy.monitor.progress import GenerationProgress
from megatron_entropy.rollout.engine import Completion, EngineSpec, Progress, Request
from megatron_entropy.rollout.ray_cluster import RayCluster, kill_processes, one_line, process_family, start_ray
from megatron_entropy.rollout.vllm_engine import VllmEngine

logger = logging.getLogger(__name__)

Actor = ActorProxy[VllmEngine]

_SOURCE_ROOT = str(Path(__file__).resolve().parents[2])

START_TIMEOUT = 600.0
"""Seconds an engine may take to load its model."""


@dataclass
class _Slot:
    """One engine and its history; a restart puts a new actor into the slot."""

    actor: Actor
    client: EngineClient
    pid: int | None = None
    restarts: int = 0
    reason: str = ""


class EngineClient:
    """vLLM's weight-sync methods of one engine; each blocks until the engine has answered.

    Raises:
        EngineLost: when the engine is gone.
        Fault: when it is alive and could not do as told.
    """

    def __init__(self, index: int, actor: Actor, num_workers: int, ray_: RayCluster) -> None:
        self.index = index
        self.num_workers = num_workers
        self.has_weights = False
        self._actor = actor
        self._ray = ray_

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Join a transfer group."""
        self._call("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> None:
        """Make the model ready to take weights."""
        self.has_weights = False
        self._call("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> float:
        """Receive the weights; returns the seconds spent loading them."""
        return self._call("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Put the received weights to use."""
        self._call("finish_weight_update", weight_version)
        self.has_weights = True

    def sleep(self) -> None:
        """Free the GPU; the engine has no weights then."""
        self._call("sleep")

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Take memory for a part back."""
        self._call("wake", part)

    def weight_checksums(self) -> list[dict[str, int]]:
        """Checksum of every tensor that each of the engine's workers computes with, by vLLM's name for it; slow."""
        return self._call("weight_checksums")

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return self._ray.run(_ask, getattr(self._actor, method), *arguments)
        except RayTaskError as error:
            raise _cause(error) from error
        except RayError as error:
            raise EngineLost([self.index], one_line(error)) from error


class EnginePool:
    """`config.num_engines` engines, their restarts, and the spreading of requests over them.

    Args:
        config: the `rollout` table.
        spec: what every engine is built from.
        timeout: seconds an engine may stay silent while it generates before it counts as dead.
    """

    def __init__(self, config: RolloutConfig, spec: EngineSpec, *, timeout: float = 300.0) -> None:
        self._config = config
        self._spec = spec
        self._timeout = timeout
        self._threads = spec.threads or max(1, (os.cpu_count() or 1) // (2 * config.num_engines))
        self._ray, self._owns_gpus = start_ray(config, spec)
        self._slots = [_Slot(*self._create(index)) for index in range(config.num_engines)]

    @property
    def address(self) -> str:
        """This machine's address as the engines reach it."""
        return "127.0.0.1" if self._ray.is_ours else ray.util.get_node_ip_address()

    def backend(self, *, trainer_on_one_machine: bool) -> str:
        """What carries weights to the engines: `nccl`, `shared_memory` or `gloo`.

        Raises:
            ConfigError: for NCCL without GPUs, and for shared memory between machines.
        """
        setting = self._config.weight_transfer
        is_single_machine = trainer_on_one_machine and self._ray.is_ours
        if setting == "nccl" and self._spec.device == "cpu":
            raise ConfigError("rollout.weight_transfer='nccl' needs engines on GPUs; set it to 'auto'")
        if setting == "shared_memory" and not is_single_machine:
            raise ConfigError(
                "rollout.weight_transfer='shared_memory' needs all ranks and engines on one machine; set it to 'auto'"
            )
        if setting == "auto":
            return "nccl" if self._owns_gpus else "shared_memory" if is_single_machine else "gloo"
        return setting

    def wait_ready(self) -> None:
        """Block until every engine has loaded; one whose process dies meanwhile is restarted.

        Raises:
            EngineFault: when one could not be made, with the reason.
            UserError: when the reason is a mistake of the user's.
        """
        for index in range(len(self._slots)):
            while (slot := self._slots[index]).pid is None:
                try:
                    slot.pid = self._ray.run(_ask, slot.actor.ready, timeout=START_TIMEOUT)
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
        """Process of each engine, on the machine it runs on; waits until all are there."""
        self.wait_ready()
        return [slot.pid for slot in self._slots if slot.pid is not None]

    def clients(self) -> list[EngineClient]:
        """The weight-sync client of each engine; a restarted engine has a new one."""
        return [slot.client for slot in self._slots]

    def generate(self, requests: Sequence[Request], description: str) -> tuple[list[Completion], list[int]]:
        """Continue sequences; the engines must have had a push since they were made.

        Returns:
            The completions, in the order of `requests`, and the engines that died meanwhile. When none died there is
            a completion for every request, otherwise those of the dead engines may be missing.
        """
        self.wait_ready()
        for client in self.clients():
            assert client.has_weights, f"rollout engine {client.index} has had no weights pushed"
        order = {request.key: position for position, request in enumerate(requests)}
        assert len(order) == len(requests), "two requests have the same key"
        completions: list[Completion] = []
        dead: list[int] = []
        with GenerationProgress(description, len(requests)) as progress:
            for index, report in self._reports(_spread(requests, len(self._slots))):
                if isinstance(report, str):
                    dead.append(index)
                    self._slots[index].reason = report
                    logger.warning("rollout engine %d died: %s", index, report)
                else:
                    completions += report
                    progress.advance(len(report), sum(len(completion.tokens) for completion in report))
        return sorted(completions, key=lambda completion: order[completion.key]), sorted(dead)

    def restart(self, indices: Iterable[int]) -> None:
        """Replace engines by new ones, which have no weights.

        Raises:
            EngineFault: when one has been restarted `rollout.max_restarts` times already.
        """
        for index in sorted(set(indices)):
            slot = self._slots[index]
            self._kill(slot)
            if slot.restarts >= self._config.max_restarts:
                raise EngineFault(
                    f"rollout engine {index} died {slot.restarts + 1} times ({slot.reason or 'lost in a push'}); "
                    f"rollout.max_restarts={self._config.max_restarts} allows no more"
                )
            actor, client = self._create(index)
            self._slots[index] = _Slot(actor, client, restarts=slot.restarts + 1)
            allowed = self._config.max_restarts
            logger.warning("rollout engine %d is restarted (%d of %d times)", index, slot.restarts + 1, allowed)

    def shutdown(self) -> None:
        """Stop the engines, and Ray where this pool started it."""
        for slot in self._slots:
            self._kill(slot)
        self._slots = []
        self._ray.stop()

    def _create(self, index: int) -> tuple[Actor, EngineClient]:
        on_gpu = self._spec.device == "cuda"
        engine = ray.remote(VllmEngine).options(  # type: ignore[attr-defined]
            num_cpus=1,
            num_gpus=self._config.tensor_parallel if on_gpu else 0,
            max_restarts=0,
            max_task_retries=0,
            # Ray does not hand the driver's sys.path on; this lets a checkout work that is not installed.
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([_SOURCE_ROOT, os.environ.get("PYTHONPATH", "")])}},
        )
        actor = self._ray.run(engine.remote, self._spec, self._config, self._threads)
        return actor, EngineClient(index, actor, self._config.tensor_parallel, self._ray)

    def _kill(self, slot: _Slot) -> None:
        here = slot.pid is not None and self._ray.is_ours
        processes = process_family(slot.pid) if here else []
        with contextlib.suppress(Fault):  # without Ray's head there is nobody to ask; engines end with the raylet
            self._ray.run(ray.kill, cast(Any, slot.actor))
        kill_processes(processes)  # a stopped process does not hear Ray, nor that its parent is gone

    def _reports(self, shares: list[list[Request]]) -> Iterator[tuple[int, list[Completion] | str]]:
        """What the engines answer, as it comes: completions, or why an engine is taken for dead."""
        streams: dict[Any, int] = {
            self._ray.run(self._slots[index].actor.generate_stream.remote, share): index
            for index, share in enumerate(shares)
            if share
        }
        heard = {index: time.monotonic() for index in streams.values()}
        while streams:
            ready, _ = self._ray.run(ray.wait, list(streams), num_returns=1, timeout=1.0, fetch_local=False)
            for stream in ready:
                index = streams[stream]
                heard[index] = time.monotonic()
                try:
                    report: Progress = self._ray.run(_next, stream)
                    yield index, report.completions
                except StopIteration:
                    del streams[stream]
                except RayError as error:
                    del streams[stream]
                    yield index, one_line(_cause(error))
            for stream, index in list(streams.items()):
                if time.monotonic() - heard[index] > self._timeout:
                    del streams[stream]
                    yield index, f"silent for {self._timeout:.0f} s"


def _ask(method: Any, *arguments: Any, timeout: float | None = None) -> Any:
    """What an actor's method returns."""
    return ray.get(method.remote(*arguments), timeout=timeout)


def _next(stream: Any) -> Any:
    """The next item that a generator of an actor's yields."""
    return ray.get(next(stream))


def _spread(requests: Sequence[Request], num_engines: int) -> list[list[Request]]:
    """Requests for each engine: the longest first, each to the engine with the least to do."""
    shares: list[list[Request]] = [[] for _ in range(num_engines)]
    load = [0] * num_engines
    for request in sorted(requests, key=lambda request: -(len(request.tokens) + request.max_tokens)):
        index = load.index(min(load))
        shares[index].append(request)
        load[index] += len(request.tokens) + request.max_tokens
    return shares


def _cause(error: BaseException) -> BaseException:
    """What an engine raised, out of Ray's wrapping; ours as they are, others as a one-line `Fault`."""
    inner = getattr(error, "cause", None)
    if isinstance(inner, Fault | UserError):
        return inner
    return Fault(one_line(error if inner is None else inner))
