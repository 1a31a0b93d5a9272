"""Build a Megatron-Core `GPTModel` from a model's architecture and a layout.

`HiddenStateHead` replaces the output layer: it keeps the head's weight shard and returns the hidden states. The logits
never exist as a whole; the loss is computed from hidden states and weight shard.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Sequence
from typing import Any

import megatron.core
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_entropy.actor import fp8
from megatron_entropy.actor.layers import PackedAttention, RMSNorm
from megatron_entropy.actor.rotary import rotary_frequencies
from megatron_entropy.config.architecture import ModelArchitecture, split_layers
from megatron_entropy.config.schema import ActorConfig, ParallelConfig
from megatron_entropy.distributed import cpu
from megatron_entropy.distributed.dtypes import resolve_dtype
from megatron_entropy.errors import MissingPackageError

_EXPERT_NUMBER = re.compile(r"(\.local_experts\.|\.experts\.linear_fc[12]\.weight)(\d+)")
"""The local number of an expert in a parameter's name: of local layers, of Transformer Engine's grouped ones."""

_GROUPED_EXPERTS = (".experts.linear_fc1", ".experts.linear_fc2")
"""Transformer Engine's grouped linear layers, one weight an expert; by the dimension that expert tensor parallelism
splits."""


def has_transformer_engine() -> bool:
    """Whether layers run on Transformer Engine: installed, and a GPU to run on."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def uses_transformer_engine(config: ActorConfig) -> bool:
    """Whether this model's layers run on Transformer Engine: emulated FP8 needs plain ones."""
    return has_transformer_engine() and not config.fp8.emulate


class HiddenStateHead(torch.nn.Module):
    """Replaces the output layer: keeps its weight shard and returns the hidden states.

    `weight`: [V / tp, H], or None where the embedding on the same stage is tied to it.
    """

    def __init__(self, output_layer: torch.nn.Module) -> None:
        super().__init__()
        self.weight = output_layer.weight

    def forward(self, hidden: Tensor, **unused: Any) -> tuple[Tensor, None]:
        """Return `hidden` unchanged, as a pair like `ColumnParallelLinear`."""
        return hidden, None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Describe the weight as a tensor sharded along the vocabulary, for `dist_checkpointing`."""
        if self.weight is None:
            return {}
        state = {"weight": self.weight}
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)


def transformer_config(arch: ModelArchitecture, config: ActorConfig) -> TransformerConfig:
    """Build Megatron's settings for a model and a layout.

    Raises:
        MissingPackageError: for FP8 without Transformer Engine.
    """
    layout, dtype, fused = config.parallel, resolve_dtype(config.dtype, arch), uses_transformer_engine(config)
    if fp8.is_active(config.fp8) and not fused:
        raise MissingPackageError(
            f"actor.fp8.recipe={config.fp8.recipe} needs Transformer Engine and a GPU; see `megatron-entropy doctor`"
        )
    _, attention_factor = rotary_frequencies(arch)
    recompute: dict[str, Any] = {}
    if config.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.head_dim,
        layernorm_epsilon=arch.norm_eps,
        normalization="RMSNorm",
        qk_layernorm=arch.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        softmax_scale=attention_factor**2 * arch.head_dim**-0.5,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # required by variable_seq_lengths, also without experts
        pipeline_model_parallel_layout=_uneven_stages(arch, layout),
        calculate_per_token_loss=True,  # gradients are summed: weights already contain the normalisation
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,  # every weight comes from a checkpoint
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        apply_rope_fusion=fused,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        deallocate_pipeline_outputs=True,
        # With two stages a chunk's previous and next rank are the same; only overlapped communication separates them.
        overlap_p2p_comm=layout.vpp > 1,
        batch_p2p_comm=layout.vpp == 1,
        **_expert_settings(arch, config, fused),
        **fp8.model_settings(config.fp8),
        **recompute,
    )


def _expert_settings(arch: ModelArchitecture, config: ActorConfig, fused: bool) -> dict[str, Any]:
    if arch.moe is None:
        return {}
    layout, losses = config.parallel, config.moe
    return {
        "num_moe_experts": arch.moe.num_experts,
        "moe_router_topk": arch.moe.experts_per_token,
        "moe_ffn_hidden_size": arch.moe.ffn_size,
        # Weights of the chosen experts that sum to 1 are the softmax over the chosen logits.
        "moe_router_pre_softmax": not arch.moe.normalise,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss" if losses.aux_loss_coeff else "none",
        "moe_grouped_gemm": fused,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
    }


def _uneven_stages(arch: ModelArchitecture, layout: ParallelConfig) -> list[list[str]] | None:
    """Megatron's description of pipeline stages with different numbers of layers; None where all are equal."""
    stages = split_layers(arch.num_layers, layout.pp * layout.vpp)
    if len({len(layers) for layers in stages}) == 1:
        return None
    described = [["decoder"] * len(layers) for layers in stages]
    described[0].insert(0, "embedding")
    described[-1].append("loss")
    return described


def set_router_losses(settings: TransformerConfig, config: ActorConfig, num_tokens: int) -> None:
    """Set the coefficients of the routers' losses for a step.

    Megatron multiplies the loss of a micro-batch by its number of tokens (before 0.19, by a rank's part of them) and
    expects a division by all tokens at the end of the step, which our gradients do not need otherwise.

    Args:
        num_tokens: of the step, over all data parallel ranks.
    """
    losses = config.moe
    counts_all = tuple(int(part) for part in megatron.core.__version__.split(".")[:2]) >= (0, 19)
    share = (1 if counts_all else config.parallel.tp * config.parallel.cp) / max(num_tokens, 1)
    if losses.aux_loss_coeff:
        settings.moe_aux_loss_coeff = losses.aux_loss_coeff * share
    if losses.z_loss_coeff:
        settings.moe_z_loss_coeff = losses.z_loss_coeff * share


