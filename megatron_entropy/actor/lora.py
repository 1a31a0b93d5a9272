"""LoRA on Megatron's linear layers: adapters that train while the model's own weights stay fixed.

An adapter belongs to a linear layer with weight W and adds `scale * up @ down` to it (Hu et al. 2021, arXiv
2106.09685). It hangs beside its layer in the layer's parent, where `sharded_state_dict` finds it, and a hook on the
layer adds what it computes. Its parts are split as W is:

```
              W               down            up              between them, of r values a token
column        [out / tp, in]  [r, in]         [out / tp, r]   copied; gathered under sequence parallelism
row           [out, in / tp]  [r, in / tp]    [out, r]        summed; sum scattered under sequence parallelism
```

so that ranks exchange r values a token instead of a layer's width, and W and adapter fold together on each rank alone.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
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

if TYPE_CHECKING:
    from megatron_entropy.actor.actor import Actor

log = logging.getLogger(__name__)

_MARK = "_lora."
_COLUMN = ("linear_qkv", "linear_fc1")
"""Layers split along their output; the others are along their input."""
_FOLDED_ROWS = 1024
"""Rows folded at a time: what is held in fp32 beside the result does not grow with the weight."""


class LoraAdapter(torch.nn.Module):
    """The adapter of one linear layer, this rank's part of it.

    `down` [r, in] or [r, in / tp], `up` [out / tp, r] or [out, r]: see the module's text. Type and device are those of
    the layer's weight. Without `enabled` it adds nothing.
    """

    def __init__(self, linear: torch.nn.Module, name: str, *, rank: int, scale: float, sequence_parallel: bool) -> None:
        """Make an adapter that adds nothing: `up` is zero; `down` is for `initialise` to fill.

        Args:
            linear: Megatron's layer.
            name: of the layer, a key of `config.LINEARS`.
        """
        super().__init__()
        weight = linear.weight
        assert isinstance(weight, Tensor)
        self.scale = scale
        self.enabled = True
        self.column = name in _COLUMN
        self.gated = name == "linear_fc1"
        self.sequence_parallel = sequence_parallel
        self.down = torch.nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.up = torch.nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        split, whole, dim = (self.up, self.down, 0) if self.column else (self.down, self.up, 1)
        set_tensor_model_parallel_attributes(split, is_parallel=True, dim=dim, stride=2 if self.gated else 1)
        # The whole one sees this rank's part of the sequence only: Megatron sums its gradient over the ranks.
        whole.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

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
        """What the adapter adds to its layer's output.

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
        """Both parts as tensors split like the layer's weight, for `dist_checkpointing`."""
        axes = {"up": 0} if self.column else {"down": 1}
        parts = {"down": self.down, "up": self.up}
        state = make_sharded_tensors_for_checkpoint(parts, prefix, axes, sharded_offsets)
        if self.gated:  # each rank holds rows of the gate above rows of the up projection
            state[f"{prefix}up"] = apply_swiglu_sharded_factory(state[f"{prefix}up"], sharded_offsets)
        return state


_copy, _reduce = copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region


def attach(chunks: list[GPTModel], arch: ModelArchitecture, config: ActorConfig, *, seed: int) -> None:
    """Fix the weights of a model and give its linear layers adapters; a collective.

    Must come before Megatron's `DistributedDataParallel`, which makes room for the gradients of what is trained then.

    Args:
        seed: adapters start the same for the same seed, whatever the layout.
    Raises:
        ConfigError: for targets the model has not.
    """
    linears = config.lora.linears(arch)
    for chunk in chunks:
        chunk.requires_grad_(False)
        if config.recompute != "none" and chunk.pre_process:
            chunk.embedding.register_forward_hook(_enable_input_require_grads)
        layer: Any
        for layer in chunk.decoder.layers:
            for name in linears:
                place = "mlp" if "fc" in name else "self_attention"
                adapter = _attach_adapter(getattr(layer, place), name, config)
                full_name = f"decoder.layers.{layer.layer_number - 1}.{place}.{name}{_MARK}down"
                adapter.initialise(derive_seed(seed, full_name))
    trained, total = _count(chunks)
    if dist.get_rank() == 0:
        if arch.moe and config.lora.targets == ["all-linear"]:
            log.info("LoRA: experts take no adapters, all-linear means the attention's layers")
        log.info("LoRA: %s of %s parameters trained", f"{trained:,}", f"{total:,}")


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return _MARK in name


