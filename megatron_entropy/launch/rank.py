"""Train on one rank of `torchrun ... -m megatron_entropy train CONFIG.toml [flags and overrides]`."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_entropy.errors import ConfigError, Fault, UserError
from megatron_entropy.imports import fast_imports
from megatron_entropy.launch.failures import (
    LAUNCHER_VARIABLE,
    RankFailure,
    describe,
    is_quiet,
    report_failure,
    write_report,
)
from megatron_entropy.launch.prepare import RunSpec, check_inputs, prepare_run_folder, resolve

if TYPE_CHECKING:
    from megatron_entropy.distributed.liveness import Liveness
    from megatron_entropy.distributed.peers import Peers

EXIT_TIMEOUT = 30.0
"""Seconds that a failed rank may take to close what it uses."""
_PR_SET_PDEATHSIG = 1


def is_rank() -> bool:
    """Whether torchrun has started this process."""
    return "RANK" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ


def run_rank(
    configs: Sequence[str],
    overrides: Sequence[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> int:
    """Train on this rank.

    Args:
        configs: paths of the TOML files.
        overrides: `--key.path=value` arguments.
        resume: continue from the newest checkpoint in the run folder.
        overwrite: delete what an earlier run left in the run folder.
        dry_run: refused with an error, because ranks are running already.

    Returns:
        Exit code: 0, 2 after a user's mistake, 1 after a fault, 143 after a stop signal was obeyed.
    """
    end_with_launcher()
    with fast_imports():
        from megatron_entropy.distributed import memory, process_groups
        from megatron_entropy.distributed.peers import Peers
        from megatron_entropy.monitor.console import setup_logging
    memory.use_one_heap()
    rank = int(os.environ["RANK"])
    setup_logging(rank)
    peers, liveness = None, None
    failed = True
    try:
        peers = Peers()
        if dry_run:
            raise ConfigError("--dry-run starts no ranks; run megatron-entropy train without torchrun")
        spec = _meet(peers, configs, overrides)
        process_groups.init_process_group(spec.configs[0].cluster.timeout, store=peers.store)
        if not peers.is_single_machine:
            liveness = _watch(peers, spec.configs[0].cluster.lost_after)
        code = _train(spec, resume=resume, overwrite=overwrite, several=not peers.is_single_machine)
        failed = False
        return code
    except Exception as error:  # every failure ends in one line, printed by the launcher or here
        code = report_failure(error, rank=rank, peers=peers)
        if peers is not None and not peers.is_single_machine:
            end_process(code)
        return code
    finally:
        if liveness is not None:
            liveness.stop()
        process_groups.destroy_process_group(failed=failed)


def _meet(peers: Peers, configs: Sequence[str], overrides: Sequence[str]) -> RunSpec:
    """Read and check the settings, and compare them and the machine with the other ranks'; a collective.

    A user's mistake that one rank finds ends all of them.
    """
    from megatron_entropy.launch import agreement

    spec: RunSpec | None = None
    facts: dict[str, Any] = {"error": None}
    try:
        spec = resolve(configs, overrides, world_size=peers.world_size)
        if not _launcher_checks() and os.environ.get("LOCAL_RANK") == "0":
            check_inputs(spec)
        facts |= agreement.describe_machine() | agreement.describe_run(spec)
    except UserError as error:
        facts["error"] = str(error)
    except OSError as error:
        facts["error"] = f"{error.filename}: {error.strerror}"
    peers.meet(facts, agreement.compare)
    assert spec is not None, "a rank with an error has raised it"
    return spec


def _launcher_checks() -> bool:
    """Whether our launcher checks the inputs before the ranks start: on one machine."""
    return LAUNCHER_VARIABLE in os.environ and os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]


def _watch(peers: Peers, lost_after: float) -> Liveness:
    """End this rank when another machine is lost; it may wait for it in a collective and cannot end by itself."""
    from megatron_entropy.distributed.liveness import Liveness

    def end(reason: str, code: int) -> None:
        os._exit(_report_loss(peers, reason, code))

    liveness = Liveness(peers, lost_after=lost_after, end=end)
    liveness.start()
    return liveness


def _report_loss(peers: Peers, reason: str, code: int) -> int:
    """Report the failure that another rank has left, or else this reason; returns its exit code."""
    found = peers.failure(0.1)
    if found:
        failure = RankFailure(**found)
        failure = replace(failure, details="", quiet=is_quiet(peers, failure.rank))
    else:
        failure = replace(describe(Fault(reason), rank=peers.rank, node=peers.node), exit_code=code)
        peers.post_failure(asdict(failure))
    return write_report(failure, rank=peers.rank)


def end_process(code: int) -> NoReturn:
    """End this rank: run what is registered for the exit, and leave the memory to the kernel.

    Python would take a second to free its objects one by one. It ends even if something that closes at the exit waits
    for a lost machine.
    """
    timer = threading.Timer(EXIT_TIMEOUT, os._exit, (code,))
    timer.daemon = True
    timer.start()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_with_launcher() -> None:
    """Let the kernel kill this process when the launcher or torchrun's agent dies, by SIGKILL for instance.

    The engines and the verifier's workers end with rank 0.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher is not None and os.getppid() != int(launcher):  # it died before
        os.kill(os.getpid(), signal.SIGKILL)


def _train(spec: RunSpec, *, resume: bool, overwrite: bool, several: bool) -> int:
    with fast_imports():
        from megatron_entropy.distributed import process_groups
        from megatron_entropy.launch import agreement
        from megatron_entropy.monitor.report import print_table
        from megatron_entropy.trainer.loop import log, train
        from megatron_entropy.trainer.stop_signal import Stopped

        if process_groups.rank() == 0:  # draws the plots; 30 MB, which are the run's and not a stage's
            import matplotlib.backends.backend_agg
            import matplotlib.figure  # noqa: F401

    process_groups.run_on_rank_zero(lambda: prepare_run_folder(spec, resume=resume, overwrite=overwrite))
    if several:
        agreement.check_shared(spec.folder.root)
    try:
        train(spec.configs, resume=resume)
    except Stopped as stop:
        log.warning("%s", stop)
        return 143
    if process_groups.rank() == 0:
        print_table(spec.folder)
    return 0