def build_chunks(arch: ModelArchitecture, config: ActorConfig) -> list[GPTModel]:
    """Build this rank's model chunks: one, or `vpp` of them. Weights are not set."""
    settings = transformer_config(arch, config)
    layout = config.parallel
    chunks = []
    for index in range(layout.vpp):
        vp_stage = index if layout.vpp > 1 else None
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        chunk: Any = GPTModel(
            config=settings,
            transformer_layer_spec=_layer_spec(arch, config, index),
            vocab_size=arch.padded_vocab_size,
            max_sequence_length=arch.max_positions,
            pre_process=first,
            post_process=last,
            parallel_output=True,
            share_embeddings_and_output_weights=arch.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=int(arch.rope_theta),
            vp_stage=vp_stage,
        )
        chunk.rotary_pos_emb.inv_freq = rotary_frequencies(arch)[0].to(cpu.device())
        _mark_sharded_weights(chunk)
        if last:
            chunk.output_layer = HiddenStateHead(chunk.output_layer)
        chunks.append(chunk.to(cpu.device()))
    return chunks


def global_parameters(chunks: Sequence[Any], arch: ModelArchitecture, layout: ParallelConfig) -> dict[str, Tensor]:
    """This rank's parameters by global name: layers are numbered over all pipeline stages, experts over all ranks."""
    parameters: dict[str, Tensor] = {}
    first_expert = 0
    if arch.moe:
        first_expert = arch.moe.num_experts // layout.ep * parallel_state.get_expert_model_parallel_rank()

    def global_expert(match: re.Match[str]) -> str:
        return f"{match[1]}{int(match[2]) + first_expert}"

    for chunk in chunks:
        numbers = {str(index): str(layer.layer_number - 1) for index, layer in enumerate(chunk.decoder.layers)}
        for name, parameter in chunk.named_parameters():
            path = name.split(".")
            if path[:2] == ["decoder", "layers"]:
                path[2] = numbers[path[2]]
            parameters[_EXPERT_NUMBER.sub(global_expert, ".".join(path))] = parameter
    return parameters


def head_weight(chunk: GPTModel) -> Tensor:
    """The head's weight shard [V / tp, H], which turns hidden states of the last stage into logits."""
    tied = chunk.share_embeddings_and_output_weights
    weight = chunk.shared_embedding_or_output_weight() if tied else chunk.output_layer.weight
    assert isinstance(weight, Tensor)
    return weight


def fuse_grad_accumulation(chunk: torch.nn.Module) -> None:
    """Let linear layers add their weight gradients to `main_grad` themselves.

    The setting of Megatron's configuration would demand Apex for the head, which computes in our kernels.
    """
    for module in chunk.modules():
        for name in ("fuse_wgrad_accumulation", "gradient_accumulation_fusion"):
            if hasattr(module, name):
                setattr(module, name, True)


def _mark_sharded_weights(chunk: torch.nn.Module) -> None:
    """Mark which weights are shards, for the gradient norm; Megatron does this only while it initialises them."""
    for name, module in chunk.named_modules():
        is_expert = getattr(module, "is_expert", False)
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)):
            sharded: list[tuple[Any, int]] = [(module.weight, 0), (getattr(module, "bias", None), 0)]
        elif isinstance(module, RowParallelLinear):
            sharded = [(module.weight, 1)]
        elif name.endswith(_GROUPED_EXPERTS) and hasattr(module, "num_gemms"):
            dim, is_expert = _GROUPED_EXPERTS.index("." + ".".join(name.split(".")[-2:])), True
            sharded = [(parameter, dim) for parameter in module.parameters(recurse=False)]
        else:
            continue
        for parameter, dim in sharded:
            if parameter is not None and not hasattr(parameter, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)
            if parameter is not None and is_expert:
                # Megatron sets this for ep > 1 only, but with etp < tp experts have their own replicas too.
                parameter.allreduce = False


def _layer_spec(arch: ModelArchitecture, config: ActorConfig, chunk: int) -> Any:
    layout = config.parallel
    experts = arch.moe.num_experts if arch.moe else None
    if uses_transformer_engine(config):
        fused: ModuleSpec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts, moe_grouped_gemm=experts is not None, qk_layernorm=arch.qk_norm
        )
        return _separate_norms(fused) if config.lora.rank else fused
    layer: Any = get_gpt_layer_local_spec(num_experts=experts, qk_layernorm=arch.qk_norm, normalization="RMSNorm")
    if experts:  # Transformer Engine never fuses the norm before experts, so its checkpoint name stays
        layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if arch.qk_norm:
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm
    pp_stage = chunk * layout.pp + parallel_state.get_pipeline_model_parallel_rank()
    num_layers = len(split_layers(arch.num_layers, layout.pp * layout.vpp)[pp_stage])
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)  # type: ignore[arg-type]


def _separate_norms(layer: ModuleSpec) -> ModuleSpec:
    """Undo the fusion of norms into Transformer Engine's linear layers: LoRA needs their input. Not run on a GPU."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

    submodules: Any = layer.submodules
    submodules.input_layernorm = submodules.pre_mlp_layernorm = TENorm  # with experts the second is one already
    submodules.self_attention.submodules.linear_qkv = TEColumnParallelLinear
    mlp: Any = submodules.mlp  # megatron-core 0.17 and later describe it by a `partial` of its class
    inner = mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules
    if hasattr(inner, "linear_fc1"):
        inner.linear_fc1 = TEColumnParallelLinear
    return layer
