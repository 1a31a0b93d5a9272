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

and the same around a push: `WeightPush.push` raises `EngineLost` on rank 0, whose `indices` are for `restart`, and
then all ranks push again. Ray's own head processes are another matter: nothing works without them, and their death ends
the run in a `Fault` (`_Ray`).
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import psutil
import ray
from ray.actor import ActorProxy
from ray.exceptions import RayActorError, RayError, RayTaskError

from megatron_entropy.config import RolloutConfig
from megatron_entropy.errors import ConfigError, EngineFault, Fault, UserError
from megatron_entropy.rollout.engine import Completion, EngineSpec, Progress, Request
from megatron_entropy.rollout.progress import RolloutProgress
from megatron_entropy.rollout.vllm_engine import VllmEngine
from megatron_entropy.transport import EngineLost

logger = logging.getLogger(__name__)

Actor = ActorProxy[VllmEngine]

_SOURCE_ROOT = str(Path(__file__).resolve().parents[2])

START_TIMEOUT = 600.0
"""Seconds an engine may take to load its model."""
RAY_START_TIMEOUT = 120.0
"""Seconds Ray may take to start, before any engine is made."""
RAY_STOP_TIMEOUT = 30.0
"""Seconds Ray may take to stop before it is killed."""

Result = TypeVar("Result")


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

    def __init__(self, index: int, actor: Actor, num_workers: int, ray_: _Ray) -> None:
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
            raise EngineLost([self.index], _one_line(error)) from error


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
        self._ray, self._owns_gpus = _start_ray(config, spec)
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
        on_one_machine = trainer_on_one_machine and self._ray.is_ours
        if setting == "nccl" and self._spec.device == "cpu":
            raise ConfigError("rollout.weight_transfer='nccl' needs engines on GPUs; set it to 'auto'")
        if setting == "shared_memory" and not on_one_machine:
            raise ConfigError(
                "rollout.weight_transfer='shared_memory' needs all ranks and engines on one machine; set it to 'auto'"
            )
        if setting == "auto":
            return "nccl" if self._owns_gpus else "shared_memory" if on_one_machine else "gloo"
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
                        raise EngineFault(f"rollout engine {index} could not start: {_one_line(cause)}") from error
                    slot.reason = _one_line(cause)
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
        with RolloutProgress(description, len(requests)) as progress:
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
        processes = _family(slot.pid) if here else []
        with contextlib.suppress(Fault):  # without Ray's head there is nobody to ask; engines end with the raylet
            self._ray.run(ray.kill, cast(Any, slot.actor))
        _kill(processes)  # a stopped process does not hear Ray, nor that its parent is gone

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
                    yield index, _one_line(_cause(error))
            for stream, index in list(streams.items()):
                if time.monotonic() - heard[index] > self._timeout:
                    del streams[stream]
                    yield index, f"silent for {self._timeout:.0f} s"


