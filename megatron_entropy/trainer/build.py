"""The components of a training stage: built, with weights loaded or restored, and the exported model at its end."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_entropy.actor.actor import Actor
from megatron_entropy.actor.reference import needs_weights
from megatron_entropy.checkpoint import saver as checkpoint
from megatron_entropy.checkpoint.saver import Saver
from megatron_entropy.config import speedups
from megatron_entropy.config.schema import Config
from megatron_entropy.data.dataset import PromptStream, load_prompts
from megatron_entropy.data.tokenizer import Tokenizer
from megatron_entropy.distributed import process_groups
from megatron_entropy.distributed.dtypes import DtypeSetting, choose_dtype, resolve_dtype
from megatron_entropy.errors import CheckpointError, Fault
from megatron_entropy.methods import build_method
from megatron_entropy.methods.base import Method
from megatron_entropy.monitor.run_folder import RunFolder
from megatron_entropy.monitor.timer import StepTimer
from megatron_entropy.records import Prompt
from megatron_entropy.rollout.pool import EnginePool
from megatron_entropy.trainer.resources import RunResources, needs_engines
from megatron_entropy.trainer.resume import StagePlan
from megatron_entropy.trainer.rollout_service import RolloutService
from megatron_entropy.trainer.rollouts import MethodRollouts
from megatron_entropy.weights import source as weights
from megatron_entropy.weights.hf_folder import write_folder
from megatron_entropy.weights.manifest import StageProgress
from megatron_entropy.weights.megatron_folder import open_model
from megatron_entropy.weights.peft import write_adapter
from megatron_entropy.weights.sync import WeightSync

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Components:
    """What a stage trains with, on this rank. `progress`: where it stands; `timer`: splits the time of a step."""

    config: Config
    folder: RunFolder
    method: Method[Any]
    tokenizer: Tokenizer
    actor: Actor
    service: RolloutService
    rollouts: MethodRollouts
    eval_prompts: list[Prompt]
    saver: Saver
    timer: StepTimer
    progress: StageProgress


def build(config: Config, folder: RunFolder, resources: RunResources, plan: StagePlan) -> Components:
    """Build the components of a stage and load its weights; a collective.

    Args:
        plan: names the checkpoint to restore, if there is one.
    Raises:
        UserError: on every rank, for wrong settings, data, weights or checkpoints.
        Fault: on every rank, when engines cannot start.
    """
    timer = StepTimer()
    # First, because it seeds the generators of this rank. Each stage may have its own parallel layout.
    process_groups.init_model_parallel(config.actor.parallel, config.seed)
    method = build_method(config)
    arch = resources.arch
    tokenizer = resources.tokenizer(config)
    # A target is limited like a response. A method that samples responses does not train on targets.
    max_target_tokens = None if method.uses_rollouts else config.rollout.max_response_tokens
    prompts = method.select(_load_prompts(config, config.data.train, tokenizer, max_target_tokens))
    eval_prompts = _load_prompts(config, config.data.eval, tokenizer, None) if config.data.eval else []
    log.info(
        "stage %s: %d training and %d eval prompts; building the model", config.name, len(prompts), len(eval_prompts)
    )
    if "auto" in (config.actor.dtype, config.rollout.dtype):
        log.info("stage %s: dtype auto: %s, %s", config.name, *choose_dtype(arch))
    log.info("stage %s: %s", config.name, speedups.describe(config.actor))
    actor = Actor(arch, config.actor, total_updates=config.steps * config.batch.updates, seed=config.seed)
    source = _weight_source(actor, config.rollout.dtype)
    progress = _restore(config, actor, method, plan)
    saver = Saver(
        folder.checkpoints(config.name),
        keep=config.checkpoint.keep,
        asynchronous=config.checkpoint.asynchronous,
        resumed_step=progress.step,
    )
    pool, weight_sync = None, None
    if needs_engines(config):
        # Colocated engines measure the free GPU memory when they start, so the actor must not occupy it then. The
        # rollout service brings it back. (`source` looks at the weights, so it is built before.)
        if config.rollout.colocate:
            actor.offload()
            process_groups.barrier()  # of every rank
        pool = resources.start_engines()
        weight_sync = _build_weight_sync(config, source, pool)
    service = RolloutService(config.rollout, actor=actor, weight_sync=weight_sync, pool=pool, timer=timer)
    rollouts = MethodRollouts(
        config,
        stream=PromptStream(prompts, seed=config.seed, position=progress.position),
        tokenizer=tokenizer,
        actor=actor,
        service=service,
        timer=timer,
        temperature=config.rollout.temperature if method.uses_rollouts else 1.0,
    )
    return Components(config, folder, method, tokenizer, actor, service, rollouts, eval_prompts, saver, timer, progress)


def export(components: Components, *, last: bool) -> None:
    """Write the model as a Hugging Face folder, and LoRA's adapter beside it; a collective.

    Args:
        last: the stage is the last one, its model is the result of the run.
    Raises:
        UserError: when the folder cannot be written.
        Fault: on every rank, for a weight that is not finite.
    """
    config, folder, actor = components.config, components.folder, components.actor
    _check_finite(actor)
    source = _weight_source(actor, config.actor.dtype)
    if process_groups.rank() == 0:
        tensors = ((name, tensor) for name, tensor in source if tensor is not None)
        write_folder(folder.export(config.name, last), source.metadata(), tensors, like=Path(config.model.path))
    else:
        for _ in source:  # reading is a collective
            pass
    if config.actor.lora.rank:
        write_adapter(
            folder.adapter(config.name, last),
            actor.arch,
            config.actor,
            actor.adapter_shards(),
            base=config.model.path,
            dtype=resolve_dtype(config.actor.dtype, actor.arch),
        )
    process_groups.barrier()


def _check_finite(actor: Actor) -> None:
    bad = next((name for name, weight in actor.merged_shards().items() if not bool(weight.isfinite().all())), None)
    found = [bad] * dist.get_world_size()
    dist.all_gather_object(found, bad)
    if names := [name for name in found if name is not None]:
        raise Fault(f"weight {names[0]} holds values that are not finite; the model is not exported")


def _restore(config: Config, actor: Actor, method: Method[Any], plan: StagePlan) -> StageProgress:
    """Load the planned checkpoint, or else the model folder."""
    start = StageProgress(0, 0, 0, config.fingerprint(), {}, plan.settings)
    _load_initial_weights(config, actor, method, is_resumed=plan.checkpoint is not None)
    if plan.checkpoint is None:
        return start
    path, progress = plan.checkpoint
    checkpoint.load(path, actor, progress)
    try:
        method.restore(progress.method)
    except CheckpointError:
        raise
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the state of method {config.method.name} cannot be read: {error}") from None
    log.info("resuming stage %s after step %d from %s", config.name, progress.step, path)
    return dataclasses.replace(progress, fingerprint=start.fingerprint, settings=start.settings)


def _load_initial_weights(config: Config, actor: Actor, method: Method[Any], *, is_resumed: bool) -> None:
    """Load what a checkpoint does not contain: the initial weights, LoRA's base, a frozen reference."""
    # The reference copies the weights that are loaded when it is set: its own first, then the policy replaces them.
    starts_from_weights = needs_weights(method.reference)
    has_own_weights = starts_from_weights and bool(config.model.reference)
    if has_own_weights:
        _load_weights(config.model.reference, actor)
        actor.set_reference(method.reference, own_weights=True)
    if not is_resumed or starts_from_weights or config.actor.lora.rank:
        _load_weights(config.model.path, actor)
    if not has_own_weights:
        actor.set_reference(method.reference)


