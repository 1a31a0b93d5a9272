"""From a configuration file to running ranks: checks that need no torch, the run folder's policy, torchrun.

`megatron-entropy train` runs torchrun's agent in its own process, so that Ctrl-C and `kill` reach the ranks as a
request to stop after the step (torchrun alone kills them after 30 seconds), and so that a failure ends in the one
line of the rank that failed first. Under plain torchrun the ranks use `resolve`, `prepare_run_folder` and
`report_failure` themselves. Importing this module imports no torch.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

import psutil

from megatron_entropy import config as configuration
from megatron_entropy.architecture import ModelShape, read_shape
from megatron_entropy.config import Config, MethodConfig
from megatron_entropy.errors import ConfigError, DataError, Fault, UserError
from megatron_entropy.methods import build_method
from megatron_entropy.run_folder import RunFolder

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from megatron_entropy.methods.base import Method
    from megatron_entropy.records import Prompt

RANK_MODULE = "megatron_entropy.train"
"""What every rank runs."""

LAUNCHER_VARIABLE = "MEGATRON_ENTROPY_LAUNCHER"
"""Set for ranks whose failures the launcher prints."""

STOPPED = (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT)
"""Exit codes of a rank that ended because it was asked to."""

DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
"""Errors of the operating system that are no bug of ours: no room, quota, read-only, limit on a file's size."""


@dataclass(frozen=True)
class Stages:
    """A checked configuration: one entry per stage, and the shape of the model that the first one starts from."""

    configs: list[Config]
    shape: ModelShape

    @property
    def world_size(self) -> int:
        """Trainer ranks, equal for all stages."""
        return self.configs[0].actor.parallel.world_size

    @property
    def folder(self) -> RunFolder:
        """Where the run writes."""
        return RunFolder(Path(self.configs[0].output))


def resolve(
    path: str | Path,
    overrides: Sequence[str],
    method_configs: Mapping[str, type[MethodConfig]],
    *,
    world_size: int | None = None,
) -> Stages:
    """Load a configuration and check it against itself, the model folder and the files it names.

    Args:
        path: the TOML file.
        overrides: `--key.path=value` arguments.
        method_configs: configuration class of each method, by name.
        world_size: ranks that are running, to compare with the layout; None before they start.

    Raises:
        ConfigError: a wrong key, value or combination, with the key to change.
        ModelError: the first stage's model folder cannot be used.
        DataError: a data file does not exist.
    """
    configs = configuration.load(path, overrides, method_configs)
    configuration.check_stages(configs)
    shape = read_shape(configs[0].model.path)
    for config in configs:
        try:
            configuration.check(config, shape, world_size)
            build_method(config)  # compares the method's settings with the stage's
            if config.model.reference:
                _check_reference(config, shape)
        except ConfigError as error:
            raise ConfigError(f"stage {config.name}: {error}" if len(configs) > 1 else str(error)) from None
        for key, files in (("data.train", config.data.train), ("data.test", config.data.test)):
            for file in files:
                if not Path(file).is_file():
                    raise DataError(f"{key}: no such file: {file}")
    return Stages(configs, shape)


def check_rows(stages: Stages) -> None:
    """Have every stage choose its prompts once, so that what a later stage lacks is told before the first one trains.

    Single rows may lack something: they may be too long to be trained on.

    Raises:
        DataError: a file that cannot be read, or a column that every row lacks, naming the stage.
    """
    from megatron_entropy.data.dataset import read_prompts  # pyarrow: not for those who only ask for help

    for config in stages.configs:
        try:
            read_prompts(config.data.test, schema=config.data.columns)
            prompts = read_prompts(config.data.train, schema=config.data.columns)
            method = build_method(config)
            if all(_lacks_something(method, prompt) for prompt in prompts):
                method.select(prompts)
        except (ConfigError, DataError) as error:
            raise type(error)(f"stage {config.name}: {error}" if len(stages.configs) > 1 else str(error)) from None


def _lacks_something(method: Method, prompt: Prompt) -> bool:
    try:
        method.select([prompt])
    except DataError:
        return True
    except ConfigError:  # of how many there are
        return False
    return False


def _check_reference(config: Config, shape: ModelShape) -> None:
    other = read_shape(config.model.reference)
    for field in fields(shape):
        mine, its = getattr(shape, field.name), getattr(other, field.name)
        if mine != its:
            raise ConfigError(
                f"model.reference={config.model.reference} has {field.name} {its}, the model has {mine}; reference or "
                "teacher must have the model's own shape"
            )


