"""The training loop, the same on every rank.

`train` runs the stages of a configuration one after the other. A step calls generate, score, score_reference, reward,
compute_advantages and update, then evaluates, logs and saves. Only rank 0 talks to the engines and the verifier and
writes files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import tomli_w

from megatron_entropy.actor.head_check import HeadCase, check_head
from megatron_entropy.config.architecture import read_architecture
from megatron_entropy.config.schema import Config
from megatron_entropy.distributed import memory, process_groups, seeds
from megatron_entropy.distributed.dtypes import resolve_dtype
from megatron_entropy.errors import NonFiniteLossError
from megatron_entropy.evaluation.evaluate import evaluate
from megatron_entropy.files import atomic_write_text
from megatron_entropy.methods import build_method, explain_stage
from megatron_entropy.monitor.report import write_report
from megatron_entropy.monitor.run_folder import RunFolder
from megatron_entropy.monitor.summary import StageSummary, write_summary
from megatron_entropy.records import Group, Metric, merge_trained, samples_of
from megatron_entropy.trainer.build import Components, build, export
from megatron_entropy.trainer.resources import RunResources, needs_engines
from megatron_entropy.trainer.resume import StagePlan, plan_stages
from megatron_entropy.trainer.step_log import StepLog
from megatron_entropy.trainer.stop_signal import Stopped, StopSignal

log = logging.getLogger(__name__)


def train(configs: Sequence[Config], *, resume: bool) -> None:
    """Run all stages; a collective, to be called after `process_groups.init_process_group`.

    Args:
        configs: checked configurations of the stages, in order.
        resume: continue from the newest checkpoint; finished stages are skipped.
    Raises:
        Stopped: after SIGINT or SIGTERM, once the current step is done and saved.
        UserError: on every rank, for what the user can fix.
        Fault: on every rank, when the run cannot continue.
    """
    folder = RunFolder(Path(configs[0].output))
    stop = StopSignal()
    plans = process_groups.run_on_rank_zero(lambda: plan_stages(configs, folder, resume=resume))
    done = {plan.summary.name: plan.summary for plan in plans if plan.summary is not None}
    if len(done) == len(configs):
        log.info("every stage is finished, nothing is trained; more steps or stages continue the run")
    _check_head([config for config, plan in zip(configs, plans, strict=True) if plan.summary is None])
    model = configs[0].model.path
    with RunResources(configs, stop) as resources:
        for config, plan in zip(configs, plans, strict=True):
            last = config is configs[-1]
            if plan.summary is None:
                start = time.perf_counter()
                config = config.model_copy(update={"model": config.model.model_copy(update={"path": model})})
                _train_stage(config, folder, resources, stop, plans, plan, last=last)
                if process_groups.rank() == 0:
                    done[config.name] = StageSummary.of_stage(folder, config, seconds=time.perf_counter() - start)
                    write_summary(folder, [done[stage.name] for stage in configs if stage.name in done])
                    write_report(folder, explain_stage)
            model = str(folder.export(config.name, last))


def _check_head(configs: Sequence[Config]) -> None:
    """Check that every rank computes the output layer of these stages correctly, with the settings of each."""
    if not configs:
        return
    arch = read_architecture(configs[0].model.path)
    cases = [
        HeadCase(
            resolve_dtype(config.actor.dtype, arch),
            arch.hidden_size,
            config.actor.performance.head_kernels,
            build_method(config).divergence,
        )
        for config in configs
    ]
    error = check_head(list(dict.fromkeys(cases)))
    log.info("output layer checked against float64: values are off by at most %.1e nats", error)


def _train_stage(
    config: Config,
    folder: RunFolder,
    resources: RunResources,
    stop: StopSignal,
    plans: Sequence[StagePlan],
    plan: StagePlan,
    *,
    last: bool,
) -> None:
    """Train one stage; its memory is free when this returns, because the next stage's actor needs it."""
    if needs_engines(config) and not config.rollout.colocate:
        resources.start_engines()  # they load while the actor is built
    memory.release()
    before = memory.used_memory()
    components = build(config, folder, resources, plan)
    process_groups.run_on_rank_zero(lambda: _write_settings(folder, plans))
    TrainingLoop(components, stop).run(last=last)
    components.actor.close()
    del components
    memory.release()
    log.info("stage %s: %.3f GB in use before it, %.3f GB after it", config.name, before, memory.used_memory())


def _write_settings(folder: RunFolder, plans: Sequence[StagePlan]) -> None:
    """Write `config.toml`, when a stage starts to train: it never says what was not trained."""
    atomic_write_text(folder.config, tomli_w.dumps({"stages": [plan.settings for plan in plans]}))


