"""LoRA on Megatron's linear layers: adapters that are trained while the model's weights are frozen.

An adapter adds `scale * up @ down` to the weight W of a linear layer (Hu et al. 2021, arXiv 2106.09685). It is attached
beside its layer to the layer's parent, where `sharded_state_dict` finds it, and a forward hook on the layer adds its
output. It is sharded as W is:

```
              W               down            up              r values per token in between
column        [out / tp, in]  [r, in]         [out / tp, r]   copied; gathered under sequence parallelism
row           [out, in / tp]  [r, in / tp]    [out, r]        summed; sum scattered under sequence parallelism
```

so ranks exchange r values per token instead of a layer's width, and each rank merges its shards of W and adapter alone.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import functional

from megatron_entropy.config.architecture import ModelArchitecture
from megatron_entropy.config.schema import ActorConfig
from megatron_entropy.distributed.seeds import derive_seed
from megatron_entropy.weights.names import lora_linears

log = logging.getLogger(__name__)

_SUFFIX = "_lora."
_COLUMN_PARALLEL = ("linear_qkv", "linear_fc1")
"""Layers sharded along their output; the others are sharded along their input."""
_MERGED_ROWS = 1024
"""Rows merged at a time: the fp32 memory beside the result does not grow with the weight."""


class LoraAdapter(torch.nn.Module):
    """This rank's shard of one linear layer's adapter.

    `down`: [r, in] or [r, in / tp]. `up`: [out / tp, r] or [out, r], as the module's table says. Type and device are
    those of the layer's weight. `enabled`: False switches the adapter off.
    """

    def __init__(self, linear: torch.nn.Module, name: str, *, rank: int, scale: float, sequence_parallel: bool) -> None:
        """Create an adapter with `up` = 0; `initialise` fills `down`.

        Args:
            linear: Megatron's layer.
            name: of the layer, as `weights.names.lora_linears` lists it.
        """
        super().__init__()
        weight = linear.weight
        assert isinstance(weight, Tensor)
        self.scale = scale
        self.enabled = True
        self.column = name in _COLUMN_PARALLEL
        self.gated = name == "linear_fc1"
        self.sequence_parallel = sequence_parallel
        self.down = torch.nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.up = torch.nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        sharded, replicated, dim = (self.up, self.down, 0) if self.column else (self.down, self.up, 1)
        set_tensor_model_parallel_attributes(sharded, is_parallel=True, dim=dim, stride=2 if self.gated else 1)
        # The replicated one sees only this rank's slice of the sequence: Megatron sums its gradient over the ranks.
        replicated.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw `down` uniformly from +-1/sqrt(in), as PEFT does (Kaiming with a = sqrt 5), the same in every layout."""
        columns = width = self.down.shape[1]
        first = 0
        if not self.column:
            columns *= parallel_state.get_tensor_model_parallel_world_size()
            first = width * parallel_state.get_tensor_model_parallel_rank()
        bound = 1 / math.sqrt(columns)
        generator = torch.Generator().manual_seed(seed)
        full = torch.empty(self.down.shape[0], columns).uniform_(-bound, bound, generator=generator)
        self.down.copy_(full[:, first : first + width])

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute what is added to the layer's output.

        Args:
            hidden: the layer's input: [T, 1, in] (of a column layer [T / tp, 1, in] under sequence parallelism), or
                [T, 1, in / tp].
        Returns:
            [T, 1, out / tp], or [T, 1, out] (under sequence parallelism [T / tp, 1, out]).
        """
        return functional.linear(self._exchange(functional.linear(hidden, self.down)) * self.scale, self.up)

    def _exchange(self, narrow: Tensor) -> Tensor:
        if self.column:
            exchange = gather_from_sequence_parallel_region if self.sequence_parallel else _copy
        else:
            exchange = reduce_scatter_to_sequence_parallel_region if self.sequence_parallel else _reduce
        return exchange(narrow)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Describe both tensors, sharded like the layer's weight, for `dist_checkpointing`."""
        axes = {"up": 0} if self.column else {"down": 1}
        tensors = {"down": self.down, "up": self.up}
        state = make_sharded_tensors_for_checkpoint(tensors, prefix, axes, sharded_offsets)
        if self.gated:  # each rank holds rows of the gate above rows of the up projection
            state[f"{prefix}up"] = apply_swiglu_sharded_factory(state[f"{prefix}up"], sharded_offsets)
        return state


_copy, _reduce = copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region


def attach(chunks: list[GPTModel], arch: ModelArchitecture, config: ActorConfig, *, seed: int) -> None:
    """Freeze the weights of a model and attach adapters to its linear layers; a collective.

    It must come before Megatron's `DistributedDataParallel`, which allocates gradients for the trained parameters.

    Args:
        seed: the same seed gives the same initial adapters in every layout.
    Raises:
        ConfigError: for targets that the model does not have.
    """
    linears = lora_linears(config.lora, arch)
    for chunk in chunks:
        chunk.requires_grad_(False)
        if config.recompute != "none" and chunk.pre_process:
            chunk.embedding.register_forward_hook(enable_input_require_grads)
        for module in chunk.decoder.modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                module.register_forward_hook(fold_gradient)
        layer: Any
        for layer in chunk.decoder.layers:
            for name in linears:
                parent = "mlp" if "fc" in name else "self_attention"
                adapter = attach_adapter(getattr(layer, parent), name, config)
                full_name = f"decoder.layers.{layer.layer_number - 1}.{parent}.{name}{_SUFFIX}down"
                adapter.initialise(derive_seed(seed, full_name))
    trained, total = _count_parameters(chunks)
    if dist.get_rank() == 0:
        if arch.moe and config.lora.targets == ["all-linear"]:
            log.info("LoRA: experts get no adapters, all-linear means the attention's layers")
        log.info("LoRA: %s of %s parameters trained", f"{trained:,}", f"{total:,}")


