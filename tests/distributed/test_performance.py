"""Performance settings change no number, and those that cannot be obeyed are one line.

Overlapped communication runs for real on CPU ranks over gloo, with buckets small enough that there are many. Fused
gradient accumulation needs a GPU: here only which layers are told to do it is looked at. Not run on a GPU.
"""

import dataclasses
import functools
from types import SimpleNamespace

import check_layouts
import numpy as np
import pytest
import torch
from local_ranks import run_on_ranks

from megatron_entropy.config.architecture import read_architecture
from megatron_entropy.config.fp8 import Fp8Config
from megatron_entropy.config.performance import PerformanceConfig, Switch
from megatron_entropy.config.schema import ActorConfig, LoraConfig, MoeConfig, OptimizerConfig, ParallelConfig
from megatron_entropy.config.speedups import Software, choices
from megatron_entropy.distributed import process_groups
from megatron_entropy.records import HeadInputs

pytestmark = pytest.mark.actor


def updates(folder: str, layout: ParallelConfig, settings: PerformanceConfig) -> tuple[list, dict]:
    """Losses and gradient norms of three updates, the last after a score, and then the weights."""
    from megatron_entropy.actor import actor as module
    from megatron_entropy.actor.statistics import policy_statistics
    from megatron_entropy.weights.hf_folder import TensorFolder
    from megatron_entropy.weights.source import load

    ddp = functools.partial(module.DistributedDataParallelConfig, bucket_size=20_000)
    module.DistributedDataParallelConfig = ddp
    process_groups.init_model_parallel(layout, seed=1)
    config = ActorConfig(
        parallel=layout, optimizer=OptimizerConfig(lr=1e-3), dtype="float32", max_tokens_per_microbatch=96,
        performance=settings,
    )  # fmt: skip
    actor = module.Actor(read_architecture(folder), config, total_updates=10)
    load(TensorFolder(folder), actor.arch, layout, actor.named_shards())
    actor.after_load()
    samples = check_layouts.make_samples(actor.arch.vocab_size)

    def statistics(head):
        assert head.impl == settings.head_kernels
        return policy_statistics(temperature=1.0)(head)

    found = []
    for update in range(3):
        metrics = actor.update(samples, lambda s, b: (-b.advantage * s.logprob, {}), temperature=1.0)
        found.append([metrics[f"train/{name}"].value for name in ("loss", "grad_norm")])
        if update == 1:
            scored = actor.score(samples, statistics)
            found.append([float(sample.logprob.sum()) for sample in scored[:2]])
    actor.gather_weights()
    if settings.overlap_grad_reduce is True and process_groups.rank() == 0:
        assert len(actor.chunks[0].buffers[0].buckets) > 1, "there is something to overlap"
    return found, {name: weight.detach().numpy().copy() for name, weight in actor.named_shards().items()}


@pytest.mark.parametrize(
    "layout",
    [
        ParallelConfig(dp=2, distributed_optimizer=True),
        ParallelConfig(pp=2, vpp=2, dp=2, distributed_optimizer=True),
        ParallelConfig(dp=2),
    ],
    ids=["dp2 sharded", "pp2 vpp2 dp2 sharded", "dp2"],
)
def test_overlapped_communication_changes_no_number(tmp_path, layout):
    check_layouts.make_checkpoint(tmp_path, experts=False)
    plain = PerformanceConfig(overlap_grad_reduce=False, overlap_param_gather=False, head_kernels="chunked")
    overlapped = PerformanceConfig(overlap_grad_reduce=True, overlap_param_gather=layout.distributed_optimizer)
    expected = run_on_ranks(updates, layout.world_size, str(tmp_path), layout, plain)
    found = run_on_ranks(updates, layout.world_size, str(tmp_path), layout, overlapped)
    for (numbers, weights), (expected_numbers, expected_weights) in zip(found, expected, strict=True):
        np.testing.assert_allclose(numbers, expected_numbers, rtol=1e-6)
        for name, weight in weights.items():
            np.testing.assert_allclose(weight, expected_weights[name], atol=1e-6, err_msg=name)


