"""Check a run before anything starts, and prepare its run folder; needs no torch."""

from __future__ import annotations

import difflib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from megatron_entropy.config import check, load
from megatron_entropy.config.architecture import ModelArchitecture, read_architecture
from megatron_entropy.config.schema import Config
from megatron_entropy.errors import ConfigError, DataError, ModelError, UserError
from megatron_entropy.launch import preflight
from megatron_entropy.launch.lock import RunLock, check_unlocked
from megatron_entropy.methods import build_method, load_method_config
from megatron_entropy.monitor.run_folder import RunFolder
from megatron_entropy.procedural import is_source
from megatron_entropy.weights.names import lora_linears

FLAGS = ("--resume", "--overwrite", "--dry-run")
"""Arguments of `megatron-entropy train` that are not overrides."""


@dataclass(frozen=True)
class RunSpec:
    """A checked run: the settings of each stage, and the architecture of the model that the first one starts from."""

    configs: list[Config]
    arch: ModelArchitecture

    @property
    def world_size(self) -> int:
        """Number of trainer ranks, equal for all stages."""
        return self.configs[0].actor.parallel.world_size

    @property
    def folder(self) -> RunFolder:
        """Paths of the run."""
        return RunFolder(Path(self.configs[0].output))


def resolve(
    paths: str | Path | Sequence[str | Path], overrides: Sequence[str], *, world_size: int | None = None
) -> RunSpec:
    """Load a configuration and check it against itself, the model folder and the files it names.

    Args:
        paths: the TOML file, or several that are merged.
        overrides: `--key.path=value` arguments.
        world_size: number of running ranks, to compare with the layout; None before they start.

    Raises:
        ConfigError: a wrong key, value or combination; the message names the key to change.
        ModelError: the first stage's model folder cannot be used.
        DataError: a data file does not exist.
    """
    for text in overrides:
        if "=" not in text and (close := difflib.get_close_matches(text, FLAGS, n=1)):
            raise ConfigError(f"{text}: did you mean {close[0]}?")
    configs = load.load(paths, overrides, load_method_config)
    check.check_stages(configs)
    arch = read_model("model.path", configs[0].model.path)
    spec = RunSpec(configs, arch)
    for config in configs:
        with _naming_stage(spec, config):
            check.check(config, arch, world_size)
            lora_linears(config.actor.lora, arch)  # raises for wrong targets
            build_method(config)  # compares the method's settings with the other ones
            for key, folder in _model_folders(config):
                _check_architecture(key, folder, arch)
        for key, files in (("data.train", config.data.train), ("data.eval", config.data.eval)):
            for file in files:
                if not is_source(file) and not os.path.isfile(file):
                    raise DataError(
                        f"{key}: {'not a regular file' if os.path.exists(file) else 'no such file'}: {file}"
                    )
    return spec


def check_inputs(spec: RunSpec) -> None:
    """Check everything that can be checked without an engine and without the weights, see `preflight`.

    A column that a later stage needs is missed before the first stage trains.

    Raises:
        UserError: naming the key or file to change, and the stage where there are several.
    """
    model = ""
    for config in spec.configs:
        model = config.model.path or model
        with _naming_stage(spec, config):
            preflight.check_packages(config)
            preflight.check_memory(config, spec.arch)
            for _, folder in _model_folders(config):
                preflight.check_model_folder(folder, spec.arch)
            preflight.check_data(config, model, spec.arch)


@contextmanager
def _naming_stage(spec: RunSpec, config: Config) -> Iterator[None]:
    """Prefix errors with the stage's name where there are several stages."""
    try:
        yield
    except UserError as error:
        if len(spec.configs) == 1:
            raise
        raise type(error)(f"stage {config.name}: {error}") from None


def _model_folders(config: Config) -> list[tuple[str, str]]:
    named = (("model.path", config.model.path), ("model.reference", config.model.reference))
    return [(key, folder) for key, folder in named if folder]


def read_model(key: str, folder: str) -> ModelArchitecture:
    """Read the architecture of a model folder.

    Args:
        key: what names the folder, for the message.
        folder: as the user wrote it.
    Raises:
        ModelError: it cannot be used; for the name of a model of the Hugging Face Hub the message says how to
            download it.
    """
    if re.fullmatch(r"[\w.-]+/[\w.-]+", folder) and not os.path.exists(folder):
        name = folder.partition("/")[2]
        raise ModelError(
            f"{key}: no such folder: {folder}; a model of the Hugging Face Hub is downloaded first: hf download "
            f"{folder} --local-dir {name}, then {key}={name}"
        )
    return read_architecture(folder, key=key)


