"""Compare configuration keys with one another and with the model, before anything starts."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_entropy.config.architecture import ModelArchitecture
from megatron_entropy.config.fp8 import EMULATED, RECIPES, STORED, Fp8Config
from megatron_entropy.config.schema import ActorConfig, Config, ParallelConfig
from megatron_entropy.errors import ConfigError


def check(config: Config, arch: ModelArchitecture, world_size: int | None = None) -> None:
    """Check one stage.

    Args:
        config: the stage's settings.
        arch: architecture of the model.
        world_size: number of running ranks; None before they start.
    Raises:
        ConfigError: naming the key to change and both numbers.
    """
    layout = config.actor.parallel
    _check_divides(layout.tp, arch.num_heads, "actor.parallel.tp", "attention heads")
    if layout.tp % arch.num_query_groups:  # Megatron shares a key/value head between ranks where they divide evenly
        _check_divides(layout.tp, arch.num_query_groups, "actor.parallel.tp", "query groups (key/value heads)")
    _check_divides(layout.tp, arch.padded_vocab_size, "actor.parallel.tp", "rows of the padded vocabulary")
    if arch.moe is None:
        _check_divides(layout.tp, arch.ffn_size, "actor.parallel.tp", "feed-forward columns")
    if layout.pp * layout.vpp > arch.num_layers:
        raise ConfigError(
            f"actor.parallel.pp * actor.parallel.vpp = {layout.pp * layout.vpp} pipeline stages for the model's "
            f"{arch.num_layers} layers; lower one of them"
        )
    _check_experts(layout, arch)
    for key, value in config.actor.moe:
        if value and arch.moe is None:
            raise ConfigError(f"actor.moe.{key}={value} has no effect: the model has no experts; leave it out")
    if layout.vpp > 1 and layout.pp == 1:
        raise ConfigError(f"actor.parallel.vpp={layout.vpp} needs actor.parallel.pp of at least 2")
    if layout.sequence_parallel and layout.tp == 1:
        raise ConfigError("actor.parallel.sequence_parallel=true needs actor.parallel.tp of at least 2")
    _check_divides(config.rollout.tensor_parallel, arch.num_heads, "rollout.tensor_parallel", "attention heads")
    if config.rollout.weight_transfer == "cuda_ipc" and not config.rollout.colocate:
        raise ConfigError(
            "rollout.weight_transfer=cuda_ipc is for engines on the trainer's GPUs; set rollout.colocate=true, or "
            "leave weight_transfer out"
        )
    _check_fp8(config.actor, arch)
    _check_fp8_parameters(config)
    longest = config.max_sequence_tokens
    section = "eval" if config.eval.max_response_tokens > config.rollout.max_response_tokens else "rollout"
    if longest > arch.max_positions:
        raise ConfigError(
            f"data.max_prompt_tokens + {section}.max_response_tokens = {longest} is more than the model's "
            f"{arch.max_positions} positions; lower one of them"
        )
    if longest > config.actor.max_tokens_per_microbatch:
        raise ConfigError(
            f"actor.max_tokens_per_microbatch={config.actor.max_tokens_per_microbatch} cannot hold one sequence of "
            f"data.max_prompt_tokens + {section}.max_response_tokens = {longest} tokens; raise it or lower them"
        )
    if config.batch.prompts % config.batch.updates:
        raise ConfigError(f"batch.updates={config.batch.updates} does not divide batch.prompts={config.batch.prompts}")
    if not config.data.train:
        raise ConfigError("data.train is empty; name at least one JSONL or parquet file")
    if world_size is not None and world_size != layout.world_size:
        raise ConfigError(
            f"torchrun started {world_size} ranks, but actor.parallel needs tp*pp*cp*dp = {layout.tp}*{layout.pp}*"
            f"{layout.cp}*{layout.dp} = {layout.world_size}; change --nproc-per-node/--nnodes or actor.parallel.dp"
        )


def check_stages(configs: Sequence[Config]) -> None:
    """Check that the stages share one run folder, one number of ranks and one model.

    Raises:
        ConfigError: naming the keys that differ between stages.
    """
    sizes = {config.name: config.actor.parallel.world_size for config in configs}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise ConfigError(f"stages need the same number of ranks, found {listed}; change actor.parallel.dp of a stage")
    if len({config.output for config in configs}) > 1:
        raise ConfigError("stages share one folder; set `output` at the top of the file only")
    if len({config.rollout.colocate for config in configs}) > 1:
        raise ConfigError("rollout.colocate differs between stages, which share the engines; set it at the top only")
    if not configs[0].model.path:
        raise ConfigError("model.path is empty; name the Hugging Face folder to start from")
    for config in configs[1:]:
        if config.model.path not in ("", configs[0].model.path):
            raise ConfigError(
                f"stage {config.name}: model.path={config.model.path}: a stage trains the model that the one before it "
                "exported; set model.path at the top of the file only, or make the stage a run of its own"
            )


ENGINE_KEYS = (
    "num_engines",
    "tensor_parallel",
    "nodes",
    "dtype",
    "quantization",
    "max_num_seqs",
    "kv_cache_gib",
    "gpu_memory_utilization",
    "weight_transfer",
    "max_restarts",
)
"""Keys of `rollout` that the engines are built from; the first stage's hold for the run."""