GPU = Software((9, 0), transformer_engine=True, apex=False, apex_fusion=False, triton=True)
CPU = Software(None, transformer_engine=False, apex=False, apex_fusion=False, triton=True)
NEWER = dataclasses.replace(GPU, capability=(12, 0))
SHARDED = ParallelConfig(dp=2, distributed_optimizer=True)


def active(actor: ActorConfig, software: Software) -> set[str]:
    return {name for name, choice in choices(actor, software).items() if choice.is_active}


def test_defaults_use_what_the_machine_has():
    keys = {name for name, field in PerformanceConfig.model_fields.items() if field.annotation == Switch}
    assert len(keys) == len(PerformanceConfig.model_fields) - 1 and "Triton head kernels" in active(ActorConfig(), GPU)
    assert keys <= active(ActorConfig(parallel=SHARDED), GPU)
    assert active(ActorConfig(parallel=SHARDED), CPU) == set()
    assert keys & active(ActorConfig(), GPU) == {"fuse_grad_accumulation"}, "one data parallel rank"
    assert keys & active(ActorConfig(parallel=ParallelConfig(dp=2)), GPU) == keys - {"overlap_param_gather"}
    plain = dataclasses.replace(GPU, transformer_engine=False)
    found = choices(ActorConfig(parallel=SHARDED), plain)
    assert "Apex" in found["fuse_grad_accumulation"].reason and "Apex would help" in found["fused AdamW"].reason
    assert "fuse_grad_accumulation" not in active(ActorConfig(lora=LoraConfig(rank=4)), GPU)
    assert all(choice.reason for choice in found.values())
    stored = ActorConfig(fp8=Fp8Config(recipe="current", parameters=True))
    assert "weights stored in FP8" in active(stored, GPU) - active(ActorConfig(), GPU)


@pytest.mark.parametrize(
    "settings, layout, software, expected",
    [
        (dict(overlap_param_gather=True), ParallelConfig(dp=2), GPU, "needs actor.parallel.distributed_optimizer=true"),
        (
            dict(overlap_param_gather=True, overlap_grad_reduce=False),
            SHARDED,
            GPU,
            "needs actor.performance.overlap_grad_reduce=true",
        ),
        (dict(fuse_grad_accumulation=True), SHARDED, CPU, "needs a GPU"),
        ({}, SHARDED, NEWER, 'head_kernels="auto": the Triton kernels are not compiled for compute capability 12.0'),
    ],
)
def test_a_setting_that_cannot_be_obeyed_is_one_line(settings, layout, software, expected):
    actor = ActorConfig(parallel=layout, performance=PerformanceConfig(**settings))
    problems = [choice.problem for choice in choices(actor, software).values() if choice.problem]
    assert len(problems) == 1 and expected in problems[0] and problems[0].startswith("actor.performance.")


def test_a_gpu_that_the_triton_kernels_were_not_compiled_for_can_be_configured():
    chunked = ActorConfig(performance=PerformanceConfig(head_kernels="chunked"))
    for actor in (chunked, ActorConfig(dtype="float32")):
        assert not any(choice.problem for choice in choices(actor, NEWER).values())
    assert "Triton head kernels" not in active(chunked, NEWER) | active(chunked, GPU)


