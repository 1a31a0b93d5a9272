"""Ray: started or joined, and watched, so that the death of its head ends the run with a clear error."""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import functools
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import psutil
import ray
from ray.exceptions import RayError, RayTaskError

from megatron_entropy.config.schema import RolloutConfig
from megatron_entropy.errors import Fault
from megatron_entropy.rollout import placement, ray_join
from megatron_entropy.rollout.engine import EngineSpec

logger = logging.getLogger(__name__)

RAY_START_TIMEOUT = 120.0
"""Seconds until Ray has started, without engines."""

TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""With one of them the user chooses how Ray authenticates its processes."""

RAY_STOP_TIMEOUT = 30.0
"""Seconds until Ray has stopped; then it is killed."""

Result = TypeVar("Result")


class RayCluster:
    """The Ray cluster: started by this process, or an existing one. Call blocking functions of Ray through `run`.

    Ray's head consists of two processes, gcs_server and raylet. After the death of one some calls of Ray block for
    ever, and others end this process after a minute without a message. So the head is watched if this process
    started it. `held`: actors that keep the trainer's GPUs in a joined cluster.
    """

    def __init__(self) -> None:
        self.is_ours = False
        self._head: list[tuple[str, psutil.Process]] = []
        self._other_children: set[int] = set()
        self.held: list[Any] = []
        self._death = ""
        self._lock = threading.Lock()
        self._is_stopped = threading.Event()
        if ray.is_initialized():
            self._watch()

    def start(self, **options: Any) -> None:
        """Call `ray.init`; with `address` it joins an existing cluster.

        Raises:
            Fault: when it fails or takes too long.
        """
        self.is_ours = "address" not in options
        self._other_children = {process.pid for process in psutil.Process().children()}
        failure = "Ray could not be started"
        if not self.is_ours:
            failure = f"the Ray cluster at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')} could not be joined"
        options |= {"log_to_driver": False, "logging_level": logging.ERROR}
        deadline = time.monotonic() + RAY_START_TIMEOUT
        # Linux ends Ray's processes together with the thread that started them, so the thread stays alive.
        starting = _in_thread(functools.partial(ray.init, **options), keep_alive_until=self._is_stopped)
        try:
            while not starting.done():
                concurrent.futures.wait([starting], 0.1)
                self._watch()
                self.check()
                if time.monotonic() > deadline:
                    raise TimeoutError(f"nothing within {RAY_START_TIMEOUT:.0f} s")
            starting.result()
        except BaseException as error:
            self._kill()
            if isinstance(error, Fault) or not isinstance(error, Exception):
                raise
            problem = "" if self.is_ours else ray_join.find_problem(os.environ.get("RAY_ADDRESS", ""))
            raise Fault(f"{failure}: {problem or one_line(error)}") from error

    def run(self, function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
        """Call a function that may wait for Ray; returns or raises what it does.

        Raises:
            Fault: as soon as a process of Ray's head is dead.
        """
        self.check()
        working = _in_thread(functools.partial(function, *arguments, **options))
        while not working.done():
            concurrent.futures.wait([working], 0.5)
            self.check()
        error = working.exception()
        if isinstance(error, RayError | OSError) and not isinstance(error, RayTaskError):
            time.sleep(0.2)  # connections of a process break a moment before its death is visible
            self.check()
        return working.result()

    def check(self) -> None:
        """Raise a `Fault` if a process of Ray's head is dead."""
        with self._lock:
            dead = [f"{name} (pid {process.pid})" for name, process in self._head if is_dead(process)]
            if dead and not self._death:
                self._death = f"Ray's head process {dead[0]} has died"
        if self._death:
            raise Fault(f"{self._death}; the run cannot go on, resume it with --resume")

    def stop(self) -> None:
        """Stop Ray if this process started it, dead or alive."""
        if not self.is_ours:
            return
        if any(name == "raylet" and is_dead(process) for name, process in self._head):
            return  # `ray.shutdown` without raylet may end this process; at exit the fault has already been reported
        members = self._members()
        stopping = _in_thread(ray.shutdown)  # takes five seconds when gcs_server is dead
        concurrent.futures.wait([stopping], RAY_STOP_TIMEOUT)
        if not stopping.done():
            self._kill()
        kill_processes(members)  # without gcs_server the agents of raylet live a minute longer
        self._is_stopped.set()

    def _watch(self) -> None:
        """Find the head among the children of this process."""
        known = self._other_children | {process.pid for _, process in self._head}
        for process in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.pid not in known and process.name() in ("gcs_server", "raylet"):
                    self._head.append((process.name(), process))

    def _kill(self) -> None:
        """Kill Ray and the engines, which are children of raylet, and cancel its shutdown at exit."""
        atexit.unregister(ray.shutdown)
        kill_processes(self._members())
        self._is_stopped.set()

    def _members(self) -> list[psutil.Process]:
        return [member for _, process in self._head for member in process_family(process.pid)]