class TrainingLoop:
    """The loop over the steps of one stage; every method is a collective."""

    def __init__(self, components: Components, stop: StopSignal) -> None:
        self.components = components
        self.config = components.config
        self.method = components.method
        self.rollouts = components.rollouts
        self.timer = components.timer
        self.progress = components.progress
        self.stop = stop
        self.log = StepLog(components)

    def run(self, *, last: bool) -> None:
        """Train until the last step, then export the model."""
        components, config = self.components, self.config
        with contextlib.ExitStack() as stack:
            # They are closed from the last to the first.
            for component in (self.log, components.saver, components.rollouts, components.service):
                stack.callback(component.close)
            if self.progress.step == 0:
                self.log.step(0, self.evaluate(0), [])
            for step in range(self.progress.step + 1, config.steps + 1):
                metrics, groups = self.train_step(step)
                if self.is_due(step, config.eval.every):
                    metrics |= self.evaluate(step)
                self.log.step(step, metrics, groups)
                components.saver.check()
                is_stopped = self.stop.is_received()
                if is_stopped or self.is_due(step, config.checkpoint.every):
                    self.save()
                if is_stopped:
                    components.saver.wait()
                    raise Stopped(f"stopped after step {step} of stage {config.name}; resume it with --resume")
            components.saver.wait()
            export(components, last=last)

    def train_step(self, step: int) -> tuple[dict[str, Metric], list[Group]]:
        """Generate, score and reward a batch, then update the weights on each of its mini-batches."""
        method, rollouts, config = self.method, self.rollouts, self.config
        seeds.seed_generators(seeds.derive_seed(config.seed, config.name, step))
        rollouts.begin_step(step)
        groups = method.generate(rollouts)
        if method.scores:
            groups = rollouts.score(
                groups, entropy="entropy" in method.scores, take_rollout_entropy=method.takes_rollout_entropy
            )
        groups = method.score_reference(groups, rollouts)
        with self.timer("reward"):
            groups = method.reward(groups)
        metrics: dict[str, Metric] = {}
        trained: list[Group] = []
        for minibatch in split_groups(groups, config.batch.updates):
            minibatch = method.compute_advantages(minibatch)
            metrics = add_metrics(metrics, self.update(step, minibatch))
            trained += minibatch
        self.components.actor.gather_weights()
        self.components.service.weights_changed()  # the engines get them before they generate again
        self.progress = dataclasses.replace(self.progress, step=step, position=rollouts.position)
        metrics |= {**rollouts.pop_metrics(), **method.pop_metrics(), **reward_metrics(trained)}
        metrics["perf/memory"] = Metric(process_groups.largest(memory.peak_memory()))
        return metrics, merge_trained(groups, trained)

    def update(self, step: int, minibatch: list[Group]) -> dict[str, Metric]:
        """Take one optimizer step, unless the mini-batch has no samples."""
        samples = samples_of(minibatch)
        if not samples:
            log.warning("step %d: no sample is left to train on, the optimizer step is skipped", step)
            return {"train/skipped": Metric(1.0)}
        actor, method, temperature = self.components.actor, self.method, self.rollouts.temperature
        try:
            with self.timer("update"):
                metrics = actor.update(samples, method.loss, temperature=temperature, divergence=method.divergence)
        except NonFiniteLossError as error:
            raise NonFiniteLossError(
                f"stage {self.config.name}, step {step}: {error}; the update was not applied and nothing of the step "
                "is saved; start again with a lower actor.optimizer.lr, or look at the step's data"
            ) from None
        self.progress = dataclasses.replace(self.progress, updates=self.progress.updates + 1)
        return metrics

    def evaluate(self, step: int) -> dict[str, Metric]:
        """Measure the policy on the eval prompts, if there are any."""
        if not self.components.eval_prompts:
            return {}
        with self.timer("eval"):
            metrics, groups = evaluate(self.rollouts, self.components.eval_prompts, self.config.eval)
            self.log.evaluation(step, groups)
        return metrics

    def save(self) -> None:
        """Start a checkpoint."""
        progress = dataclasses.replace(self.progress, method=self.method.state())
        with self.timer("save"):
            self.components.saver.save(self.components.actor, progress)

    def is_due(self, step: int, every: int) -> bool:
        """Whether `step` is the last one or, unless `every` is 0, a multiple of `every`."""
        return step == self.config.steps or bool(every and step % every == 0)


def split_groups(groups: list[Group], count: int) -> list[list[Group]]:
    """Split a batch into mini-batches of whole groups, as evenly as possible."""
    edges = [len(groups) * i // count for i in range(count + 1)]
    return [groups[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def add_metrics(left: dict[str, Metric], right: dict[str, Metric]) -> dict[str, Metric]:
    """Add the metrics of two mini-batches."""
    return {name: left.get(name, Metric(0.0, 0.0)) + right.get(name, Metric(0.0, 0.0)) for name in left | right}


def reward_metrics(groups: list[Group]) -> dict[str, Metric]:
    """`reward/mean` over the samples that have a reward."""
    rewards = [sample.reward for sample in samples_of(groups) if sample.reward is not None]
    return {"reward/mean": Metric(sum(rewards), len(rewards))} if rewards else {}
