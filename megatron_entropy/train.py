"""What every rank runs: `torchrun ... -m megatron_entropy.train CONFIG.toml [--resume | --overwrite] [--key=value]`.

`megatron-entropy train` starts the ranks of one machine this way; on several, start torchrun yourself.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Train on this rank.

    Returns:
        Exit code: 0, 2 after a user's mistake, 1 after a fault, 143 after a stop signal that was obeyed.
    """
    from megatron_entropy import launch, parallel
    from megatron_entropy.log import setup_logging

    parser = argparse.ArgumentParser(prog="megatron_entropy.train", allow_abbrev=False)
    parser.add_argument("config")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--overwrite", action="store_true")
    chosen, overrides = parser.parse_known_args(arguments)
    rank = int(os.environ.get("RANK", 0))
    setup_logging(rank)
    try:
        parallel.join()
        return _train(chosen, overrides)
    except Exception as error:  # every failure ends in one line, told by the launcher or here
        return launch.report_failure(error, rank=rank)
    finally:
        parallel.leave()


def _train(chosen: argparse.Namespace, overrides: list[str]) -> int:
    import torch.distributed as dist

    from megatron_entropy import config as configuration
    from megatron_entropy import launch, parallel
    from megatron_entropy.methods import METHOD_CONFIGS
    from megatron_entropy.report import print_table
    from megatron_entropy.trainer import Stopped, log, train

    stages = launch.resolve(chosen.config, overrides, METHOD_CONFIGS, world_size=dist.get_world_size())

    def prepare() -> None:
        if launch.LAUNCHER_VARIABLE not in os.environ:
            launch.check_rows(stages)
            launch.prepare_run_folder(stages, resume=chosen.resume, overwrite=chosen.overwrite)
        configuration.write(stages.configs, stages.folder.config)

    parallel.on_first_rank(prepare)
    try:
        train(stages.configs, resume=chosen.resume)
    except Stopped as stop:
        log.warning("%s", stop)
        return 143
    if parallel.rank() == 0:
        print_table(stages.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
