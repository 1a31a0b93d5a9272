"""Start the ranks of this machine through torchrun, forward stop signals to them, and report the first failure.

torchrun's agent runs in this process, so Ctrl-C and `kill` reach the ranks as a request to stop after the step
(torchrun alone kills them after 30 seconds), and a failure ends in the one line of the rank that failed first.
Importing this module imports no torch.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from types import FrameType
from typing import TYPE_CHECKING

import psutil

from megatron_entropy.distributed import loopback, network
from megatron_entropy.distributed.scratch import scratch_folder
from megatron_entropy.imports import fast_imports
from megatron_entropy.launch.failures import LAUNCHER_VARIABLE, OBEYED, STOPPED, RankFailure, first_failure

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from megatron_entropy.launch.nodes import Place

RANK_MODULE = "megatron_entropy"
"""Module that every rank runs (`python -m`)."""


def launch(arguments: Sequence[str], *, ranks: int, place: Place | None = None) -> int:
    """Run the ranks of this machine, which are `RANK_MODULE`, and wait for them.

    SIGINT, SIGTERM and SIGHUP make the ranks finish their step, save and end (by SIGTERM); a second signal kills them.

    Args:
        arguments: command line of each rank: `train`, the configuration file, flags and overrides.
        ranks: number of ranks on this machine.
        place: of this machine among several; None: all ranks of the run are here.

    Returns:
        0; 128 + the signal's number after a stop (SIGTERM's where another node received it); otherwise the exit code of
        the rank that failed first, after its message has been printed here or on the nodes that it concerns.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    quiet_torch()
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: new buffers of host memory fill 3 times faster
    # On a CPU oneDNN keeps compiled products of bfloat16 matrices, 0.4 MB each; to compile one takes 0.4 ms.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8")
    # What a killed rank leaves behind is deleted; Python would report it behind the error.
    filters = [os.environ.get("PYTHONWARNINGS", ""), "ignore:resource_tracker:UserWarning"]
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, filters))
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    if place is None and not os.environ.get("RAY_ADDRESS"):  # engines of a joined cluster may be on other machines
        loopback.request()
    group = _Ranks(ranks)
    previous = {number: signal.signal(number, group.stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        failures = _run_agent(list(arguments), ranks, place)
    except _StoppedEarly:
        failures = []
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    try:
        return _conclude(failures, group, place)
    finally:
        if place is not None:
            place.leave()


def quiet_torch() -> None:
    """Hide torch's warnings of reverse lookups and repeated connections; to be called before it is imported."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _conclude(failures: list[RankFailure], group: _Ranks, place: Place | None) -> int:
    """Print why the run has ended, where it must be printed here; returns the exit code."""
    if not failures and group.stop_signal is None:
        return 0
    obeyed = bool(failures) and all(failure.exit_code == OBEYED for failure in failures)
    stopped = all(failure.kind == "death" and failure.exit_code in STOPPED for failure in failures)
    if group.killed or (stopped and (obeyed or group.stop_signal is not None)):
        if place is not None and not obeyed:
            place.post_failure(asdict(_stopped_at_once(failures)))
        return 128 + (group.stop_signal or signal.SIGTERM)
    first = first_failure(failures)
    if place is not None and first.kind == "death":
        place.post_failure(asdict(first))
    if not all(failure.quiet for failure in failures if failure.message == first.message):
        print(first.details, end="", file=sys.stderr)
        print(f"error: {first.message}", file=sys.stderr, flush=True)
    return first.exit_code if first.exit_code > 0 else 1


def _stopped_at_once(failures: list[RankFailure]) -> RankFailure:
    """What the other nodes' ranks report when this node was stopped before its ranks could obey."""
    rank = failures[0].rank if failures else 0
    message = f"{network.host_name()} was stopped by a signal before the end of a step; continue with --resume"
    return RankFailure(rank, "fault", message, OBEYED, time.time())


class _StoppedEarly(BaseException):
    """A stop signal came before all ranks had started."""


class _Ranks:
    """Handler of stop signals: forwards the first one to the ranks and kills them on the second."""

    def __init__(self, world_size: int) -> None:
        self.stop_signal: int | None = None
        self.killed = False
        self._world_size = world_size
        self._started = False

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Handle signal `number`."""
        first, self.stop_signal = self.stop_signal is None, self.stop_signal or number
        ranks = self._processes()
        self._started = self._started or len(ranks) == self._world_size
        if first:
            if not self._started:
                for rank in ranks:
                    rank.kill()
                raise _StoppedEarly
            _print_from_handler("stopping after this step; once more kills the run at once")
            for rank in ranks:
                rank.send_signal(signal.SIGTERM)
        else:
            self.killed = True
            for rank in ranks:
                os.killpg(rank.pid, signal.SIGKILL)  # torchrun gives each rank a session of its own

    @staticmethod
    def _processes() -> list[psutil.Process]:
        found = []
        for child in psutil.Process().children():
            try:
                if RANK_MODULE in child.cmdline():
                    found.append(child)
            except psutil.Error:  # it has ended
                continue
        return found


def _print_from_handler(text: str) -> None:
    os.write(sys.stderr.fileno(), f"{text}\n".encode())  # unbuffered, allowed in a signal handler


def _run_agent(arguments: list[str], ranks: int, place: Place | None) -> list[RankFailure]:
    with fast_imports():
        import torch.distributed as dist
        from torch.distributed import run as torchrun
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import elastic_launch

    loopback.activate()

    logging.disable(logging.CRITICAL)  # of this process: torchrun would log every failure as well
    with scratch_folder() as folder:
        options = [f"--nproc-per-node={ranks}", "--max-restarts=0", f"--log-dir={folder}", *_meeting(place)]
        options += ["--signals-to-handle=SIGQUIT", "--module", RANK_MODULE]
        parsed = torchrun.parse_args(options)
        parsed.training_script_args = arguments  # torchrun's parser would take `--run` for an option of its own
        config, command, command_arguments = torchrun.config_from_args(parsed)
        try:
            elastic_launch(config, command)(*command_arguments)
        except ChildFailedError as error:
            node = network.host_name() if place is not None else ""
            return [_to_rank_failure(rank, failure, node) for rank, failure in error.failures.items()]
        except dist.DistError as error:
            if place is None:
                raise
            reason = " ".join(str(error).split())[:200]
            message = f"{network.host_name()}: the connection to the first node broke: {reason}"
            return [RankFailure(-1, "lost", message, 1, time.time())]
        finally:
            logging.disable(logging.NOTSET)
    return []


def _meeting(place: Place | None) -> list[str]:
    """Options of torchrun that say where its agents meet."""
    if place is None:
        # Without the address, ranks look for the store where the host name leads.
        options = ["--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=127.0.0.1"]
        return [*options, f"--rdzv-id={uuid.uuid4()}"]
    spec = place.spec
    options = [f"--nnodes={spec.count}", f"--node-rank={place.number}", "--rdzv-backend=static"]
    return [*options, f"--rdzv-endpoint={place.address}:{spec.port}", f"--rdzv-id={spec.run_id or 'run'}"]


def _to_rank_failure(rank: int, failure: ProcessFailure, node: str) -> RankFailure:
    where = f"rank {rank} on {node}" if node else f"rank {rank}"
    record = failure.error_file_data
    if isinstance(record, dict) and "megatron_entropy" in record:
        return RankFailure(**record["megatron_entropy"])
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = "; most often the machine ran out of memory" if name == "SIGKILL" else ""
        message = f"{where} was killed by {name}{hint}"
    else:
        message = f"{where} ended with exit code {failure.exitcode}"
    return RankFailure(rank, "death", message, failure.exitcode, float(failure.timestamp))
