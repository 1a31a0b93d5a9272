"""The actor's weights and optimizer state as sharded tensors, independent of the layout.

`megatron.core.dist_checkpointing` stores every tensor by its global name, shape and offset, so a checkpoint written
under one layout is read under any other. The optimizers' state is described parameter by parameter. Megatron would
store the groups of the plain ones as data common to all ranks, but they differ between pipeline stages; the distributed
one would be gathered on every rank (`optimizer_shards`).

Weights stored in FP8 are in it as bfloat16. They are rounded again from the fp32 weights, which makes the same bits.

With LoRA only the adapters and their optimizer state are described: the base weights come from the model folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_entropy.actor import fp8_emulation, fp8_weights
from megatron_entropy.actor.actor import Actor
from megatron_entropy.actor.lora import is_adapter
from megatron_entropy.checkpoint.optimizer_shards import Piece, optimizer_pieces

MASTER = "param"
"""Name of the fp32 weights that the optimizer updates; fp32 models have it too, so that every optimizer finds it."""
SHARDED = "sharded_optimizer"
"""Key of the state that no other data-parallel rank has."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def sharded_state(actor: Actor, *, is_loading: bool) -> dict[str, Any]:
    """Describe the checkpoint's content as sharded tensors: weights, optimizer state and a changing reference.

    Optimizer state that does not exist yet is created.

    Args:
        is_loading: the tensors will be loaded into.
    """
    if not is_loading:
        fp8_emulation.share_history([chunk.module for chunk in actor.chunks])
    model = _model_state(actor)
    if actor.config.parallel.distributed_optimizer:
        pieces = _distributed_pieces(actor, model, is_loading=is_loading)
        state: dict[str, Any] = {**model, SHARDED: {piece.key: piece.box for piece in pieces}}
    else:
        state = {**model, "optimizer": _plain_state(actor, model)}
    if actor.reference is not None and actor.reference.in_checkpoint:
        sharded = _sharded_parameters(actor, model)
        state["reference"] = {
            name: make_sharded_optimizer_tensor(sharded[name], weight, prefix="reference")
            for name, weight in actor.reference.weights.items()
            if name in sharded
        }
    for tensor in nested_values(model):  # last: until here parameters are known by their identity
        if isinstance(tensor, (ShardedTensor, ShardedTensorFactory)) and tensor.data is not None:
            tensor.data = fp8_weights.dequantize(tensor.data)
    return state


def restore(actor: Actor, loaded: dict[str, Any], *, updates: int) -> None:
    """Copy a loaded state into the actor; LoRA's base weights do not change.

    Args:
        loaded: `sharded_state(...)` after `dist_checkpointing.load`.
        updates: optimizer steps taken when it was saved.
    """
    for i, chunk in enumerate(actor.chunks):
        found = chunk.module.load_state_dict(loaded[f"model{i}"], strict=not actor.config.lora.rank)
        missing = [name for name in found.missing_keys if is_adapter(name)]
        assert not (missing or found.unexpected_keys), f"{missing} missing, {found.unexpected_keys} unexpected"
    if actor.config.parallel.distributed_optimizer:
        for piece in _distributed_pieces(actor, _model_state(actor), is_loading=True):
            piece.target.copy_(loaded[SHARDED][piece.key].flatten()[piece.elements])
    else:
        for key, (main, moments) in _plain_parameters(actor).items():
            for name, value in loaded["optimizer"][key].items():
                (main if name == MASTER else moments[name]).data.copy_(value)
    for name, weight in loaded.get("reference", {}).items():
        assert actor.reference is not None
        actor.reference.weights[name].copy_(weight)
    for optimizer in _single_optimizers(actor):
        _set_step(optimizer.optimizer, updates)
    if actor.config.fp8.parameters:
        fp8_weights.cast_main_weights(actor.chunks, actor.optimizer)
    actor.schedule.num_steps = 0
    actor.schedule.step(increment=updates)


