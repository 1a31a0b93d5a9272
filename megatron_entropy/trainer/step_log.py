"""Output of a step: metrics files, console line, rollout dumps. Rank 0 writes, other ranks do nothing."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence

from megatron_entropy.distributed import process_groups
from megatron_entropy.monitor.console import summary_line
from megatron_entropy.monitor.metrics import MetricsWriter
from megatron_entropy.monitor.rollout_dumps import dump_rollouts
from megatron_entropy.records import Group, Metric, samples_of
from megatron_entropy.trainer.build import Components

log = logging.getLogger(__name__)


class StepLog:
    """Writes the metrics and samples of a stage's steps."""

    def __init__(self, components: Components) -> None:
        """Open the metrics files; rows of steps after the restored one are removed from them."""
        self._parts = components
        self._writer: MetricsWriter | None = None
        self._recent: deque[float] = deque(maxlen=10)
        if process_groups.rank() == 0:
            config = components.config
            self._writer = MetricsWriter(components.folder, config.name, config.log, components.progress.step)

    def step(self, step: int, metrics: Mapping[str, Metric], groups: Sequence[Group]) -> None:
        """Write the row of a step and, when it is time, its samples; ends the step's timing."""
        if self._writer is None:
            return
        components, config = self._parts, self._parts.config
        every = config.log.rollouts_every
        if components.method.uses_rollouts and groups and every and step % every == 0:
            dump_rollouts(components.folder.rollouts(config.name, step), groups, components.tokenizer.piece)
        seconds = components.timer.split()
        metrics = {**metrics, **throughput(groups, metrics, seconds)}
        self._writer.write(step, metrics, seconds)
        if step:
            self._recent.append(seconds["step"])
        remaining = (config.steps - step) * sum(self._recent) / max(len(self._recent), 1)
        name = f"{config.name} ({config.actor.fp8.label})" if config.actor.fp8.emulate else config.name
        log.info("%s %s", name, summary_line(step, config.steps, metrics, seconds, remaining=remaining))

    def evaluation(self, step: int, groups: Sequence[Group]) -> None:
        """Write the samples of an evaluation."""
        if self._writer is not None:
            components = self._parts
            dump_rollouts(
                components.folder.evaluation(components.config.name, step), groups, components.tokenizer.piece
            )

    def close(self) -> None:
        """Close the files."""
        if self._writer is not None:
            self._writer.close()


def throughput(
    groups: Sequence[Group], metrics: Mapping[str, Metric], seconds: Mapping[str, float]
) -> dict[str, Metric]:
    """Return `perf/throughput` and, where engines sampled the responses, `perf/generate_throughput`, in tokens/s.

    Args:
        groups: of the step, branches and all; their prompts count.
        metrics: of the step, `rollout/tokens` among them.
        seconds: by phase; evaluation and checkpoint do not count.
    """
    rates = {}
    training = seconds["step"] - seconds.get("eval", 0.0) - seconds.get("save", 0.0)
    if groups:
        rates["perf/throughput"] = Metric(sum(len(sample.tokens) for sample in samples_of(groups)), training)
    if "rollout/tokens" in metrics and "generate" in seconds:  # a replay has no phase `generate`
        rates["perf/generate_throughput"] = Metric(metrics["rollout/tokens"].value, seconds["generate"])
    return rates