@contextlib.contextmanager
def disabled(actor: Actor) -> Iterator[None]:
    """Inside, adapters add nothing: the model computes what its base does. Weights read from it still hold them."""
    adapters = [module for chunk in actor.chunks for module in chunk.modules() if isinstance(module, LoraAdapter)]
    before = [adapter.enabled for adapter in adapters]
    try:
        for adapter in adapters:
            adapter.enabled = False
        yield
    finally:
        for adapter, enabled in zip(adapters, before, strict=True):
            adapter.enabled = enabled


@torch.no_grad()
def fold(weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    """`weight + scale * up @ down`, formed in fp32, of the weight's type; the weight is left as it is.

    Args:
        weight: [out, in]; `up` [out, r], `down` [r, in]: whole ones or a rank's parts.
    """
    merged = torch.empty_like(weight)
    wide = down.float()
    parts = zip(merged.split(_FOLDED_ROWS), weight.split(_FOLDED_ROWS), up.split(_FOLDED_ROWS), strict=True)
    for target, rows, up_rows in parts:
        target.copy_(torch.addmm(rows.float(), up_rows.float(), wide, alpha=scale))
    return merged


class MergedShards(Mapping[str, Tensor]):
    """A rank's parameters with the adapters folded in, each whenever it is asked for: none is kept."""

    def __init__(self, base: Mapping[str, Tensor], adapters: Mapping[str, Tensor], scale: float) -> None:
        """Pair weights with their adapters.

        Args:
            base: `Actor.named_shards()`.
            adapters: `Actor.adapter_shards()`.
        """
        self._base = base
        self._scale = scale
        layers = [name.removesuffix(f"{_MARK}up") for name in adapters if name.endswith(f"{_MARK}up")]
        self._adapters = {
            f"{layer}.weight": (adapters[f"{layer}{_MARK}up"], adapters[f"{layer}{_MARK}down"]) for layer in layers
        }
        assert self._adapters.keys() <= base.keys(), "adapters of weights that are not there"

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._adapters:
            return self._base[name]
        return fold(self._base[name], *self._adapters[name], self._scale)

    def __contains__(self, name: object) -> bool:
        return name in self._base

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


def _attach_adapter(parent: torch.nn.Module, name: str, config: ActorConfig) -> LoraAdapter:
    """Give a layer's parent the adapter, and the layer the hook that adds it."""
    linear = getattr(parent, name)
    lora = config.lora
    adapter = LoraAdapter(
        linear, name, rank=lora.rank, scale=lora.scale, sequence_parallel=config.parallel.sequence_parallel
    )
    setattr(parent, name + _MARK.removesuffix("."), adapter)

    def add(_: torch.nn.Module, inputs: tuple[Tensor], output: tuple[Tensor, Any]) -> tuple[Tensor, Any] | None:
        wide, bias = output
        return (wide + adapter(inputs[0]), bias) if adapter.enabled else None

    linear.register_forward_hook(add)
    return adapter


def _enable_input_require_grads(_: torch.nn.Module, inputs: Any, embedded: Tensor) -> None:
    """Recomputed layers get gradients only where their input wants one, which a fixed embedding's output does not."""
    if torch.is_grad_enabled():
        embedded.requires_grad_()


def _count(chunks: Iterable[GPTModel]) -> tuple[int, int]:
    """Parameters trained and in all, over all ranks, padding of the vocabulary included; a collective."""
    counts = torch.zeros(2, dtype=torch.int64)
    for parameter in (p for chunk in chunks for p in chunk.parameters() if _is_primary_replica(p)):
        counts += torch.tensor([parameter.numel() * parameter.requires_grad, parameter.numel()])
    dist.all_reduce(counts)
    trained, total = counts.tolist()
    return trained, total


def _is_primary_replica(parameter: Tensor) -> bool:
    """Whether this rank counts a parameter, of which others may hold copies."""
    expert = not getattr(parameter, "allreduce", True)
    if expert:
        tp, dp = parallel_state.get_expert_tensor_parallel_rank(), parallel_state.get_expert_data_parallel_rank()
    else:
        dp = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        tp = parallel_state.get_tensor_model_parallel_rank()
    split = getattr(parameter, "tensor_model_parallel", False)
    return param_is_not_shared(parameter) and dp == 0 and (split or tp == 0)