def global_shapes(state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name and global shape of every tensor of a rank's `sharded_state`."""
    prepared, _, _ = load_preprocess(state)
    return {t.key: tuple(t.global_shape) for t in nested_values(prepared) if isinstance(t, ShardedTensor)}


def _model_state(actor: Actor) -> dict[str, Any]:
    """The weights that are trained: all, or LoRA's adapters."""
    chunks: list[Any] = actor.chunks
    states = {f"model{i}": chunk.module.sharded_state_dict() for i, chunk in enumerate(chunks)}
    if not actor.config.lora.rank:
        return states
    return {key: {n: value for n, value in state.items() if is_adapter(n)} for key, state in states.items()}


def _single_optimizers(actor: Actor) -> list[Any]:
    return getattr(actor.optimizer, "chained_optimizers", [actor.optimizer])


def _sharded_parameters(actor: Actor, model: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a model's sharded state, by global name."""
    by_identity = {
        id(tensor.data): tensor
        for tensor in nested_values(model)
        if isinstance(tensor, (ShardedTensor, ShardedTensorFactory))
    }
    names = _names(actor)
    return {names[key]: tensor for key, tensor in by_identity.items() if key in names}


def _distributed_pieces(actor: Actor, model: dict[str, Any], *, is_loading: bool) -> Iterator[Piece]:
    shards = (*actor.named_shards().items(), *actor.adapter_shards().items())
    sharded = _sharded_parameters(actor, model)
    by_identity = {id(parameter): sharded[name] for name, parameter in shards if name in sharded}
    for optimizer in _single_optimizers(actor):
        _create_state(optimizer.optimizer)
        yield from optimizer_pieces(optimizer, by_identity, whole_rows=is_loading)


def _plain_state(actor: Actor, model: dict[str, Any]) -> dict[str, Any]:
    sharded = _sharded_parameters(actor, model)
    state: dict[str, Any] = {}
    for name, (main, moments) in _plain_parameters(actor).items():
        tensors = {MASTER: main, **moments}
        state[name] = {
            key: make_sharded_optimizer_tensor(sharded[name], tensor, prefix=f"optimizer.state.{key}")
            for key, tensor in tensors.items()
        }
    return state


def _plain_parameters(actor: Actor) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """Name -> (the parameter that the optimizer updates, its moments); moments that do not exist yet are created."""
    names = _names(actor)
    result = {}
    for optimizer in _single_optimizers(actor):
        assert not isinstance(optimizer, DistributedOptimizer)
        _create_state(optimizer.optimizer)
        for parameter, main in _pairs(optimizer):
            state = optimizer.optimizer.state[main]
            result[names[id(parameter)]] = (main, {moment: state[moment] for moment in MOMENTS})
    return result


def _names(actor: Actor) -> dict[int, str]:
    """Global name of each parameter, by its identity."""
    return {id(parameter): name for name, parameter in (actor.named_shards() | actor.adapter_shards()).items()}


def _pairs(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of a model parameter and what the optimizer updates: an fp32 copy of a low-precision one, or itself."""
    if hasattr(optimizer, "float16_groups"):
        for low, high in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True):
            yield from zip(low, high, strict=True)
        for group in optimizer.fp32_from_fp32_groups:
            yield from zip(group, group, strict=True)
    else:
        for parameter in optimizer.get_parameters():
            yield parameter, parameter


def _create_state(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                for moment in MOMENTS:
                    state[moment] = torch.zeros_like(parameter.data, dtype=torch.float32)
                if _counts_per_parameter(optimizer):
                    state["step"] = torch.tensor(0.0)


def _set_step(optimizer: torch.optim.Optimizer, updates: int) -> None:
    for group in optimizer.param_groups:
        if not _counts_per_parameter(optimizer):
            group["step"] = updates
            continue
        for parameter in group["params"]:
            optimizer.state[parameter]["step"] = torch.tensor(float(updates))


def _counts_per_parameter(optimizer: torch.optim.Optimizer) -> bool:
    """PyTorch's Adam counts its steps per parameter, Apex's and Transformer Engine's per group."""
    return isinstance(optimizer, torch.optim.AdamW | torch.optim.Adam)