@pytest.mark.parametrize("statistic", ["policy", "guided", "divergence"])
def test_the_configured_head_kernels_are_asked_for(statistic):
    from megatron_entropy.actor.divergence import ReferenceStates, compute_divergence
    from megatron_entropy.actor.statistics import policy_statistics
    from megatron_entropy.methods.curiosft import GuidedTemperature

    hidden, batch = torch.ones(2, 8), SimpleNamespace(order=(0,), reference_temperature=None)
    head = HeadInputs(hidden, torch.ones(4, 8), torch.zeros(2).long(), None, False, 4, impl="triton")
    compute = {
        "policy": lambda: policy_statistics(temperature=1.0)(head),
        "guided": lambda: GuidedTemperature()(head),
        "divergence": lambda: compute_divergence(
            head, batch, ReferenceStates({(0,): hidden}, head.weight), temperature=1.0, direction="forward"
        ),
    }
    with pytest.raises(ValueError, match="impl is 'triton', but hidden is on cpu"):
        compute[statistic]()


def test_fused_accumulation_reaches_the_linear_layers():
    from megatron_entropy.actor.model import fuse_grad_accumulation

    layer, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    layer.fuse_wgrad_accumulation = False
    fuse_grad_accumulation(torch.nn.Sequential(layer, other))
    assert layer.fuse_wgrad_accumulation and not hasattr(other, "fuse_wgrad_accumulation")


def head_gradients(folder: str, layouts: list[ParallelConfig]) -> list[list[dict]]:
    """Gradients of an update by parameter, added to `main_grad` by the head's kernels and by Megatron's hooks.

    Statistics and divergence both give the head a gradient, a tied embedding a third one.
    """
    from megatron_entropy.actor import schedules
    from megatron_entropy.actor.actor import Actor
    from megatron_entropy.actor.model import head_weight
    from megatron_entropy.weights.hf_folder import TensorFolder
    from megatron_entropy.weights.source import load

    def gradients(actor) -> dict[str, np.ndarray]:
        actor.update(samples, lambda s, b: (s.kl_forward - s.logprob, {}), temperature=1.0, divergence="forward")
        if schedules.is_output_rank():
            added = head_weight(actor.chunks[-1].module).grad_added_to_main_grad
            assert added == (actor._head_inputs == fused), "the kernels add the gradient"
        return {name: weight.main_grad.numpy().copy() for name, weight in actor.named_shards().items()}

    found = []
    for layout in layouts:
        process_groups.init_model_parallel(layout, seed=1)
        overlap = PerformanceConfig(overlap_grad_reduce=True)
        config = ActorConfig(
            parallel=layout, dtype="float32", max_tokens_per_microbatch=96, performance=overlap,
        )  # fmt: skip
        actor = Actor(read_architecture(folder), config, total_updates=10)
        load(TensorFolder(folder), actor.arch, layout, actor.named_shards())
        actor.set_reference("initial")
        for weight in actor.named_shards().values():
            weight.data.mul_(1.1)  # else the divergence is zero
        actor._optimizer_step = dict  # the weights stay
        samples = check_layouts.make_samples(actor.arch.vocab_size)
        fused = actor._head_inputs
        both = [gradients(actor)]
        actor._head_inputs = lambda *inputs, fused=fused: dataclasses.replace(fused(*inputs), main_grad=None)
        found.append([*both, gradients(actor)])
    return found


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_head_adds_its_whole_gradient_to_main_grad(tmp_path, tied):
    from transformers import AutoModelForCausalLM

    check_layouts.make_checkpoint(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=tied).save_pretrained(tmp_path)
    layouts = [
        ParallelConfig(tp=2, sequence_parallel=True),
        ParallelConfig(pp=2),
        ParallelConfig(dp=2, distributed_optimizer=True),
        ParallelConfig(cp=2),
    ]
    for rank in run_on_ranks(head_gradients, 2, str(tmp_path), layouts):
        for layout, (fused, plain) in zip(layouts, rank, strict=True):
            assert fused.keys() == plain.keys()
            for name, gradient in fused.items():
                np.testing.assert_allclose(
                    gradient, plain[name], rtol=1e-5, atol=1e-6 * np.abs(plain[name]).max(), err_msg=f"{layout} {name}"
                )


