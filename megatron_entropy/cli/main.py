"""The command `megatron-entropy`. Each command imports what it needs when it runs, so that `--help` is immediate."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from megatron_entropy.launch.prepare import Stages

TRAIN_FLAGS = ("--resume", "--overwrite", "--dry-run")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and where help is; exit with code 2."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line without the program's name; None: `sys.argv`.

    Returns:
        Exit code: 0, 2 after a user's mistake, 1 after a fault, 128 + n after signal n.
    """
    parser = _parser()
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.command != "train" and rest:
        parser.error(f"unknown argument {rest[0]}")
    return exit_code(lambda: chosen.run(chosen, rest))


def exit_code(command: Callable[[], int]) -> int:
    """Run `command`; what is no fault of ours becomes one line and an exit code, as in `main`."""
    from megatron_entropy.errors import Fault, UserError

    try:
        return command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Fault as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has read enough
        sys.stderr.close()
        return 0


@contextmanager
def byte_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over `total` bytes; what it yields is told how many more are done."""
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)


def byte_size(text: str) -> int:
    """Bytes in a size as people write it: `500MB`, `4GiB`, `1000`.

    Raises:
        ValueError: when it is none.
    """
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    hit = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    if hit is None or hit[2] not in units or float(hit[1]) <= 0:
        raise ValueError(f"{text} is no size such as 500MB or 4GiB")
    return int(float(hit[1]) * units[hit[2]])


def _parser() -> Parser:
    parser = Parser(
        prog="megatron-entropy",
        description="Trains reasoning models with token entropy as a first-class quantity.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    train = commands.add_parser(
        "train",
        help="train what a TOML file describes",
        description="Train what a TOML file describes, on as many ranks of this machine as its layout asks for. Any "
        "setting can be overridden: --actor.parallel.tp=2 for all stages, --stages.NAME.steps=10 for one.",
        usage="megatron-entropy train CONFIG [--resume | --overwrite] [--dry-run] [--KEY.PATH=VALUE ...]",
        allow_abbrev=False,
    )
    train.add_argument("config", metavar="CONFIG", help="TOML file")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the run folder, if any")
    train.add_argument("--overwrite", action="store_true", help="delete what an earlier run left in the run folder")
    train.add_argument(
        "--dry-run", action="store_true", help="check everything, print settings and plan, start nothing"
    )
    train.set_defaults(run=_train)
    report = commands.add_parser(
        "report",
        help="draw a run's plots and report.html anew",
        description="Draw the plots of a run folder, write its report.html and print its table.",
        allow_abbrev=False,
    )
    report.add_argument("folder", metavar="RUN", help="run folder")
    report.set_defaults(run=_report)
    doctor = commands.add_parser(
        "doctor",
        help="show what is installed and what a feature needs",
        description="Show installed packages and active fused parts. Exit code 1 when something needed is missing.",
        allow_abbrev=False,
    )
    doctor.add_argument(
        "--for",
        dest="feature",
        metavar="FEATURE",
        default="",
        help="one of fp8, te, nccl, wandb: what it lacks here",
    )
    doctor.set_defaults(run=_doctor)
    return parser


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"megatron-entropy {version('megatron-entropy')}")
        except PackageNotFoundError:
            print("megatron-entropy, not installed: run from its source folder")
        parser.exit()


def _train(chosen: argparse.Namespace, overrides: list[str]) -> int:
    from megatron_entropy.launch import prepare, torchrun
    from megatron_entropy.methods import METHOD_CONFIGS

    _check_overrides(overrides)
    stages = prepare.resolve(chosen.config, overrides, METHOD_CONFIGS)
    prepare.check_rows(stages)
    if chosen.dry_run:
        _print_plan(stages)
        return 0
    prepare.prepare_run_folder(stages, resume=chosen.resume, overwrite=chosen.overwrite)
    flags = ["--resume"] * chosen.resume + ["--overwrite"] * chosen.overwrite
    return torchrun.launch([chosen.config, *flags, *overrides], world_size=stages.world_size)


def _check_overrides(overrides: Sequence[str]) -> None:
    from megatron_entropy.errors import ConfigError

    for text in overrides:
        if "=" not in text or not text.startswith("--"):
            close = difflib.get_close_matches(text, TRAIN_FLAGS, n=1)
            hint = f"did you mean {close[0]}?" if close else "an override is written --key.path=value"
            raise ConfigError(f"{text}: {hint}")


def _print_plan(stages: Stages) -> None:
    from rich.console import Console
    from rich.table import Table

    from megatron_entropy.config.load import to_toml
    from megatron_entropy.methods import build_method
    from megatron_entropy.monitor.summary import layout_label

    print(to_toml(stages.configs))
    table = Table(title=f"{stages.arch.architecture}, {stages.arch.num_parameters:,} parameters")
    for heading in ("stage", "method", "steps", "ranks", "layout", "sequences a step", "tokens a step, at most"):
        table.add_column(heading)
    for config in stages.configs:
        layout = config.actor.parallel
        samples = config.batch.samples if build_method(config).uses_rollouts else 1
        longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
        table.add_row(
            config.name,
            config.method.name,
            str(config.steps),
            str(layout.world_size),
            layout_label(layout.model_dump()),
            f"{config.batch.prompts} x {samples}",
            f"{config.batch.prompts * samples * longest:,}",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _report(chosen: argparse.Namespace, rest: list[str]) -> int:
    from megatron_entropy.monitor import report
    from megatron_entropy.monitor.run_folder import RunFolder

    folder = RunFolder(Path(chosen.folder))
    report.write_report(folder)
    report.print_table(folder)
    return 0


def _doctor(chosen: argparse.Namespace, rest: list[str]) -> int:
    from megatron_entropy.cli import doctor

    return doctor.run(chosen.feature)


if __name__ == "__main__":
    sys.exit(main())
