"""From a configuration file to running ranks: checks that need no torch, the run folder's policy, torchrun.

`megatron-entropy train` runs torchrun's agent in its own process, so that Ctrl-C and `kill` reach the ranks as a
request to stop after the step (torchrun alone kills them after 30 seconds), and so that a failure ends in the one
line of the rank that failed first. Under plain torchrun the ranks use `resolve`, `prepare_run_folder` and
`report_failure` themselves. Importing this module imports no torch.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_entropy.config import check, load
from megatron_entropy.config.architecture import ModelArchitecture, read_architecture
from megatron_entropy.config.schema import Config, MethodConfig
from megatron_entropy.errors import ConfigError, DataError
from megatron_entropy.methods import build_method
from megatron_entropy.monitor.run_folder import RunFolder

if TYPE_CHECKING:
    from megatron_entropy.methods.base import Method
    from megatron_entropy.records import Prompt


@dataclass(frozen=True)
class Stages:
    """A checked configuration: one entry per stage, and the shape of the model that the first one starts from."""

    configs: list[Config]
    arch: ModelArchitecture

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
    configs = load.load(path, overrides, method_configs)
    check.check_stages(configs)
    arch = read_architecture(configs[0].model.path)
    for config in configs:
        try:
            check.check(config, arch, world_size)
            build_method(config)  # compares the method's settings with the stage's
            if config.model.reference:
                _check_reference(config, arch)
        except ConfigError as error:
            raise ConfigError(f"stage {config.name}: {error}" if len(configs) > 1 else str(error)) from None
        for key, files in (("data.train", config.data.train), ("data.eval", config.data.eval)):
            for file in files:
                if not Path(file).is_file():
                    raise DataError(f"{key}: no such file: {file}")
    return Stages(configs, arch)


def check_rows(stages: Stages) -> None:
    """Have every stage choose its prompts once, so that what a later stage lacks is told before the first one trains.

    Single rows may lack something: they may be too long to be trained on.

    Raises:
        DataError: a file that cannot be read, or a column that every row lacks, naming the stage.
    """
    from megatron_entropy.data.dataset import read_prompts  # pyarrow: not for those who only ask for help

    for config in stages.configs:
        try:
            read_prompts(config.data.eval, schema=config.data.columns)
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


def _check_reference(config: Config, arch: ModelArchitecture) -> None:
    other = read_architecture(config.model.reference)
    for field in fields(arch):
        mine, its = getattr(arch, field.name), getattr(other, field.name)
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
        named += [("data.eval", file) for file in config.data.eval]
        yield from ((key, Path(value)) for key, value in named if value)
