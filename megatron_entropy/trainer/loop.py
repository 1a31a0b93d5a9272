"""The training loop, the same on every rank.

`train` runs the stages of a configuration one after the other. A stage restores or loads its weights, then repeats:
push, generate, score, teacher, reward, credit, update, log, evaluate, save. Rank 0 drives engines and verifier and
writes the files; nothing random is decided twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import torch

from megatron_entropy.actor.actor import Actor
from megatron_entropy.actor.model import resolve_dtype
from megatron_entropy.checkpoint import saver as checkpoint
from megatron_entropy.config.architecture import read_architecture
from megatron_entropy.config.schema import Config
from megatron_entropy.data.dataset import PromptStream, load_prompts
from megatron_entropy.data.tokenizer import load_tokenizer
from megatron_entropy.distributed import cpu, process_groups, seeds
from megatron_entropy.distributed.seeds import derive_seed
from megatron_entropy.errors import NonFiniteLossError
from megatron_entropy.evaluation.evaluate import evaluate
from megatron_entropy.methods import build_method
from megatron_entropy.monitor.console import summary_line
from megatron_entropy.monitor.metrics import MetricsWriter
from megatron_entropy.monitor.report import write_report
from megatron_entropy.monitor.rollout_dumps import dump_rollouts
from megatron_entropy.monitor.run_folder import RunFolder
from megatron_entropy.monitor.summary import StageSummary, read_summary, write_summary
from megatron_entropy.monitor.timer import StepTimer
from megatron_entropy.records import Group, Metric, Prompt, Sample
from megatron_entropy.rollout.engine import EngineSpec
from megatron_entropy.rollout.pool import EnginePool
from megatron_entropy.trainer.rollouts import Sampler
from megatron_entropy.weights import source as weights
from megatron_entropy.weights.hf_folder import write_folder
from megatron_entropy.weights.megatron_folder import open_model
from megatron_entropy.weights.peft import write_adapter
from megatron_entropy.weights.sync import WeightSync

log = logging.getLogger(__name__)


class Stopped(Exception):
    """A stop signal was obeyed: the stage was saved and can be resumed."""


def train(configs: Sequence[Config], *, resume: bool) -> None:
    """Run all stages; a collective over the ranks that `process_groups.init_process_group` concat_response_tokens.

    Args:
        configs: checked stages, in order.
        resume: go on from the newest checkpoint; finished stages are passed over.
    Raises:
        Stopped: after SIGINT or SIGTERM, once the current step is done and saved.
        UserError: on every rank, for what the user can mend.
        Fault: on every rank, for what cannot go on.
    """
    folder = RunFolder(Path(configs[0].output))
    stop = _StopSignal()
    done = process_groups.run_on_rank_zero(lambda: read_summary(folder) if resume else [])
    model = configs[0].model.path
    with _Engines(configs) as engines:
        for number, config in enumerate(configs):
            last = number == len(configs) - 1
            config = config.model_copy(update={"model": config.model.model_copy(update={"path": model})})
            if config.name not in [entry.name for entry in done]:
                start = time.perf_counter()
                Stage(config, folder, engines, stop, resume=resume, last=last).run()
                if process_groups.rank() == 0:
                    done.append(StageSummary.of_stage(folder, config, seconds=time.perf_counter() - start))
                    write_summary(folder, done)
                    write_report(folder)
            model = str(folder.export(config.name, last))


class Stage:
    """One stage of training: its parts, and the loop over its steps."""

    def __init__(
        self, config: Config, folder: RunFolder, engines: _Engines, stop: _StopSignal, *, resume: bool, last: bool
    ) -> None:
        """Build everything on this rank; a collective."""
        self.config, self.folder, self.last, self.stop = config, folder, last, stop
        self.clock = StepTimer()
        process_groups.init_model_parallel(config.actor.parallel, config.seed)
        self.method = build_method(config)
        self.arch = read_architecture(config.model.path)
        self.tokenizer = load_tokenizer(config.data.tokenizer or config.model.path, vocab_size=self.arch.vocab_size)
        samples_itself = self.method.uses_rollouts
        self.temperature = config.rollout.temperature if samples_itself else 1.0
        longest_target = None if samples_itself else config.rollout.max_response_tokens
        self.prompts = self.method.select(self._load(config.data.train, longest_target))
        self.eval_prompts = self._load(config.data.eval, None) if config.data.eval else []
        updates = config.steps * config.batch.updates
        self.actor = Actor(self.arch, config.actor, total_updates=updates, seed=config.seed)
        self.source = self._stream(config.rollout.dtype)
        self.progress = self._restore(resume)
        self.saver = checkpoint.Saver(
            folder.checkpoints(config.name), keep=config.checkpoint.keep, asynchronous=config.checkpoint.asynchronous
        )
        needs_engines = (samples_itself or bool(self.eval_prompts)) and not config.rollout.replay
        if needs_engines and config.rollout.colocate:
            self.actor.offload()  # engines measure what is free when they start; the sampler brings it back
        pool = engines.start() if needs_engines else None
        stop.listen()
        address = process_groups.broadcast_object(pool.address if pool else None)
        self.sampler = Sampler(
            config,
            stream=PromptStream(self.prompts, seed=config.seed, position=self.progress.position),
            tokenizer=self.tokenizer,
            actor=self.actor,
            push=self._weight_sync(address or "", pool) if needs_engines else None,
            pool=pool,
            clock=self.clock,
            temperature=self.temperature,
            reference=self.method.reference,
        )

    def run(self) -> None:
        """Train to the end and export the model."""
        config = self.config
        with self._open_writer() as self.writer, contextlib.closing(self.saver), contextlib.closing(self.sampler):
            if self.progress.step == 0:
                self._log(0, self._evaluate(0), [])
            for step in range(self.progress.step + 1, config.steps + 1):
                self._step(step)
                self.saver.check()
                if self.stop.requested():
                    self._save()
                    self.saver.wait()
                    raise Stopped(f"stopped after step {step} of stage {config.name}; --resume goes on from there")
                if step == config.steps or (config.checkpoint.every and step % config.checkpoint.every == 0):
                    self._save()
            self.saver.wait()
            self._export()

    def _step(self, step: int) -> None:
        method, sampler, config = self.method, self.sampler, self.config
        seeds.seed_generators(derive_seed(config.seed, config.name, step))
        sampler.begin_step(step)
        groups = method.generate(sampler)
        if method.scores:
            groups = sampler.score(groups, entropy="entropy" in method.scores)
        groups = method.score_reference(groups, sampler)
        with self.clock("reward"):
            groups = method.reward(groups)
        metrics: dict[str, Metric] = {}
        trained: list[Group] = []
        for part in _split(groups, config.batch.updates):
            part = method.compute_advantages(part)
            trained += part
            metrics = _add(metrics, self._update(step, [s for group in part for s in group.samples]))
        sampler.weights_changed()
        self.progress = dataclasses.replace(self.progress, step=step, position=sampler.stream.position)
        metrics = {**metrics, **sampler.metrics(), **method.counted(), **_rewards(trained)}
        if step == config.steps or (config.eval.every and step % config.eval.every == 0):
            metrics |= self._evaluate(step)
        self._log(step, metrics, trained)

    def _update(self, step: int, samples: list[Sample]) -> dict[str, Metric]:
        if not samples:
            log.warning("step %d: no sample left to train on, the optimizer step is left out", step)
            return {"train/skipped": Metric(1.0)}
        with self.clock("update"):
            try:
                metrics = self.actor.update(
                    samples,
                    self.method.loss,
                    temperature=self.temperature,
                    divergence=self.method.divergence,
                    by_policy=self.method.reference == "policy",
                )
            except NonFiniteLossError as error:
                kept = self.folder.checkpoints(self.config.name)
                raise NonFiniteLossError(
                    f"stage {self.config.name}, step {step}: {error}; the update was not applied, the last checkpoint "
                    f"in {kept} is good; lower actor.optimizer.lr or look at the step's data"
                ) from None
        self.progress = dataclasses.replace(self.progress, updates=self.progress.updates + 1)
        return metrics

    def _evaluate(self, step: int) -> dict[str, Metric]:
        if not self.eval_prompts:
            return {}
        with self.clock("evaluate"):
            metrics, groups = evaluate(self.sampler, self.eval_prompts, self.config.eval)
            if process_groups.rank() == 0:
                dump_rollouts(self.folder.evaluation(self.config.name, step), groups, self.tokenizer.piece)
        return metrics

    def _log(self, step: int, metrics: dict[str, Metric], trained: list[Group]) -> None:
        if process_groups.rank() == 0:
            every = self.config.log.rollouts_every
            if self.method.uses_rollouts and trained and every and step % every == 0:
                dump_rollouts(self.folder.rollouts(self.config.name, step), trained, self.tokenizer.piece)
            seconds = self.clock.split()
            assert self.writer is not None
            self.writer.write(step, metrics, seconds)
            log.info("%s %s", self.config.name, summary_line(step, self.config.steps, metrics, seconds))

    def _save(self) -> None:
        with self.clock("save"):
            self.saver.save(self.actor, dataclasses.replace(self.progress, method=self.method.state()))

    def _restore(self, resume: bool) -> checkpoint.Progress:
        """Load the newest checkpoint, or the model folder."""
        fresh = checkpoint.Progress(0, 0, 0, self.config.fingerprint())
        stage_folder = self.folder.checkpoints(self.config.name)
        found = process_groups.run_on_rank_zero(lambda: checkpoint.newest(stage_folder) if resume else None)
        self._begin(is_resumed=found is not None)
        if found is None:
            if resume:
                log.info("stage %s has no complete checkpoint and starts from its beginning", self.config.name)
            return fresh
        path, progress = found
        if progress.fingerprint != fresh.fingerprint:
            log.warning("%s was written with other settings; going on with the present ones", path)
        checkpoint.load(path, self.actor, progress)
        self.method.restore(progress.method)
        log.info("resuming stage %s after step %d from %s", self.config.name, progress.step, path)
        return dataclasses.replace(progress, fingerprint=fresh.fingerprint)

    def _begin(self, *, is_resumed: bool) -> None:
        """Load what a checkpoint does not hold: the first weights, LoRA's base, what the reference starts from."""
        model, reference = self.config.model, self.method.reference
        needs_reference = reference in ("initial", "ema")
        if needs_reference and model.reference:
            self._load_weights(model.reference)
            self.actor.keep_reference(moving=reference == "ema", own=True)
        if not is_resumed or needs_reference or self.config.actor.lora.rank:
            self._load_weights(model.path)
        if needs_reference and not model.reference:
            self.actor.keep_reference(moving=reference == "ema")

    def _load_weights(self, path: str) -> None:
        layout = self.config.actor.parallel
        weights.load(open_model(path, self.arch), self.arch, layout, self.actor.named_shards())
        self.actor.after_load()

    def _load(self, files: Sequence[str], max_target_tokens: int | None) -> list[Prompt]:
        data = self.config.data
        loaded = load_prompts(
            files,
            self.tokenizer,
            max_prompt_tokens=data.max_prompt_tokens,
            max_target_tokens=max_target_tokens,
            schema=data.columns,
            template=data.template or None,
            system=data.system or None,
            chat_options=data.chat_options,
        )
        if loaded.skipped.prompt or loaded.skipped.target:
            log.warning("%s: %s of %d rows", ", ".join(files), loaded.skipped, len(loaded))
        return list(loaded.prompts)

    def _stream(self, dtype: str) -> weights.ShardedSource:
        layout = self.config.actor.parallel
        return weights.ShardedSource(self.arch, layout, self.actor.merged_shards(), resolve_dtype(dtype))

    def _weight_sync(self, address: str, pool: EnginePool | None) -> WeightSync:
        is_single_machine = process_groups.is_single_machine()
        backend = process_groups.run_on_rank_zero(
            lambda: pool.backend(trainer_on_one_machine=is_single_machine) if pool else ""
        )
        return WeightSync(self.source, address=address, checksum=self.config.rollout.verify_weights, backend=backend)

    def _export(self) -> None:
        """Write the model as a Hugging Face folder, and LoRA's adapter beside it; a collective."""
        config = self.config.actor
        source = self._stream(config.dtype)
        target = self.folder.export(self.config.name, self.last)
        if process_groups.rank() == 0:
            tensors = ((name, tensor) for name, tensor in source if tensor is not None)
            write_folder(target, source.metadata(), tensors, like=Path(self.config.model.path))
        else:
            for _ in source:
                pass
        if config.lora.rank:
            write_adapter(
                self.folder.adapter(self.config.name, self.last), self.arch, config, self.actor.adapter_shards(),
                base=self.config.model.path, dtype=resolve_dtype(config.dtype),
            )  # fmt: skip
        torch.distributed.barrier()

    def _open_writer(self) -> contextlib.AbstractContextManager[MetricsWriter | None]:
        if process_groups.rank() != 0:
            return contextlib.nullcontext()
        return MetricsWriter(self.folder, self.config.name, self.config.log, self.progress.step)