def _check_architecture(key: str, folder: str, arch: ModelArchitecture) -> None:
    other = read_model(key, folder)
    for field in fields(arch):
        expected, found = getattr(arch, field.name), getattr(other, field.name)
        if found != expected:
            raise ConfigError(
                f"{key}={folder} has {field.name} {found}, the model has {expected}; choose a model of the same "
                "architecture"
            )


def check_run_folder(spec: RunSpec, *, resume: bool, overwrite: bool) -> None:
    """See that a run may use its folder; changes nothing.

    A folder that holds a run is refused without `resume` or `overwrite`.

    Raises:
        ConfigError: the folder holds a run and neither flag is given; both flags are given; a living run uses it; an
            input of the run lies among the files to delete; the folder cannot be written to.
    """
    folder = spec.folder
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other; give one of them")
    try:
        _check_writable(spec)
    except OSError as error:
        raise _not_writable(folder, error) from None
    check_unlocked(folder.root)
    written = _existing_paths(folder)
    holds_run = any(path in written for path in (folder.config, folder.metrics, folder.checkpoints("any").parent))
    if holds_run and not resume and not overwrite:
        raise ConfigError(
            f"output={folder.root} holds a run already; continue it with --resume, delete it with --overwrite, or "
            "choose another folder with --output=..."
        )
    if overwrite:
        for key, path in _inputs(spec.configs):
            if inside := [top for top in written if path.resolve().is_relative_to(top.resolve())]:
                raise ConfigError(f"{key}={path} lies in {inside[0]}, which --overwrite would delete; move it first")


def prepare_run_folder(spec: RunSpec, *, resume: bool, overwrite: bool) -> None:
    """Create or clear the run folder, and lock it until this process ends: no run writes into the results of another.

    `overwrite` deletes what a run writes and nothing else. `resume` takes the folder as it is, even an empty one.

    Raises:
        ConfigError: as `check_run_folder`.
    """
    folder = spec.folder
    check_run_folder(spec, resume=resume, overwrite=overwrite)
    try:
        folder.root.parent.mkdir(parents=True, exist_ok=True)
        folder.root.mkdir(mode=0o700, exist_ok=True)  # questions and answers are for the user alone
        RunLock(folder.root)
        for path in _existing_paths(folder) if overwrite else ():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except OSError as error:
        raise _not_writable(folder, error) from None


def _check_writable(spec: RunSpec) -> None:
    """Create a file without a name in every folder that the run writes to, or in the one to create it in."""
    folder = spec.folder
    for target in (folder.root, *(folder.checkpoints(name) for name in ("", *(c.name for c in spec.configs)))):
        while not _exists(target):
            target = target.parent
        if not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{target} is not a folder")
        with tempfile.TemporaryFile(dir=target):
            pass


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _not_writable(folder: RunFolder, error: OSError) -> ConfigError:
    return ConfigError(
        f"output={folder.root} cannot be written to ({error.strerror}); fix that, or choose another folder with "
        "--output=..."
    )


def _existing_paths(folder: RunFolder) -> list[Path]:
    return [path for path in written_paths(folder) if os.path.lexists(path)]


def written_paths(folder: RunFolder) -> list[Path]:
    """Every file and folder at the top of the run folder that a run writes."""
    of_stages = (folder.tensorboard(""), folder.rollouts("", 0).parent, folder.evaluation("", 0).parent)
    exports = (
        folder.export("", last=True),
        folder.adapter("", last=True),
        folder.root / "stages",
        folder.checkpoints(""),
        folder.benchmarks,
    )
    return [folder.config, folder.metrics, folder.summary, folder.report, folder.plots, *of_stages, *exports]


def _inputs(configs: Iterable[Config]) -> Iterable[tuple[str, Path]]:
    for config in configs:
        named = [("model.path", config.model.path), ("data.tokenizer", config.data.tokenizer)]
        named += [("data.train", file) for file in config.data.train]
        named += [("data.eval", file) for file in config.data.eval]
        yield from ((key, Path(value)) for key, value in named if value)
