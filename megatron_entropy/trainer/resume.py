"""What a resumed run continues with: which stages are finished, and the checkpoint of the one that is not.

A stage is finished when it has trained all of its steps and exported its model. More steps extend it. Settings that
change the numbers must be those that the stage was trained with.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_entropy.checkpoint import saver as checkpoint
from megatron_entropy.config.changes import find_changes
from megatron_entropy.config.schema import Config
from megatron_entropy.errors import CheckpointError, ConfigError
from megatron_entropy.monitor.run_folder import RunFolder
from megatron_entropy.monitor.summary import StageSummary, read_summary
from megatron_entropy.weights.manifest import StageProgress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StagePlan:
    """Where a stage stands.

    `settings`: those it was or will be trained with, all of them. `checkpoint`: the one to continue from.
    `summary`: of a finished stage.
    """

    settings: dict[str, Any]
    checkpoint: tuple[Path, StageProgress] | None = None
    summary: StageSummary | None = None


def plan_stages(configs: Sequence[Config], folder: RunFolder, *, resume: bool) -> list[StagePlan]:
    """Find out for every stage where it stands; reads the checkpoint that training continues from.

    Raises:
        ConfigError: a setting differs from what a stage was trained with, or a later stage has started from this one.
        CheckpointError: every checkpoint of a stage is damaged.
        DataError: `summary.json` is damaged.
    """
    if not resume:
        return [StagePlan(config.model_dump(mode="json")) for config in configs]
    summaries = read_summary(folder)
    found, expected = [entry.name for entry in summaries], [config.name for config in configs]
    if found != expected[: len(found)]:
        raise ConfigError(
            f"{folder.root} has finished the stages {', '.join(found)}, but the configuration has "
            f"{', '.join(expected)}; resume it with the stages that started the run, or choose another output"
        )
    plans = []
    for number, config in enumerate(configs):
        summary = summaries[number] if number < len(summaries) else None
        later = [entry.name for entry in summaries[number + 1 :]]
        later += [other.name for other in configs[number + 1 :] if folder.checkpoints(other.name).exists()]
        plans.append(_plan_stage(config, folder, summary, later, is_last=number == len(configs) - 1))
    return plans


def _plan_stage(
    config: Config, folder: RunFolder, summary: StageSummary | None, later: Sequence[str], *, is_last: bool
) -> StagePlan:
    """Plan one stage; `later`: the stages that have started from its model."""
    settings = config.model_dump(mode="json")
    is_finished = False
    if summary is not None:
        if later and config.steps != summary.steps:
            raise ConfigError(
                f"steps={config.steps}: stage {config.name} was finished after {summary.steps} steps and stage "
                f"{later[0]} started from its model; set its steps back (--stages.{config.name}.steps={summary.steps})"
            )
        is_exported = bool(later) or folder.export(config.name, is_last).is_dir()
        is_finished = summary.steps == config.steps and is_exported
    try:
        found = checkpoint.newest(folder.checkpoints(config.name), checksums=not is_finished)
    except CheckpointError:
        if not is_finished:
            raise
        found = None  # the exported model is what counts
    if found is None:
        if summary is None:
            log.info("stage %s has no complete checkpoint and starts from its first step", config.name)
        elif not is_finished:
            raise ConfigError(
                f"stage {config.name} was finished after {summary.steps} steps and has no checkpoint left to continue "
                "from; choose another output"
            )
        return StagePlan(settings, summary=summary)
    path, progress = found
    changes = find_changes(config, progress.settings)
    for change in changes:
        if not change.is_free:
            raise ConfigError(
                f"{change.key}: stage {config.name} was trained with {_show(change.old)}, the configuration has "
                f"{_show(change.new)}; set it back, or choose another output"
            )
    if config.steps < progress.step:
        raise ConfigError(
            f"steps={config.steps}: stage {config.name} has trained {progress.step} steps already ({path}); raise it, "
            "or choose another output"
        )
    if not is_finished:
        return StagePlan(settings, found)
    for change in changes:
        if change.key != "output":
            log.warning("%s=%s has no effect: stage %s is finished", change.key, _show(change.new), config.name)
    return StagePlan({**progress.settings, "output": config.output} if progress.settings else settings, summary=summary)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