def is_adapter(name: str) -> bool:
    """Whether the parameter of this name belongs to an adapter."""
    return _SUFFIX in name


@contextlib.contextmanager
def disabled(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Switch the adapters off inside the context: the model computes as its base. `merged_shards` still merges them."""
    adapters = [module for chunk in chunks for module in chunk.modules() if isinstance(module, LoraAdapter)]
    before = [adapter.enabled for adapter in adapters]
    try:
        for adapter in adapters:
            adapter.enabled = False
        yield
    finally:
        for adapter, enabled in zip(adapters, before, strict=True):
            adapter.enabled = enabled


@torch.no_grad()
def merge_adapter(weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    """Return `weight + scale * up @ down`, computed in fp32, in the weight's type; `weight` does not change.

    Args:
        weight: [out, in]; `up`: [out, r]; `down`: [r, in]; full tensors or a rank's shards.
    """
    merged = torch.empty_like(weight)
    wide = down.float()
    slices = zip(merged.split(_MERGED_ROWS), weight.split(_MERGED_ROWS), up.split(_MERGED_ROWS), strict=True)
    for target, rows, up_rows in slices:
        target.copy_(torch.addmm(rows.float(), up_rows.float(), wide, alpha=scale))
    return merged


class MergedShards(Mapping[str, Tensor]):
    """A rank's parameters with the adapters merged in, computed at every read and not kept."""

    def __init__(self, base: Mapping[str, Tensor], adapters: Mapping[str, Tensor], scale: float) -> None:
        """Pair weights with their adapters.

        Args:
            base: `Actor.named_shards()`.
            adapters: `Actor.adapter_shards()`.
        """
        self._base = base
        self._scale = scale
        layers = [name.removesuffix(f"{_SUFFIX}up") for name in adapters if name.endswith(f"{_SUFFIX}up")]
        self._adapters = {
            f"{layer}.weight": (adapters[f"{layer}{_SUFFIX}up"], adapters[f"{layer}{_SUFFIX}down"]) for layer in layers
        }
        assert self._adapters.keys() <= base.keys(), "adapters without a weight"

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._adapters:
            return self._base[name]
        return merge_adapter(self._base[name], *self._adapters[name], self._scale)

    def __contains__(self, name: object) -> bool:
        return name in self._base

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


def attach_adapter(parent: torch.nn.Module, name: str, config: ActorConfig) -> LoraAdapter:
    """Attach an adapter to a layer's parent, and the hook that adds its output to the layer."""
    linear = getattr(parent, name)
    lora = config.lora
    adapter = LoraAdapter(
        linear, name, rank=lora.rank, scale=lora.scale, sequence_parallel=config.parallel.sequence_parallel
    )
    setattr(parent, name + _SUFFIX.removesuffix("."), adapter)

    def add(_: torch.nn.Module, inputs: tuple[Tensor], output: tuple[Tensor, Any]) -> tuple[Tensor, Any] | None:
        result, bias = output
        return (result + adapter(inputs[0]), bias) if adapter.enabled else None

    linear.register_forward_hook(add)
    return adapter


def fold_gradient(_: torch.nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> None:
    """Let a frozen layer see the gradient [T, 1, out] as one matrix.

    Megatron multiplies it by the weight with `matmul`. Where the dimension of length 1 has an unusual stride, which a
    transposition leaves, `matmul` copies a weight without gradient for every token.
    """
    if output[0].requires_grad:
        output[0].register_hook(lambda gradient: gradient.reshape(-1, gradient.shape[-1]).view(gradient.shape))


def enable_input_require_grads(_: torch.nn.Module, inputs: Any, embedded: Tensor) -> None:
    """Let a frozen embedding's output require gradients: recomputed layers get them only if their input does."""
    if torch.is_grad_enabled():
        embedded.requires_grad_()


def _count_parameters(chunks: Iterable[GPTModel]) -> tuple[int, int]:
    """Count trained and all parameters over all ranks, padding of the vocabulary included; a collective."""
    counts = torch.zeros(2, dtype=torch.int64)
    for parameter in (p for chunk in chunks for p in chunk.parameters() if is_primary_replica(p)):
        counts += torch.tensor([parameter.numel() * parameter.requires_grad, parameter.numel()])
    dist.all_reduce(counts)
    trained, total = counts.tolist()
    return trained, total


def is_primary_replica(parameter: Tensor) -> bool:
    """Whether this rank holds the primary replica of a parameter, the one that is counted."""
    expert = not getattr(parameter, "allreduce", True)
    if expert:
        tp, dp = parallel_state.get_expert_tensor_parallel_rank(), parallel_state.get_expert_data_parallel_rank()
    else:
        dp = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        tp = parallel_state.get_tensor_model_parallel_rank()
    sharded = getattr(parameter, "tensor_model_parallel", False)
    return param_is_not_shared(parameter) and dp == 0 and (sharded or tp == 0)
