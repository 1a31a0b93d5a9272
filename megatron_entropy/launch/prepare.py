"""Check a run before anything starts, and prepare its run folder; needs no torch."""

from __future__ import annotations

import difflib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_entropy.config import check, load
from megatron_entropy.config.architecture import ModelArchitecture, read_architecture
from megatron_entropy.config.schema import Config
from megatron_entropy.errors import ConfigError, DataError
from megatron_entropy.methods import build_method, load_method_config
from megatron_entropy.monitor.run_folder import RunFolder
from megatron_entropy.weights.names import lora_linears

if TYPE_CHECKING:
    from megatron_entropy.methods.base import Method
    from megatron_entropy.records import Prompt

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


def resolve(path: str | Path, overrides: Sequence[str], *, world_size: int | None = None) -> RunSpec:
    """Load a configuration and check it against itself, the model folder and the files it names.

    Args:
        path: the TOML file.
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
    configs = load.load(path, overrides, load_method_config)
    check.check_stages(configs)
    arch = read_architecture(configs[0].model.path)
    spec = RunSpec(configs, arch)
    for config in configs:
        with _naming_stage(spec, config):
            check.check(config, arch, world_size)
            lora_linears(config.actor.lora, arch)  # raises for wrong targets
            build_method(config)  # compares the method's settings with the other ones
            if config.model.reference:
                _check_reference(config, arch)
        for key, files in (("data.train", config.data.train), ("data.eval", config.data.eval)):
            for file in files:
                if not Path(file).is_file():
                    raise DataError(f"{key}: no such file: {file}")
    return spec


def check_rows(spec: RunSpec) -> None:
    """Read every data file once, so that a column that a later stage needs is missed before the first stage trains.

    Single rows may lack a column: they may turn out too long and be skipped.

    Raises:
        DataError: a file that cannot be read, or a column that every row lacks, naming the stage.
    """
    from megatron_entropy.data.dataset import read_prompts  # imports pyarrow, which `--help` must not

    for config in spec.configs:
        with _naming_stage(spec, config):
            read_prompts(config.data.eval, schema=config.data.format, columns=config.data.columns)
            prompts = read_prompts(config.data.train, schema=config.data.format, columns=config.data.columns)
            method = build_method(config)
            if not any(_can_select(method, prompt) for prompt in prompts):
                method.select(prompts)


def _can_select(method: Method, prompt: Prompt) -> bool:
    """Whether the prompt has every column that the method needs."""
    try:
        method.select([prompt])
    except DataError:
        return False
    except ConfigError:  # about the number of prompts
        return True
    return True


@contextmanager
def _naming_stage(spec: RunSpec, config: Config) -> Iterator[None]:
    """Prefix errors with the stage's name where there are several stages."""
    try:
        yield
    except (ConfigError, DataError) as error:
        if len(spec.configs) == 1:
            raise
        raise type(error)(f"stage {config.name}: {error}") from None


def _check_reference(config: Config, arch: ModelArchitecture) -> None:
    reference = read_architecture(config.model.reference, key="model.reference")
    for field in fields(arch):
        expected, found = getattr(arch, field.name), getattr(reference, field.name)
        if found != expected:
            raise ConfigError(
                f"model.reference={config.model.reference} has {field.name} {found}, the model has {expected}; choose "
                "a reference model of the same architecture"
            )


def prepare_run_folder(spec: RunSpec, *, resume: bool, overwrite: bool) -> None:
    """Create or clear the run folder, so that no run writes into the results of another by accident.

    A folder that holds a run is refused without `resume` or `overwrite`. `overwrite` deletes what a run writes and
    nothing else. `resume` takes the folder as it is, even an empty one. A second call changes nothing.

    Raises:
        ConfigError: the folder holds a run and neither flag is given; both flags are given; an input of the run lies
            among the files to delete; the folder cannot be written to.
    """
    folder = spec.folder
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
        for key, path in _inputs(spec.configs):
            if inside := [top for top in written if path.resolve().is_relative_to(top.resolve())]:
                raise ConfigError(f"{key}={path} lies in {inside[0]}, which --overwrite would delete; move it first")
    try:
        for path in written if overwrite else ():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        folder.root.mkdir(parents=True, exist_ok=True)
        checkpoints = [folder.checkpoints(name) for name in ("", *(config.name for config in spec.configs))]
        for target in (folder.root, *checkpoints):
            if target.exists():
                with tempfile.TemporaryFile(dir=target):
                    pass
    except OSError as error:
        raise ConfigError(
            f"output={folder.root} cannot be written to ({error.strerror}); fix that, or choose another folder with "
            "--output=..."
        ) from None


def written_paths(folder: RunFolder) -> list[Path]:
    """Every file and folder at the top of the run folder that a run writes."""
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
        named += [("data.eval", file) for file in config.data.eval]
        yield from ((key, Path(value)) for key, value in named if value)