def start_ray(
    config: RolloutConfig, spec: EngineSpec, trainer: Sequence[placement.TrainerGpu]
) -> tuple[RayCluster, bool]:
    """Join the cluster of RAY_ADDRESS, or start Ray on this machine.

    Args:
        trainer: the GPUs of its ranks, which engines must not use unless they are colocated.
    Returns:
        The cluster, and whether the engines have GPUs of their own.
    Raises:
        ConfigError: too few GPUs or CPUs are free.
    """
    cluster = RayCluster()
    if ray.is_initialized():
        return cluster, False
    has_own = spec.device == "cuda" and not config.colocate
    if os.environ.get("RAY_ADDRESS"):
        cluster.start(address="auto")
        cluster.run(_reserve, cluster, config, trainer if has_own else (), on_gpus=spec.device == "cuda")
        return cluster, has_own
    own = placement.gpus_beside_the_trainer(config) if has_own else []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        if own:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        if not any(name in os.environ for name in TOKEN_VARIABLES):
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # otherwise Ray writes one into the home folder
        system_config = {
            # Otherwise Ray ends this process a minute after the death of gcs_server, in the middle of a long step.
            "gcs_rpc_server_reconnect_timeout_s": 10**6,
            "worker_niceness": 0,  # of 15: an engine would wait for everything else on the machine
        }
        cluster.start(num_cpus=config.num_engines + 1, include_dashboard=False, _system_config=system_config)
    finally:
        if own and visible is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        elif own and visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
    return cluster, has_own


def _reserve(
    cluster: RayCluster, config: RolloutConfig, trainer: Sequence[placement.TrainerGpu], *, on_gpus: bool
) -> None:
    """Hold the trainer's GPUs in the joined cluster, and see that the others are enough for the engines."""
    nodes = placement.living_nodes()
    cluster.held = placement.hold_gpus(nodes, trainer)
    chosen = placement.choose(nodes, config.nodes)
    placement.check_room(config, chosen, on_gpus=on_gpus, num_held=len(cluster.held))


def _in_thread(work: Callable[[], Result], *, keep_alive_until: threading.Event | None = None) -> Future[Result]:
    """Call `work` in a daemon thread, which after a success stays alive until the event is set."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)
        else:
            if keep_alive_until is not None:
                keep_alive_until.wait()

    threading.Thread(target=run, daemon=True, name="ray").start()
    return future


def is_dead(process: psutil.Process) -> bool:
    """Whether a process has ended, zombies included."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def process_family(pid: int | None) -> list[psutil.Process]:
    """Return a process and its descendants (an engine and its workers); nothing if it has ended."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill_processes(processes: Iterable[psutil.Process]) -> None:
    """Send SIGKILL to processes; those that have ended are skipped."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def one_line(error: BaseException) -> str:
    """Return the line of an error of Ray or vLLM that says why: the last one, without Ray's list of common causes.

    Where Ray's memory monitor killed a process, its advice comes last, and the line before it says why.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if killed := [line for line in lines if "running low on memory" in line]:
        return f"{killed[0][:300]} (Ray's memory monitor; RAY_memory_usage_threshold sets its limit)"
    return lines[-1].split(" Some common causes include:")[0] if lines else type(error).__name__