def device_waits(folder: str, max_tokens: int) -> tuple[int, int]:
    """Micro-batches of an update, and numbers that actor and methods read from tensors meanwhile.

    On a GPU each would wait for the device. Megatron's plain rotary embedding and the kernels' checks are not counted.
    """
    import traceback

    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_entropy.actor import schedules
    from megatron_entropy.actor.actor import Actor
    from megatron_entropy.methods.objectives import masked_mean
    from megatron_entropy.weights.hf_folder import TensorFolder
    from megatron_entropy.weights.source import load

    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "_local_scalar_dense" in str(function):
                callers = [frame.filename for frame in traceback.extract_stack()[:-1]]
                caller = next(name for name in reversed(callers) if "/torch/" not in name)
                self.count += caller.endswith(("actor/actor.py", "actor/schedules.py", "methods/objectives.py"))
            return function(*args, **(kwargs or {}))

    process_groups.init_model_parallel(ParallelConfig(), seed=1)
    config = ActorConfig(dtype="float32", max_tokens_per_microbatch=max_tokens)
    actor = Actor(read_architecture(folder), config, total_updates=10)
    load(TensorFolder(folder), actor.arch, config.parallel, actor.named_shards())
    samples = check_layouts.make_samples(actor.arch.vocab_size)

    def loss(stats, batch):
        metrics = {f"policy/{i}": masked_mean(stats.entropy, batch.weight != 0) for i in range(5)}
        return -batch.advantage * stats.logprob, metrics

    with Counter() as counter:
        actor.update(samples, loss, temperature=1.0)
    return len(schedules.pack_samples(samples, config)), counter.count


def test_metrics_wait_for_the_device_once_a_step(tmp_path):
    check_layouts.make_checkpoint(tmp_path, experts=False)
    few, many = (run_on_ranks(device_waits, 1, str(tmp_path), size)[0] for size in (600, 96))
    assert few[0] == 1 and many[0] == 4 and few[1] == many[1] <= 3


def router_gradient_norms(folder: str, layout: ParallelConfig, size: int, losses: MoeConfig) -> float:
    """Gradient norm of the routers' losses alone: the tokens have no weight."""
    from megatron_entropy.actor.actor import Actor
    from megatron_entropy.weights.hf_folder import TensorFolder
    from megatron_entropy.weights.source import load

    process_groups.init_model_parallel(layout, seed=1)
    config = ActorConfig(parallel=layout, dtype="float32", max_tokens_per_microbatch=size, moe=losses)
    actor = Actor(read_architecture(folder), config, total_updates=10)
    load(TensorFolder(folder), actor.arch, layout, actor.named_shards())
    actor.after_load()
    sample = check_layouts.make_samples(actor.arch.vocab_size)[2]  # whole chunks: routers see padding
    samples = [dataclasses.replace(sample, weight=sample.constant(0.0))] * 4  # packs use the experts alike
    metrics = actor.update(samples, lambda s, b: (-s.logprob, {}), temperature=1.0)
    return metrics["train/grad_norm"].value


@pytest.mark.parametrize("losses", [MoeConfig(aux_loss_coeff=0.5), MoeConfig(z_loss_coeff=0.5)], ids=str)
def test_losses_of_the_routers_are_equal_under_every_layout(tmp_path, losses):
    check_layouts.make_checkpoint(tmp_path, experts=True)
    folder = str(tmp_path)
    assert run_on_ranks(router_gradient_norms, 1, folder, ParallelConfig(), 1024, MoeConfig()) == [0.0]
    expected = run_on_ranks(router_gradient_norms, 1, folder, ParallelConfig(), 1024, losses)[0]
    assert expected > 0.1
    for layout, size in (
        (ParallelConfig(dp=2, ep=2), 100),
        (ParallelConfig(tp=2, cp=2, sequence_parallel=True), 1024),
    ):
        found = run_on_ranks(router_gradient_norms, layout.world_size, folder, layout, size, losses)[0]
        assert found == pytest.approx(expected, rel=1e-5), str(layout)
