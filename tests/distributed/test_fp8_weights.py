"""Weights stored in FP8 through load, update, gather, weight sync and checkpoint, on CPU ranks.

Megatron's model, buffers and distributed optimizer are the real ones. `Stored` stands in for Transformer Engine's
tensor: it looks like bfloat16, holds bytes of E4M3 and one scale, and rounds what is written to it. The functions of
`megatron.core.fp8_utils` that call Transformer Engine are replaced by ones that treat `Stored` as Transformer Engine
2.20.2 treats its own. What this does not prove: that Transformer Engine's tensors behave so. Not run on a GPU.
"""

import contextlib
import functools
import sys
from pathlib import Path
from types import SimpleNamespace

import check_layouts
import numpy as np
import pytest
import torch
import torch.distributed as dist
from local_ranks import run_on_ranks

from megatron_entropy.config.architecture import read_architecture
from megatron_entropy.config.fp8 import Fp8Config
from megatron_entropy.config.performance import PerformanceConfig
from megatron_entropy.config.schema import ActorConfig, OptimizerConfig, ParallelConfig
from megatron_entropy.distributed import process_groups
from megatron_entropy.weights.manifest import StageProgress

pytestmark = pytest.mark.actor

SHARDED = ParallelConfig(dp=2, distributed_optimizer=True)
TP2 = ParallelConfig(tp=2, distributed_optimizer=True)
LARGEST = 448.0


class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


def round_to_bytes(values, inverse_scale):
    scaled = (values.float() / inverse_scale).clamp(-LARGEST, LARGEST)
    return scaled.to(torch.float8_e4m3fn).view(-1).view(torch.uint8)


class Stored(torch.Tensor):
    """Bytes of E4M3 with one scale. `transposed`: the copy that a backward pass on Hopper would read."""

    @staticmethod
    def __new__(cls, payload, inverse_scale):
        return torch.Tensor._make_wrapper_subclass(cls, payload.shape, dtype=torch.bfloat16, device=payload.device)

    def __init__(self, payload, inverse_scale):
        self.payload, self.inverse_scale, self.transposed = payload, inverse_scale, None

    __torch_function__ = torch._C._disabled_torch_function_impl

    def detach(self):
        return Stored(self.payload, self.inverse_scale)

    def expand_as(self, other):
        return Identity.apply(self)

    def dequantize(self):
        return (self.payload.view(torch.float8_e4m3fn).float() * self.inverse_scale).bfloat16()

    def write(self, values, largest, start=0):
        """Round values into the bytes from `start` on, with the scale of a largest absolute value."""
        self.inverse_scale.copy_(largest.float() / LARGEST)
        self.payload.view(-1)[start : start + values.numel()].copy_(round_to_bytes(values, self.inverse_scale))

    @classmethod
    def __torch_dispatch__(cls, function, types, args, kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0].detach()
        if function is torch.ops.aten.copy_.default and isinstance(args[0], Stored):
            args[0].write(args[1], args[1].abs().max())
            args[0].transposed = args[0].payload.t().clone()
            return args[0]
        copies = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)
        if function in copies and (kwargs or {}).get("dtype") in (None, torch.bfloat16):
            return Stored(args[0].payload.clone(), args[0].inverse_scale.clone())
        plain = [arg.dequantize() if isinstance(arg, Stored) else arg for arg in args]
        return function(*plain, **(kwargs or {}))


def replace_storage(weight, payload):
    payload.copy_(weight.payload)
    weight.payload = payload


def round_shards(weights, mains, starts, group, *unused):
    """Round this rank's ranges; the scales of all weights are those of all ranks' values."""
    mains = [None if main is None else main.bfloat16() for main in mains]
    largest = torch.tensor([0.0 if main is None else float(main.abs().max()) for main in mains])
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    for weight, main, start, value in zip(weights, mains, starts, largest, strict=True):
        if main is None:
            weight.inverse_scale.copy_(value / LARGEST)
        else:
            weight.write(main, value, start)


def renew_transposed(weights):
    for weight in weights:
        weight.transposed = weight.payload.t().clone()