def _load_weights(path: str, actor: Actor) -> None:
    folder, layout = open_model(path, actor.arch), actor.config.parallel
    weights.load(folder, actor.arch, layout, actor.named_shards(), copy=actor.loader.copy)
    actor.after_load()


def _load_prompts(
    config: Config, files: Sequence[str], tokenizer: Tokenizer, max_target_tokens: int | None
) -> list[Prompt]:
    loaded = load_prompts(files, tokenizer, config.data, max_target_tokens=max_target_tokens)
    if loaded.skipped.prompt or loaded.skipped.target:
        log.warning("%s: %s of %d rows", ", ".join(files), loaded.skipped, len(loaded))
    return list(loaded.prompts)


def _weight_source(actor: Actor, dtype: DtypeSetting) -> weights.ShardedSource:
    return weights.ShardedSource(
        actor.arch, actor.config.parallel, actor.merged_shards(), resolve_dtype(dtype, actor.arch)
    )


def _build_weight_sync(config: Config, source: weights.ShardedSource, pool: EnginePool | None) -> WeightSync:
    trainer_on_one_machine = process_groups.is_single_machine()

    def connection() -> tuple[str, str]:
        assert pool is not None
        return pool.address, pool.backend(trainer_on_one_machine=trainer_on_one_machine)

    address, backend = process_groups.run_on_rank_zero(connection)
    return WeightSync(source, address=address, checksum=config.rollout.verify_weights, backend=backend)
