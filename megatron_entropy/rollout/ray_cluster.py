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

import atexit
import concurrent.futures
import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

import psutil
import ray
from ray.exceptions import RayError, RayTaskError

from megatron_entropy.config.schema import RolloutConfig
from megatron_entropy.errors import Fault
from megatron_entropy.rollout.engine import EngineSpec

logger = logging.getLogger(__name__)

RAY_START_TIMEOUT = 120.0
"""Seconds Ray may take to start, before any engine is made."""

RAY_STOP_TIMEOUT = 30.0
"""Seconds Ray may take to stop before it is killed."""

Result = TypeVar("Result")


class RayCluster:
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
            what = f"the Ray cluster at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')} could not be concat_response_tokens"
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
            raise Fault(f"{what}: {one_line(error)}") from error

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
            dead = [f"{name} (pid {process.pid})" for name, process in self._head if is_dead(process)]
            if dead and not self._death:
                self._death = f"Ray's head process {dead[0]} has died"
        if self._death:
            raise Fault(f"{self._death}; the run cannot go on, resume it with --resume")

    def stop(self) -> None:
        """Stop Ray if this process has started it, dead or alive."""
        if not self.is_ours:
            return
        if any(name == "raylet" and is_dead(process) for name, process in self._head):
            return  # where Ray misses its raylet it may end this process: at the exit, once the fault has been told
        members = self._members()
        stopping = _in_thread(ray.shutdown)  # takes five seconds where gcs_server is dead
        concurrent.futures.wait([stopping], RAY_STOP_TIMEOUT)
        if not stopping.done():
            self._forget()
        kill_processes(members)  # without gcs_server raylet's agents outlive it by a minute
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
        kill_processes(self._members())
        self._is_over.set()

    def _members(self) -> list[psutil.Process]:
        return [member for _, process in self._head for member in process_family(process.pid)]


def start_ray(config: RolloutConfig, spec: EngineSpec) -> tuple[RayCluster, bool]:
    """Join the cluster named by RAY_ADDRESS, or start Ray on this machine.

    Returns:
        Ray, and whether the engines are kept off the trainer's GPUs.
    """
    started = RayCluster()
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


def is_dead(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def process_family(pid: int | None) -> list[psutil.Process]:
    """A process and its descendants: an engine and its workers."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill_processes(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def one_line(error: BaseException) -> str:
    """The last line of what Ray or vLLM says; Ray's long advice on how processes die is left out."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].split(" Some common causes include:")[0] if lines else type(error).__name__
