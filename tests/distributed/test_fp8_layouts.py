"""Emulated FP8 in the actor: right under tensor, sequence, context, pipeline and data parallelism, and in checkpoints.

`tools/check_layouts.py --fp8` has every layout; here are those that share a sequence or a weight. The communication is
tested without rounding (the emulation's recipe `bfloat16` in fp32), where every layout agrees within 1e-5.
"""

from typing import Any

import check_layouts
import numpy as np
import pytest
import torch
from local_ranks import run_on_ranks

from megatron_entropy.config.architecture import read_architecture
from megatron_entropy.config.schema import ActorConfig, OptimizerConfig, ParallelConfig
from megatron_entropy.distributed import process_groups

pytestmark = pytest.mark.actor

ONE, TP2 = ParallelConfig(), ParallelConfig(tp=2)
TP2_SP_CP2 = ParallelConfig(tp=2, cp=2, sequence_parallel=True)


def unrounded_update(folder, parallel, emulated):
    """Log-probs, then loss and gradient norm of an update, with or without the emulation's products."""
    from megatron_entropy.actor import fp8_emulation

    actor, samples = build(folder, parallel)
    if emulated:
        modules: list[Any] = [chunk.module for chunk in actor.chunks]
        count = fp8_emulation.attach(modules, "bfloat16", num_layers=4, first_exact=1)
        assert count == sum(4 for m in modules for layer in m.decoder.layers if layer.layer_number > 1)
    return score_and_update(actor, samples)


def build(folder, parallel, **settings):
    from megatron_entropy.actor.actor import Actor
    from megatron_entropy.weights.hf_folder import TensorFolder
    from megatron_entropy.weights.source import load

    process_groups.init_model_parallel(parallel, seed=1)
    arch = read_architecture(folder)
    optimizer = OptimizerConfig(lr=1e-3, eps=1e-3)
    config = ActorConfig(
        parallel=parallel, optimizer=optimizer, dtype="float32", max_tokens_per_microbatch=256, **settings
    )
    actor = Actor(arch, config, total_updates=2)
    load(TensorFolder(folder), arch, parallel, actor.named_shards())
    actor.after_load()
    return actor, check_layouts.make_samples(arch.vocab_size)


def score_and_update(actor, samples):
    from megatron_entropy.actor.statistics import policy_statistics

    scored = actor.score(samples, policy_statistics(temperature=1.0))
    metrics = actor.update(scored, lambda stats, batch: (-stats.logprob, {}), temperature=1.0)
    again = actor.score(samples, policy_statistics(temperature=1.0))
    logprobs = [np.concatenate([s.response("logprob") for s in found]) for found in (scored, again)]
    return *logprobs, {name: metric.value for name, metric in metrics.items()}


def test_communication_around_the_products_is_that_of_megatrons_layers(tmp_path):
    check_layouts.make_checkpoint(tmp_path)
    before, after, metrics = run_on_ranks(unrounded_update, 1, str(tmp_path), ONE, False)[0]
    for parallel in (ONE, TP2, TP2_SP_CP2, ParallelConfig(pp=2, vpp=2)):
        found = run_on_ranks(unrounded_update, parallel.world_size, str(tmp_path), parallel, True)[0]
        np.testing.assert_allclose(found[0], before, rtol=0, atol=1e-5, err_msg=str(parallel))
        np.testing.assert_allclose(found[1], after, rtol=0, atol=1e-5)
        assert found[2]["train/grad_norm"] == pytest.approx(metrics["train/grad_norm"], rel=1e-5)


def test_scales_for_each_token_select_the_same_tokens_under_every_layout():
    names = ("1x1", "TP2+SP", "DP2")
    layouts = tuple(layout for layout in check_layouts.LAYOUTS if layout.name in names)
    rows = check_layouts.run(layouts, fp8=check_layouts.RECIPES["mxfp8"])
    assert [row["layout"] for row in rows] == list(names)
    assert [row["selections"] for row in rows] == [0, 0, 0]
    assert all(row["logprob"] < 0.05 for row in rows)


def delayed(folder, parallel, checkpoint):
    """Train twice with delayed scaling, save in between, and repeat the second update from the checkpoint."""
    from megatron_entropy.actor.fp8_emulation import LinearEmulation
    from megatron_entropy.checkpoint import saver
    from megatron_entropy.config.fp8 import Fp8Config
    from megatron_entropy.weights.manifest import StageProgress

    def states(actor):
        modules = [m for chunk in actor.chunks for m in chunk.modules() if isinstance(m, LinearEmulation)]
        return torch.stack([m.scale for m in modules]), torch.stack([m.amax_history[:3] for m in modules])

    settings = Fp8Config(recipe="delayed", emulate=True)
    actor, samples = build(folder, parallel, fp8=settings)
    first = score_and_update(actor, samples)
    progress = StageProgress(1, 1, 0, "", {}, {})
    writer = saver.Saver(checkpoint, keep=1, asynchronous=False, resumed_step=0)
    writer.save(actor, progress)
    writer.close()
    scale, history = states(actor)
    second = score_and_update(actor, samples)
    restored, _ = build(folder, parallel, fp8=settings)
    saver.load(next(checkpoint.glob("step_*")), restored, progress)
    assert all(torch.equal(a, b) for a, b in zip(states(restored), (scale, history), strict=True))
    repeated = score_and_update(restored, samples)
    np.testing.assert_array_equal(repeated[0], second[0])
    np.testing.assert_array_equal(repeated[1], second[1])
    return first[2], scale.numpy(), history.numpy()  # a tensor would be shared memory of a rank that ends


@pytest.mark.parametrize("parallel", [ONE, TP2_SP_CP2])
def test_delayed_scales_follow_the_largest_magnitudes_and_come_back_from_a_checkpoint(tmp_path, parallel):
    check_layouts.make_checkpoint(tmp_path / "model")
    found = run_on_ranks(delayed, parallel.world_size, str(tmp_path / "model"), parallel, tmp_path / "checkpoints")
    metrics, scale, history = found[0]
    assert metrics["train/fp8_emulated"] == 1
    largest = history[:, 1:].max(axis=1)  # of both micro-batches; row 0 is of the pass without gradients behind them
    np.testing.assert_allclose(scale[:, :2], 448 / largest[:, :2], rtol=1.3e-6)  # fp32
    assert (scale[:, 2] != 1).all()  # gradients of an earlier micro-batch
    if parallel.tp > 1:  # reduced over the group
        for other in found[1:]:
            np.testing.assert_array_equal(found[0][1], other[1])