def ignored_settings(configs: Sequence[Config]) -> list[str]:
    """List, a line for each stage, the settings without effect because all stages use the engines of the first."""
    lines = []
    for config in configs[1:]:
        keys = [key for key in ENGINE_KEYS if getattr(config.rollout, key) != getattr(configs[0].rollout, key)]
        if keys:
            named = ", ".join(f"rollout.{key}={getattr(config.rollout, key)}" for key in keys)
            lines.append(
                f"stage {config.name}: {named} has no effect: all stages use the engines of stage {configs[0].name}; "
                "set it at the top of the file"
            )
    return lines


def _check_emulation(actor: ActorConfig) -> None:
    fp8 = actor.fp8
    if fp8.block_scales != "power_of_two" and not (fp8.emulate and fp8.recipe == "blockwise"):
        raise ConfigError(
            f'actor.fp8.block_scales="{fp8.block_scales}" needs actor.fp8.recipe="blockwise" and '
            "actor.fp8.emulate=true; on a GPU set the environment variable NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1 instead"
        )
    if not fp8.emulate:
        if fp8.head:
            raise ConfigError("actor.fp8.head=true needs actor.fp8.emulate=true: a head in FP8 is emulated only")
        return
    if fp8.recipe not in EMULATED:
        raise ConfigError(
            f'actor.fp8.emulate=true with actor.fp8.recipe="{fp8.recipe}": set the recipe to one that can be emulated: '
            f"{', '.join(EMULATED)}"
        )
    if fp8.recipe == "delayed" and actor.recompute != "none":
        raise ConfigError(
            f'actor.recompute="{actor.recompute}": the scales of emulated delayed scaling change between a forward '
            'pass and its repetition; set it to "none", or actor.fp8.recipe to "current"'
        )
    if fp8.recipe == "delayed" and actor.lora.rank:
        raise ConfigError(
            f"actor.lora.rank={actor.lora.rank}: checkpoints of adapters do not hold the scales of emulated delayed "
            'scaling; set actor.fp8.recipe="current", or rank to 0'
        )


def _check_experts(layout: ParallelConfig, arch: ModelArchitecture) -> None:
    if arch.moe is None:
        if layout.ep * layout.etp > 1:
            raise ConfigError(
                f"actor.parallel.ep={layout.ep}, etp={layout.etp}: the model has no experts; set both to 1"
            )
        return
    _check_divides(layout.ep, arch.moe.num_experts, "actor.parallel.ep", "experts")
    _check_divides(layout.etp, arch.moe.ffn_size, "actor.parallel.etp", "columns of an expert")
    ranks = layout.tp * layout.cp * layout.dp
    if ranks % (layout.ep * layout.etp):
        raise ConfigError(f"actor.parallel.ep * etp = {layout.ep * layout.etp} does not divide tp * cp * dp = {ranks}")
    if layout.tp > 1 and not layout.sequence_parallel:
        raise ConfigError("actor.parallel.tp above 1 needs sequence_parallel=true for a model with experts")