def prepare_run_folder(stages: Stages, *, resume: bool, overwrite: bool) -> None:
    """Make the run folder ready, so that no run writes into another's results unasked.

    A folder that holds a run is refused unless it is to be resumed or overwritten; `overwrite` deletes what a run
    writes and nothing else; `resume` takes the folder as it is, also an empty one. Doing it twice changes nothing.

    Raises:
        ConfigError: the folder holds a run and neither is asked for, or both are, or an input of the run lies among
            what would be deleted, or nothing can be written there.
    """
    folder = stages.folder
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other; give one of them")
    if folder.root.exists() and not folder.root.is_dir():
        raise ConfigError(f"output={folder.root} is not a folder; choose another")
    written = [path for path in written_paths(folder) if path.exists()]
    holds_run = any(path in written for path in (folder.config, folder.metrics, folder.checkpoints("any").parent))
    if holds_run and not resume and not overwrite:
        raise ConfigError(
            f"output={folder.root} holds a run already; continue it with --resume, delete it with --overwrite, or "
            "choose another folder with --output=..."
        )
    if overwrite:
        for key, path in _inputs(stages.configs):
            if inside := [top for top in written if path.resolve().is_relative_to(top.resolve())]:
                raise ConfigError(f"{key}={path} lies in {inside[0]}, which --overwrite would delete; move it first")
    try:
        for path in written if overwrite else ():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        folder.root.mkdir(parents=True, exist_ok=True)
        of_checkpoints = [folder.checkpoints(name) for name in ("", *(config.name for config in stages.configs))]
        for place in (folder.root, *of_checkpoints):
            if place.exists():
                with tempfile.TemporaryFile(dir=place):
                    pass
    except OSError as error:
        raise ConfigError(
            f"output={folder.root} cannot be written to ({error.strerror}); mend that, or choose another folder with "
            "--output=..."
        ) from None


def written_paths(folder: RunFolder) -> list[Path]:
    """Every file and folder under the root that a run writes."""
    of_stages = (folder.tensorboard(""), folder.rollouts("", 0).parent, folder.evaluation("", 0).parent)
    exports = (
        folder.export("", last=True),
        folder.adapter("", last=True),
        folder.root / "stages",
        folder.checkpoints(""),
    )
    return [folder.config, folder.metrics, folder.summary, folder.report, folder.plots, *of_stages, *exports]


def _inputs(configs: Iterable[Config]) -> Iterable[tuple[str, Path]]:
    for config in configs:
        named = [("model.path", config.model.path), ("data.tokenizer", config.data.tokenizer)]
        named += [("data.train", file) for file in config.data.train]
        named += [("data.test", file) for file in config.data.test]
        yield from ((key, Path(value)) for key, value in named if value)


@dataclass(frozen=True)
class RankFailure:
    """Why a rank ended: `user` (a `UserError`), `fault` (a `Fault`), `bug` (anything else) or `death` (a signal).

    `time`: seconds since the epoch. `details`: the traceback of a bug.
    """

    rank: int
    kind: Literal["user", "fault", "bug", "death"]
    message: str
    exit_code: int
    time: float
    details: str = ""


def describe(error: BaseException, *, rank: int) -> RankFailure:
    """What `error` means to the user of the run."""
    message = " ".join(str(error).split())
    if isinstance(error, UserError):
        return RankFailure(rank, "user", message, 2, time.time())
    if isinstance(error, OSError) and error.errno in DISK_REFUSES:
        message += "; make room (checkpoint.keep, log.rollouts_every) or mend the disk, and go on with --resume"
        return RankFailure(rank, "fault", f"rank {rank}: {message}", 1, time.time())
    if isinstance(error, Fault):
        return RankFailure(rank, "fault", f"rank {rank}: {message}", 1, time.time())
    details = "".join(traceback.format_exception(error))
    return RankFailure(rank, "bug", f"rank {rank}: {type(error).__name__}: {message}", 1, time.time(), details)


def report_failure(error: BaseException, *, rank: int) -> int:
    """Say why this rank ends, where it is read once: to our launcher, or under plain torchrun on standard error.

    Under plain torchrun a user's mistake, which all ranks find, is printed by rank 0 only; anything else by the rank
    it happened on, in one line. Either way it is left in torchrun's error file too, from which torchrun shows the
    first failure with its traceback.

    Returns:
        The exit code of the rank: 2 for a user's mistake, else 1.
    """
    failure = describe(error, rank=rank)
    if target := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": failure.details, "timestamp": str(int(failure.time))}
        message = {"message": failure.details or failure.message, "extraInfo": extra}
        Path(target).write_text(json.dumps({"message": message, "megatron_entropy": asdict(failure)}))
        by_launcher = LAUNCHER_VARIABLE in os.environ
    else:
        by_launcher = False
        print(failure.details, end="", file=sys.stderr)
    if not by_launcher and (rank == 0 or failure.kind != "user"):
        print(f"error: {failure.message}", file=sys.stderr, flush=True)
    return failure.exit_code


