"""References: a copy scores as the weights it was made from, an EMA follows its formula, the policy never changes.

The real Megatron model on gloo ranks. Layout invariance is part of test_layouts.py, LoRA's base of test_lora.py.
"""

from pathlib import Path

import check_layouts
import numpy as np
import pytest
import torch
from local_ranks import run_on_ranks
from test_checkpoint import build, load_folder

from megatron_entropy.actor.reference import EmaCopy, FrozenCopy, LoraBase, PolicyItself, build_reference, needs_weights
from megatron_entropy.actor.statistics import policy_statistics, reference_statistics
from megatron_entropy.config.schema import ParallelConfig

pytestmark = pytest.mark.actor
TP2 = ParallelConfig(tp=2)
PP2 = ParallelConfig(pp=2)
DP2_SHARDED = ParallelConfig(dp=2, distributed_optimizer=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    check_layouts.make_checkpoint(path, experts=False)
    return str(path)


def loss(stats, batch):
    return -batch.advantage * stats.logprob, {}


def values(samples, field):
    return np.concatenate([sample.response(field) for sample in samples])


def check_references(folder: str, layout: ParallelConfig, on_host: bool) -> None:
    actor = build(folder, layout)
    actor.config = actor.config.model_copy(update={"reference_on_host": on_host})
    load_folder(actor, folder)
    samples = check_layouts.make_samples(actor.arch.vocab_size)
    start = values(actor.score(samples, policy_statistics(temperature=0.8, entropy=False)), "logprob")
    actor.set_reference("initial")
    for _ in range(3):  # the first has a learning rate of 0
        actor.update(samples, loss, temperature=1.0)
    trained = {name: parameter.detach().clone() for name, parameter in actor.named_shards().items()}
    policy = values(actor.score(samples, policy_statistics(temperature=0.8, entropy=False)), "logprob")
    assert np.abs(policy - start).max() > 1e-3, "the updates changed the policy"

    scored = actor.score_reference(samples, reference_statistics(temperature=0.8))
    assert np.array_equal(values(scored, "reference_logprob"), start), "the initial policy, to the bit"
    assert all(s.reference_temperature is None and s.logprob is None for s in scored)
    for name, parameter in actor.named_shards().items():
        assert torch.equal(parameter, trained[name]), f"{name} was changed by a pass of the reference"
    assert np.array_equal(
        values(actor.score(samples, policy_statistics(temperature=0.8, entropy=False)), "logprob"), policy
    )

    actor.set_reference("policy")
    itself = actor.score_reference(samples, reference_statistics(temperature=0.8))
    assert np.array_equal(values(itself, "reference_logprob"), policy)

    # The divergence of equal distributions is zero.
    for kind, direction in (("initial", "forward"), ("initial", "reverse"), ("policy", "reverse")):
        seen = {}

        def record(stats, batch, seen=seen, direction=direction):
            seen["kl"] = getattr(stats, f"kl_{direction}").detach()
            return 0.0 * stats.logprob, {}

        actor.set_reference(kind)
        actor.update(samples, record, temperature=1.0, divergence=direction)
        if seen:
            assert seen["kl"].abs().max() < 1e-5


@pytest.mark.parametrize("layout", [TP2, PP2, DP2_SHARDED], ids=["TP2", "PP2", "DP2 sharded"])
def test_a_frozen_copy_scores_as_the_initial_policy(folder, layout):
    run_on_ranks(check_references, 2, folder, layout, layout is PP2)


def ema_scores(folder: str, checkpoints: str, layout: ParallelConfig, saves: bool) -> np.ndarray:
    """Log-probabilities of an EMA reference that was loaded from a checkpoint, after saving it or not."""
    from megatron_entropy.checkpoint import saver as checkpoint

    actor = build(folder, layout)
    samples = check_layouts.make_samples(actor.arch.vocab_size)
    load_folder(actor, folder)
    actor.set_reference("ema")
    if saves:
        actor.update(samples, loss, temperature=1.0)
        actor.update(samples, loss, temperature=1.0)
        actor.reference.update_ema(0.3)
        actor.update(samples, loss, temperature=1.0)
        saver = checkpoint.Saver(Path(checkpoints), keep=2, asynchronous=True)
        saver.save(actor, checkpoint.StageProgress(2, 2, 0, "settings"))
        actor.reference.update_ema(0.9)  # training continues while it is written
        saver.close()
    path, progress = checkpoint.newest(Path(checkpoints))
    checkpoint.load(path, actor, progress)
    return values(actor.score_reference(samples, reference_statistics(temperature=1.0)), "reference_logprob")


def test_an_ema_reference_is_restored_under_another_layout(folder, tmp_path):
    expected = run_on_ranks(ema_scores, 2, folder, str(tmp_path), TP2, True)[0]
    for layout in (TP2, PP2, DP2_SHARDED):
        found = run_on_ranks(ema_scores, 2, folder, str(tmp_path), layout, False)[0]
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=str(layout))


def test_the_kind_chooses_the_class():
    parameters = {"w": torch.nn.Parameter(torch.ones(3))}

    def built(kind: str) -> type:
        return type(build_reference(kind, parameters, [], on_host=False, base_is_reference=False))

    kinds = ("none", "initial", "ema", "policy")
    assert [built(kind) for kind in kinds] == [type(None), FrozenCopy, EmaCopy, PolicyItself]
    assert [needs_weights(kind) for kind in kinds] == [False, True, True, False]
    lora_base = build_reference("initial", parameters, [], on_host=False, base_is_reference=True)
    assert type(lora_base) is LoraBase and not lora_base.weights
    with pytest.raises(TypeError, match='FrozenCopy is not a moving average; a method needs reference = "ema"'):
        FrozenCopy(parameters).update_ema(0.5)


@pytest.mark.parametrize("alpha,expected", [(0.99, 1.99), (0.01, 1.01), (0.0, 1.0), (1.0, 2.0)])
def test_an_ema_moves_by_alpha_towards_the_policy(alpha, expected):
    weight = torch.nn.Parameter(torch.ones(3))
    reference = EmaCopy({"w": weight})
    weight.data.fill_(2.0)
    reference.update_ema(alpha)
    torch.testing.assert_close(reference.weights["w"], torch.full((3,), expected))
    assert weight.tolist() == [2.0] * 3 and not reference.weights["w"].requires_grad


def test_small_ema_steps_of_a_bfloat16_model_are_not_lost():
    """0.001 of the way from 1 to 2, 500 times: an average in bfloat16 (8 bits) would stay at 1."""
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    reference = EmaCopy({"w": weight})
    weight.data.fill_(2.0)
    for _ in range(500):
        reference.update_ema(0.001)
    torch.testing.assert_close(reference.weights["w"], torch.full((3,), 2 - 0.999**500), rtol=1e-4, atol=0)
    with reference.active():
        assert weight.dtype == torch.bfloat16 and float(weight.data[0]) == pytest.approx(1.3936, abs=0.01)
    assert float(weight.data[0]) == 2.0
    stuck = torch.ones(3, dtype=torch.bfloat16)
    assert torch.equal(stuck.lerp(weight.data, 0.001), stuck), "the reason for fp32"


def test_the_policy_is_restored_after_an_error():
    weight = torch.nn.Parameter(torch.ones(3))
    reference = FrozenCopy({"w": weight})
    weight.data.fill_(2.0)
    with pytest.raises(RuntimeError), reference.active():
        raise RuntimeError("a pass that failed")
    assert float(weight.data[0]) == 2.0