def _separate_collectives():
    """Gloo mixes up coalesced tensors of several types: each gets a collective of its own, complete when it returns."""
    from megatron.core.distributed import param_and_grad_buffer as buffers

    buffers._coalescing_manager = lambda *args, **options: contextlib.nullcontext(SimpleNamespace(wait=lambda: None))
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        collective = getattr(buffers, name)
        setattr(
            buffers, name, lambda *a, call=collective, **options: call(*a, **{**options, "async_op": False}) and None
        )


def stand_in():
    """Let Megatron and the actor see linear weights of the layers as stored in FP8."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from megatron_entropy.actor import actor as module
    from megatron_entropy.actor import fp8

    replaced = {
        "is_float8tensor": lambda tensor: isinstance(tensor, Stored),
        "dequantize_fp8_tensor": Stored.dequantize,
        "modify_underlying_storage": replace_storage,
        "quantize_param_shard": round_shards,
        "post_all_gather_processing": renew_transposed,
    }
    for name, core in list(sys.modules.items()):
        if name.startswith("megatron.core"):
            for function in replaced.keys() & vars(core).keys():
                setattr(core, function, replaced[function])
    _separate_collectives()
    fp8.is_active = lambda config: False  # the layers are plain ones
    build_chunks = module.build_chunks

    def build(*args):
        chunks = build_chunks(*args)
        for layer in (layer for chunk in chunks for layer in chunk.decoder.modules()):
            if isinstance(layer, (ColumnParallelLinear, RowParallelLinear)):
                marks = vars(layer.weight)
                stored = Stored(torch.zeros(layer.weight.shape, dtype=torch.uint8), torch.ones(()))
                layer.weight = torch.nn.Parameter(stored)
                vars(layer.weight).update(marks)
        return chunks

    module.build_chunks = build
    ddp = functools.partial(module.DistributedDataParallelConfig, bucket_size=20_000)
    module.DistributedDataParallelConfig = ddp


def build(folder, layout, overlaps):
    from megatron_entropy.actor.actor import Actor

    process_groups.init_model_parallel(layout, seed=1)
    stand_in()
    config = ActorConfig(
        parallel=layout, optimizer=OptimizerConfig(lr=1e-3, eps=1e-3), dtype="bfloat16", max_tokens_per_microbatch=192,
        fp8=Fp8Config(recipe="current", parameters=True),
        performance=PerformanceConfig(overlap_grad_reduce=overlaps, overlap_param_gather=overlaps),
    )  # fmt: skip
    actor = Actor(read_architecture(folder), config, total_updates=10)
    assert actor.chunks[0].ddp_config.fp8_param_gather and actor.optimizer.config.fp8_recipe == "tensorwise"
    return actor


def stored_weights(actor):
    return {name: weight for name, weight in actor.named_shards().items() if isinstance(weight, Stored)}


def owned(actor, name):
    """This rank's fp32 weights of a parameter, and the elements of it that they are."""
    parameter = actor.named_shards()[name]
    (optimizer,) = getattr(actor.optimizer, "chained_optimizers", [actor.optimizer])
    if parameter.main_param is None:
        return None
    span = optimizer._get_model_param_range_map(parameter)["param"]
    return parameter.main_param, slice(span.start, span.end)


def check_load(actor, folder):
    """Load twice: as the trainer does, and without the loader, which rounds the fp32 weights too."""
    from megatron_entropy.weights.hf_folder import TensorFolder
    from megatron_entropy.weights.source import load

    arch, layout, local = actor.arch, actor.config.parallel, actor.named_shards()
    stored, values = stored_weights(actor), {}
    assert {name.split(".")[-2] for name in stored} == {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}
    load(TensorFolder(folder), arch, layout, local)
    actor.after_load()
    for name in local:
        if found := owned(actor, name):
            assert torch.equal(found[0], actor.merged_shards()[name].reshape(-1)[found[1]].float()), name

    def copy(parameter, loaded):
        name = next(name for name, other in local.items() if other is parameter)
        values[name] = loaded.reshape(-1).float()
        actor.loader.copy(parameter, loaded)

    load(TensorFolder(folder), arch, layout, local, copy=copy)
    actor.after_load()
    checked = 0
    for name, parameter in local.items():
        if (found := owned(actor, name)) is None:
            continue
        if name in stored:
            assert torch.equal(found[0], values[name][found[1]]), f"{name}: the fp32 weights are the loaded values"
            assert not torch.equal(parameter.dequantize().reshape(-1)[found[1]].float(), found[0])
            checked += 1
        else:
            assert torch.equal(found[0], parameter.detach().reshape(-1)[found[1]].float()), name
    assert checked