def launch(arguments: Sequence[str], *, world_size: int) -> int:
    """Run `world_size` ranks of `RANK_MODULE` on this machine through torchrun and wait for them.

    SIGINT, SIGTERM and SIGHUP ask the ranks (by SIGTERM) to finish their step, save and end; a second one kills them.

    Args:
        arguments: command line of each rank: the configuration file, overrides and flags.
        world_size: number of ranks.

    Returns:
        0; 128 + the signal's number after a stop; else the exit code of the rank that failed first, whose message
        has been printed.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // world_size)))
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: fresh buffers of host memory fill 3 times faster
    os.environ[LAUNCHER_VARIABLE] = "1"
    ranks = _Ranks(world_size)
    previous = {number: signal.signal(number, ranks.stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        failures = _run_agent(list(arguments), world_size)
    except _StoppedEarly:
        failures = []
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if ranks.stop_signal is not None and (ranks.killed or all(f.exit_code in STOPPED for f in failures)):
        return 128 + ranks.stop_signal
    if not failures:
        return 0
    first = first_failure(failures)
    print(first.details, end="", file=sys.stderr)
    print(f"error: {first.message}", file=sys.stderr, flush=True)
    return first.exit_code if first.exit_code > 0 else 1


def first_failure(failures: Sequence[RankFailure]) -> RankFailure:
    """The one that explains the others.

    Our own errors come first, since a rank that loses its neighbour reports a broken connection, not one of ours;
    then by time, where a death counts as a second earlier than the agent noticed it; last the ranks that the agent
    ended because of another.
    """

    def order(failure: RankFailure) -> tuple[int, float]:
        death = failure.kind == "death"
        if death and failure.exit_code in STOPPED:
            return 3, failure.time
        return {"user": 0, "fault": 1}.get(failure.kind, 2), failure.time - death

    return min(failures, key=order)


class _StoppedEarly(BaseException):
    """A stop signal came before there were ranks to stop."""


class _Ranks:
    """Handler of stop signals: forwards the first to the ranks, kills them on the second."""

    def __init__(self, world_size: int) -> None:
        self.stop_signal: int | None = None
        self.killed = False
        self._world_size = world_size
        self._started = False

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Act on signal `number`."""
        first, self.stop_signal = self.stop_signal is None, self.stop_signal or number
        ranks = self._processes()
        self._started = self._started or len(ranks) == self._world_size
        if first:
            if not self._started:
                for rank in ranks:
                    rank.kill()
                raise _StoppedEarly
            _say("stopping after this step; once more kills the run at once")
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
            except psutil.Error:  # it ended meanwhile
                continue
        return found


def _say(text: str) -> None:
    os.write(sys.stderr.fileno(), f"{text}\n".encode())  # unbuffered, allowed in a signal handler


def _run_agent(arguments: list[str], world_size: int) -> list[RankFailure]:
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    logging.disable(logging.CRITICAL)  # of this process: torchrun's own account of a failure
    with tempfile.TemporaryDirectory(prefix="megatron_entropy_") as folder:
        options = ["--nnodes=1", f"--nproc-per-node={world_size}", "--max-restarts=0", f"--log-dir={folder}"]
        options += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--rdzv-id={uuid.uuid4()}"]
        options += ["--signals-to-handle=SIGQUIT", "--module", RANK_MODULE]
        parsed = torchrun.parse_args(options)
        parsed.training_script_args = arguments  # not parsed along: torchrun would take --run for one of its own
        config, command, command_arguments = torchrun.config_from_args(parsed)
        try:
            elastic_launch(config, command)(*command_arguments)
        except ChildFailedError as error:
            return [_failure_of(rank, failure) for rank, failure in error.failures.items()]
        finally:
            logging.disable(logging.NOTSET)
    return []


def _failure_of(rank: int, failure: ProcessFailure) -> RankFailure:
    record = failure.error_file_data
    if isinstance(record, dict) and "megatron_entropy" in record:
        return RankFailure(**record["megatron_entropy"])
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = "; most often the machine ran out of memory" if name == "SIGKILL" else ""
        message = f"rank {rank} was killed by {name}{hint}"
    else:
        message = f"rank {rank} ended with exit code {failure.exitcode}"
    return RankFailure(rank, "death", message, failure.exitcode, float(failure.timestamp))
