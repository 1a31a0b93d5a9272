"""What every trainer rank runs: `torchrun ... -m megatron_entropy train CONFIG.toml [flags and overrides]`."""

from __future__ import annotations

import os
from collections.abc import Sequence

from megatron_entropy.launch.failures import LAUNCHER_VARIABLE, report_failure
from megatron_entropy.launch.prepare import check_rows, prepare_run_folder, resolve


def is_rank() -> bool:
    """Whether torchrun has started this process."""
    return "RANK" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ


def run_rank(config: str, overrides: Sequence[str], *, resume: bool, overwrite: bool) -> int:
    """Train on this rank.

    Returns:
        Exit code: 0, 2 after a user's mistake, 1 after a fault, 143 after a stop signal that was obeyed.
    """
    from megatron_entropy.distributed import process_groups
    from megatron_entropy.monitor.console import setup_logging

    rank = int(os.environ.get("RANK", 0))
    setup_logging(rank)
    try:
        process_groups.init_process_group()
        return _train(config, overrides, resume=resume, overwrite=overwrite)
    except Exception as error:  # every failure ends in one line, printed by the launcher or here
        return report_failure(error, rank=rank)
    finally:
        process_groups.destroy_process_group()


def _train(config: str, overrides: Sequence[str], *, resume: bool, overwrite: bool) -> int:
    import torch.distributed as dist

    from megatron_entropy.config.load import write
    from megatron_entropy.distributed import process_groups
    from megatron_entropy.methods import METHOD_CONFIGS
    from megatron_entropy.monitor.report import print_table
    from megatron_entropy.trainer.loop import Stopped, log, train

    stages = resolve(config, overrides, METHOD_CONFIGS, world_size=dist.get_world_size())

    def prepare() -> None:
        if LAUNCHER_VARIABLE not in os.environ:
            check_rows(stages)
            prepare_run_folder(stages, resume=resume, overwrite=overwrite)
        write(stages.configs, stages.folder.config)

    process_groups.run_on_rank_zero(prepare)
    try:
        train(stages.configs, resume=resume)
    except Stopped as stop:
        log.warning("%s", stop)
        return 143
    if process_groups.rank() == 0:
        print_table(stages.folder)
    return 0