def check_weights(actor):
    """Every rank holds the fp32 weights of all ranks, rounded; what a weight sync reads are these values."""
    from megatron_entropy.weights.source import ShardedSource

    stored, shards = stored_weights(actor), actor.merged_shards()
    for name, weight in stored.items():
        assert torch.equal(weight.transposed, weight.payload.t()), f"{name}: a backward pass would read old weights"
        assert type(shards[name]) is torch.Tensor and torch.equal(shards[name], weight.dequantize())
        if found := owned(actor, name):
            rounded = round_to_bytes(found[0].bfloat16(), weight.inverse_scale)
            assert torch.equal(rounded, weight.payload.view(-1)[found[1]]), name
    tp = actor.config.parallel.tp
    source = ShardedSource(actor.arch, actor.config.parallel, shards, torch.bfloat16)
    synced = {name: tensor for name, tensor in source if tensor is not None}
    if synced:
        weight = stored["decoder.layers.0.self_attention.linear_proj.weight"].dequantize()
        assert torch.equal(synced["model.layers.0.self_attn.o_proj.weight"].chunk(tp, 1)[0], weight)
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, {name: weight.payload.numpy().copy() for name, weight in stored.items()})
    if tp == 1:
        for other in gathered[1:]:
            assert all(np.array_equal(other[name], payload) for name, payload in gathered[0].items())
    return gathered[0]


def train(folder, checkpoints, layout, overlaps, saves):
    """Losses and gradient norms of updates 3 and 4, after saving or loading the state of update 2, and the bytes."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from megatron_entropy.checkpoint import saver as checkpoint
    from megatron_entropy.checkpoint.sharded_state import sharded_state

    actor = build(folder, layout, overlaps)
    samples = check_layouts.make_samples(actor.arch.vocab_size)
    expected = StageProgress(2, 2, 7, "settings") if saves else None

    def update():
        metrics = actor.update(samples, lambda s, b: (-b.advantage * s.logprob, {}), temperature=1.0)
        actor.gather_weights()
        return [metrics[f"train/{name}"].value for name in ("loss", "grad_norm")]

    if saves:
        check_load(actor, folder)
        saver = checkpoint.Saver(Path(checkpoints), keep=2, asynchronous=True)
        update()
        update()
        described = nested_values(sharded_state(actor, is_loading=False))
        assert not any(isinstance(getattr(tensor, "data", None), Stored) for tensor in described)
        saver.save(actor, expected)
        before = check_weights(actor)
    else:
        path, progress = checkpoint.newest(Path(checkpoints))
        checkpoint.load(path, actor, progress)
        before = check_weights(actor)
    found = [update(), update()]
    after = check_weights(actor)
    assert any(not np.array_equal(before[name], after[name]) for name in before)
    if saves:
        saver.close()
    actor.close()
    return found, before, after


def test_fp8_weights_train_gather_and_resume(tmp_path):
    folder, checkpoints = str(tmp_path / "model"), str(tmp_path / "checkpoints")
    check_layouts.make_checkpoint(Path(folder), experts=False)
    expected, before, after = run_on_ranks(train, 2, folder, checkpoints, SHARDED, False, True)[0]
    found, restored, continued = run_on_ranks(train, 2, folder, checkpoints, SHARDED, False, False)[0]
    assert found == expected
    for mine, theirs in ((restored, before), (continued, after)):
        assert all(np.array_equal(mine[name], theirs[name]) for name in theirs), "resumed to the bit"
    # Other buckets sum the gradient norm in another order; gathers in flight.
    found, restored, _ = run_on_ranks(train, 2, folder, checkpoints, SHARDED, True, False)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert all(np.array_equal(restored[name], before[name]) for name in before)
    # Halves of a weight have scales of their own: rounded from the fp32 weights, not from what was rounded before.
    found = run_on_ranks(train, 2, folder, checkpoints, TP2, False, False)[0][0]
    np.testing.assert_allclose(found, expected, rtol=0.05)
