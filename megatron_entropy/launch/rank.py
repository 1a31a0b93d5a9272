"""Train on one rank of `torchrun ... -m megatron_entropy train CONFIG.toml [flags and overrides]`."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

from megatron_entropy.errors import ConfigError
from megatron_entropy.launch.failures import LAUNCHER_VARIABLE, report_failure
from megatron_entropy.launch.prepare import check_inputs, prepare_run_folder, resolve

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
    from megatron_entropy.distributed import process_groups
    from megatron_entropy.monitor.console import setup_logging

    end_with_launcher()
    rank = int(os.environ["RANK"])
    setup_logging(rank)
    failed = True
    try:
        process_groups.init_process_group()
        if dry_run:
            raise ConfigError("--dry-run starts no ranks; run megatron-entropy train without torchrun")
        code = _train(configs, overrides, resume=resume, overwrite=overwrite)
        failed = False
        return code
    except Exception as error:  # every failure ends in one line, printed by the launcher or here
        return report_failure(error, rank=rank)
    finally:
        process_groups.destroy_process_group(failed=failed)


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


def _train(configs: Sequence[str], overrides: Sequence[str], *, resume: bool, overwrite: bool) -> int:
    import torch.distributed as dist

    from megatron_entropy.distributed import process_groups
    from megatron_entropy.monitor.report import print_table
    from megatron_entropy.trainer.loop import log, train
    from megatron_entropy.trainer.stop_signal import Stopped

    spec = resolve(configs, overrides, world_size=dist.get_world_size())

    def prepare() -> None:
        if LAUNCHER_VARIABLE not in os.environ:  # the launcher has done it before the ranks started
            check_inputs(spec)
        prepare_run_folder(spec, resume=resume, overwrite=overwrite)

    process_groups.run_on_rank_zero(prepare)
    try:
        train(spec.configs, resume=resume)
    except Stopped as stop:
        log.warning("%s", stop)
        return 143
    if process_groups.rank() == 0:
        print_table(spec.folder)
    return 0