class _Engines:
    """The run's engines on rank 0: started when a stage first needs them, shared by all stages."""

    def __init__(self, configs: Sequence[Config]) -> None:
        self._configs = configs
        self._pool: EnginePool | None = None

    def __enter__(self) -> _Engines:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def start(self) -> EnginePool | None:
        """The engines on rank 0, None elsewhere; they may still be loading."""
        if process_groups.rank() == 0 and self._pool is None:
            first = self._configs[0]
            arch = read_architecture(first.model.path)
            tokenizer = load_tokenizer(first.data.tokenizer or first.model.path, vocab_size=arch.vocab_size)
            spec = EngineSpec(
                model_folder=first.model.path,
                max_model_len=max(c.data.max_prompt_tokens + c.rollout.max_response_tokens for c in self._configs),
                eos_ids=tokenizer.eos_ids,
                dtype=str(resolve_dtype(first.rollout.dtype)).removeprefix("torch."),
                device="cuda" if cpu.device().type == "cuda" else "cpu",
            )
            self._pool = EnginePool(first.rollout, spec)
        return self._pool


class _StopSignal:
    """SIGINT and SIGTERM ask for a stop at the end of a step; every rank hears of it from rank 0."""

    def __init__(self) -> None:
        self._asked = False
        self.listen()

    def listen(self) -> None:
        """Install the handlers; to be called again after Ray has started, which puts its own in their place."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if process_groups.rank() == 0:
            log.warning("%s received: stopping after this step", signal.Signals(number).name)

    def requested(self) -> bool:
        """Whether to stop now; a collective."""
        return process_groups.broadcast_object(self._asked)


def _split(groups: list[Group], parts: int) -> list[list[Group]]:
    """Mini-batches of whole groups, as even as can be."""
    edges = [len(groups) * i // parts for i in range(parts + 1)]
    return [groups[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def _add(left: dict[str, Metric], right: dict[str, Metric]) -> dict[str, Metric]:
    return {name: left.get(name, Metric(0.0, 0.0)) + right.get(name, Metric(0.0, 0.0)) for name in left | right}


def _rewards(groups: list[Group]) -> dict[str, Metric]:
    rewards = [s.reward for group in groups for s in group.samples if s.reward is not None]
    return {"reward/mean": Metric(sum(rewards), len(rewards))} if rewards else {}
