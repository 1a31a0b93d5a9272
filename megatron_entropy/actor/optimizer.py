"""AdamW and its learning-rate schedule, Megatron-Core's own."""

from __future__ import annotations

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_entropy.config import speedups
from megatron_entropy.config.fp8 import RECIPES
from megatron_entropy.config.schema import ActorConfig, OptimizerConfig


def build_optimizer(config: ActorConfig, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """Build the optimizer over this rank's model chunks, with fp32 main weights where the model is bfloat16."""
    settings, dtype = config.optimizer, chunks[0].config.params_dtype
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        params_dtype=dtype,
        bf16=chunks[0].config.bf16,
        fp8_recipe=RECIPES[config.fp8.recipe].megatron if config.fp8.parameters else None,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_param_gather=speedups.resolve(config)["overlap_param_gather"].is_active,
    )
    return get_megatron_optimizer(megatron_config, chunks)  # type: ignore[arg-type]


def build_schedule(
    config: OptimizerConfig, optimizer: MegatronOptimizer, total_updates: int
) -> OptimizerParamScheduler:
    """Build the schedule: linear warm-up, then constant, or decay to `min_lr` over `decay_steps` or all updates."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=config.warmup_lr,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=max(config.decay_steps or total_updates, config.warmup_steps + 1),
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