def _check_fp8(actor: ActorConfig, arch: ModelArchitecture) -> None:
    fp8, layout = actor.fp8, actor.parallel
    if not fp8.recipe:
        if ignored := [key for key, value in fp8 if value != Fp8Config.model_fields[key].default]:
            raise ConfigError(f"actor.fp8.{ignored[0]} has no effect without actor.fp8.recipe; set it, or leave it out")
        return
    if fp8.recipe == "nvfp4" and fp8.format == "hybrid":
        raise ConfigError('actor.fp8.format="hybrid": nvfp4 has one format; leave it out')
    if actor.dtype == "float32" and not fp8.emulate:
        raise ConfigError('actor.dtype="float32": FP8 needs "bfloat16"; change it, or leave actor.fp8.recipe out')
    _check_bf16_layers(fp8, arch, layout.pp)
    _check_emulation(actor)
    needed = RECIPES[fp8.recipe].width
    for what, width in _linear_widths(arch, layout).items():
        if width % needed:
            raise ConfigError(
                f"actor.fp8.recipe={fp8.recipe} needs linear layers with multiples of {needed} on a rank, found "
                f"{width} {what}; lower actor.parallel.tp, or leave the recipe out"
            )


NOT_STORED = {
    "delayed": "its scales are not known yet when weights are loaded",
    "mxfp8": "megatron-core gathers such weights through the gradients' memory, which is not offered",
    "nvfp4": "weights of four bits are not offered",
}
"""Why the weights of a recipe cannot be stored as it rounds them."""


def _check_fp8_parameters(config: Config) -> None:
    actor, fp8 = config.actor, config.actor.fp8
    if not fp8.parameters:
        return
    setting = "actor.fp8.parameters=true"
    if fp8.emulate:
        raise ConfigError(
            f"{setting} with actor.fp8.emulate=true: emulated FP8 stores no weights; leave one of them out"
        )
    if fp8.recipe not in STORED:
        raise ConfigError(
            f'{setting} with actor.fp8.recipe="{fp8.recipe}": {NOT_STORED[fp8.recipe]}; set the recipe to '
            f"{' or '.join(STORED)}, or leave parameters out"
        )
    if not actor.parallel.distributed_optimizer:
        raise ConfigError(
            f"{setting} needs actor.parallel.distributed_optimizer=true, which keeps the fp32 weights; set it, or "
            "leave parameters out"
        )
    if actor.lora.rank:
        raise ConfigError(
            f"{setting} with actor.lora.rank={actor.lora.rank}: LoRA's frozen weights stay in bfloat16; set rank to 0, "
            "or leave parameters out"
        )
    if config.rollout.colocate:
        raise ConfigError(
            f"{setting} with rollout.colocate=true: FP8 weights cannot be offloaded; give the engines GPUs of their "
            "own, or leave parameters out"
        )


def _check_bf16_layers(fp8: Fp8Config, arch: ModelArchitecture, pp: int) -> None:
    first, last = fp8.first_layers_bf16, fp8.last_layers_bf16
    if first + last == 0:
        return
    if fp8.recipe == "delayed":
        raise ConfigError(
            f"actor.fp8.first_layers_bf16={first}, last_layers_bf16={last}: the recipe delayed cannot leave layers in "
            "bfloat16; set both to 0, or use another recipe"
        )
    if first + last >= arch.num_layers:
        raise ConfigError(
            f"actor.fp8.first_layers_bf16 + last_layers_bf16 = {first + last} leaves none of the model's "
            f"{arch.num_layers} layers in FP8; lower one of them"
        )
    if max(first, last) > arch.num_layers // pp:
        raise ConfigError(
            f"actor.fp8.first_layers_bf16={first}, last_layers_bf16={last}: megatron-core allows at most the "
            f"{arch.num_layers // pp} layers of a pipeline stage; lower them, or actor.parallel.pp"
        )


def _linear_widths(arch: ModelArchitecture, layout: ParallelConfig) -> dict[str, int]:
    """Inputs and outputs of the linear layers on one rank, by what they are."""
    heads = arch.num_heads // layout.tp
    groups = max(arch.num_query_groups // layout.tp, 1)
    widths = {
        "hidden features": arch.hidden_size,
        "attention outputs": heads * arch.head_dim,
        "query, key and value features": (heads + 2 * groups) * arch.head_dim,
    }
    if arch.moe is None:
        return widths | {"feed-forward columns": arch.ffn_size // layout.tp}
    return widths | {"columns of an expert": arch.moe.ffn_size // layout.etp}


def _check_divides(divisor: int, count: int, key: str, what: str) -> None:
    if count % divisor:
        raise ConfigError(f"{key}={divisor} does not divide the model's {count} {what}")