class _Ray:
    """Ray: started by this process, or another's cluster. Whatever may wait for Ray is done through `run`.

    Ray's head are two processes, gcs_server and raylet. Once one is dead some of Ray's calls wait for ever, and others
    end this process after a minute without a word. So they are watched where they are children of this process.
    """

    def __init__(self) -> None:
        self.is_ours = False
        self._head: list[tuple[str, psutil.Process]] = []
        self._strangers: set[int] = set()
        self._death = ""
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        if ray.is_initialized():
            self._watch()

    def start(self, **options: Any) -> None:
        """`ray.init`, also with the `address` of another's cluster.

        Raises:
            Fault: when it fails or does not come to an end.
        """
        self.is_ours = "address" not in options
        self._strangers = {process.pid for process in psutil.Process().children()}
        what = "Ray could not be started"
        if not self.is_ours:
            what = f"the Ray cluster at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')} could not be joined"
        options |= {"log_to_driver": False, "logging_level": logging.ERROR}
        deadline = time.monotonic() + RAY_START_TIMEOUT
        # Linux ends Ray's processes with the thread that started them, so it stays.
        starting = _in_thread(functools.partial(ray.init, **options), stay=self._is_over)
        try:
            while not starting.done():
                concurrent.futures.wait([starting], 0.1)
                self._watch()
                self.check()
                if time.monotonic() > deadline:
                    raise Fault(f"{what} within {RAY_START_TIMEOUT:.0f} s")
            starting.result()
        except BaseException as error:
            self._forget()
            if isinstance(error, Fault) or not isinstance(error, Exception):
                raise
            raise Fault(f"{what}: {_one_line(error)}") from error

    def run(self, function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
        """What `function` returns or raises.

        Raises:
            Fault: as soon as a watched process is dead.
        """
        self.check()
        working = _in_thread(functools.partial(function, *arguments, **options))
        while not working.done():
            concurrent.futures.wait([working], 0.5)
            self.check()
        error = working.exception()
        if isinstance(error, RayError | OSError) and not isinstance(error, RayTaskError):
            time.sleep(0.2)  # a process's connections break a moment before it is seen to be dead
            self.check()
        return working.result()

    def check(self) -> None:
        """Raise a `Fault` if a watched process is dead."""
        with self._lock:
            dead = [f"{name} (pid {process.pid})" for name, process in self._head if _is_dead(process)]
            if dead and not self._death:
                self._death = f"Ray's head process {dead[0]} has died"
        if self._death:
            raise Fault(f"{self._death}; the run cannot go on, resume it with --resume")

    def stop(self) -> None:
        """Stop Ray if this process has started it, dead or alive."""
        if not self.is_ours:
            return
        if any(name == "raylet" and _is_dead(process) for name, process in self._head):
            return  # where Ray misses its raylet it may end this process: at the exit, once the fault has been told
        members = self._members()
        stopping = _in_thread(ray.shutdown)  # takes five seconds where gcs_server is dead
        concurrent.futures.wait([stopping], RAY_STOP_TIMEOUT)
        if not stopping.done():
            self._forget()
        _kill(members)  # without gcs_server raylet's agents outlive it by a minute
        self._is_over.set()

    def _watch(self) -> None:
        """Find the head among this process's children."""
        known = self._strangers | {process.pid for _, process in self._head}
        for process in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.pid not in known and process.name() in ("gcs_server", "raylet"):
                    self._head.append((process.name(), process))

    def _forget(self) -> None:
        """End Ray, and the engines, which are raylet's children, without its help; do not ask it at the exit either."""
        atexit.unregister(ray.shutdown)
        _kill(self._members())
        self._is_over.set()

    def _members(self) -> list[psutil.Process]:
        return [member for _, process in self._head for member in _family(process.pid)]


def _start_ray(config: RolloutConfig, spec: EngineSpec) -> tuple[_Ray, bool]:
    """Join the cluster named by RAY_ADDRESS, or start Ray on this machine.

    Returns:
        Ray, and whether the engines are kept off the trainer's GPUs.
    """
    started = _Ray()
    if ray.is_initialized():
        return started, False
    if os.environ.get("RAY_ADDRESS"):
        started.start(address="auto")
        return started, False
    own = _gpus_beside_the_trainer(config) if spec.device == "cuda" and not config.colocate else []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        if own:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        # Otherwise Ray ends this process a minute after gcs_server's death, in the middle of a long step.
        patience = {"gcs_rpc_server_reconnect_timeout_s": 10**6}
        started.start(num_cpus=config.num_engines + 1, include_dashboard=False, _system_config=patience)
    finally:
        if own and visible is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        elif own and visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
    return started, bool(own)


def _gpus_beside_the_trainer(config: RolloutConfig) -> list[str]:
    """This machine's GPUs that no trainer rank uses, if there are enough for the engines; else none: they share."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    left = gpus[int(os.environ.get("LOCAL_WORLD_SIZE", "1")) :]
    if len(left) >= config.num_engines * config.tensor_parallel:
        return left
    logger.warning("rollout engines share the trainer's GPUs: too few are left beside them")
    return []


def _in_thread(work: Callable[[], Result], *, stay: threading.Event | None = None) -> Future[Result]:
    """What `work()` will return, in a thread that keeps nobody from exiting; after a success it may `stay` on."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)
        else:
            if stay is not None:
                stay.wait()

    threading.Thread(target=run, daemon=True, name="ray").start()
    return future


def _ask(method: Any, *arguments: Any, timeout: float | None = None) -> Any:
    """What an actor's method returns."""
    return ray.get(method.remote(*arguments), timeout=timeout)


def _next(stream: Any) -> Any:
    """The next item that a generator of an actor's yields."""
    return ray.get(next(stream))


def _is_dead(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _family(pid: int | None) -> list[psutil.Process]:
    """A process and its descendants: an engine and its workers."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


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
    return Fault(_one_line(error if inner is None else inner))


def _one_line(error: BaseException) -> str:
    """The last line of what Ray or vLLM says; Ray's long advice on how processes die is left out."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].split(" Some common causes include:")[0] if lines else type(error).__name__
