"""The second set of weights: it scores as the model it is a copy of, moves as told, leaves the policy as it was.

The real Megatron model on gloo ranks. That it is the same under every layout is part of tests/test_layouts.py.
"""

from pathlib import Path

import check_layouts
import local_ranks
import numpy as np
import pytest
import torch
from test_checkpoint import build, load_folder

from megatron_entropy.actor.reference import Reference
from megatron_entropy.config.schema import ParallelConfig
from megatron_entropy.records import GuidedTemperature

pytestmark = pytest.mark.actor
TP2 = ParallelConfig(tp=2)
PP2 = ParallelConfig(pp=2)
DP2_SHARDED = ParallelConfig(dp=2, distributed_optimizer=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    place = tmp_path_factory.mktemp("model")
    check_layouts.make_checkpoint(place, experts=False)
    return str(place)


def loss(stats, batch):
    return -batch.advantage * stats.logprob, {}


def values(samples, field):
    return np.concatenate([sample.response(field) for sample in samples])


def life_of_a_reference(folder: str, layout: ParallelConfig, on_host: bool) -> None:
    actor = build(folder, layout)
    actor.config = actor.config.model_copy(update={"reference_on_host": on_host})
    load_folder(actor, folder)
    samples = check_layouts.make_samples(actor.arch.vocab_size)
    start = values(actor.score(samples, temperature=0.8), "logprob")
    actor.keep_reference(moving=False)
    for _ in range(3):  # the first has a learning rate of 0
        actor.update(samples, loss, temperature=1.0)
    trained = {name: parameter.detach().clone() for name, parameter in actor.named_shards().items()}
    policy = values(actor.score(samples, temperature=0.8), "logprob")
    assert np.abs(policy - start).max() > 1e-3, "the update did something"

    scored = actor.score_reference(samples, temperature=0.8)
    assert np.array_equal(values(scored, "reference_logprob"), start), "what the policy was, to the bit"
    assert all(s.reference_temperature is None and s.logprob is None for s in scored)
    itself = actor.score_reference(samples, temperature=0.8, by_policy=True)
    assert np.array_equal(values(itself, "reference_logprob"), policy)
    for name, parameter in actor.named_shards().items():
        assert torch.equal(parameter, trained[name]), f"{name} was changed by a pass of the reference"
    assert np.array_equal(values(actor.score(samples, temperature=0.8), "logprob"), policy)

    # Zero divergence where both are the same, and the gradient of the rest alone.
    for direction in ("forward", "reverse"):
        seen = {}

        def look(stats, batch, seen=seen, direction=direction):
            seen["kl"] = getattr(stats, f"kl_{direction}").detach()
            return 0.0 * stats.logprob, {}

        actor.keep_reference(moving=False)
        actor.update(samples, look, temperature=1.0, divergence=direction)
        if seen:
            assert seen["kl"].abs().max() < 1e-5


@pytest.mark.parametrize("layout", [TP2, PP2, DP2_SHARDED], ids=["TP2", "PP2", "DP2 sharded"])
def test_a_reference_is_what_the_policy_was(folder, layout):
    local_ranks.run_on_ranks(life_of_a_reference, 2, folder, layout, layout is PP2)


def teacher_after_a_save(folder: str, checkpoints: str, layout: ParallelConfig, saves: bool) -> list[np.ndarray]:
    """Log-probs and temperatures of a teacher that has moved, before or after a checkpoint."""
    from megatron_entropy.checkpoint import saver as checkpoint

    actor = build(folder, layout)
    samples = check_layouts.make_samples(actor.arch.vocab_size)
    load_folder(actor, folder)
    actor.keep_reference(moving=True)
    if saves:
        actor.update(samples, loss, temperature=1.0)
        actor.update(samples, loss, temperature=1.0)
        actor.reference.move(0.3)
        actor.update(samples, loss, temperature=1.0)
        saver = checkpoint.Saver(Path(checkpoints), keep=2, asynchronous=True)
        saver.save(actor, checkpoint.Progress(2, 2, 0, "settings"))
        actor.reference.move(0.9)  # training goes on while it is written
        saver.close()
    path, progress = checkpoint.newest(Path(checkpoints))
    checkpoint.load(path, actor, progress)
    scored = actor.score_reference(samples, temperature=GuidedTemperature(top=32, pivot=4.0))
    return [values(scored, "reference_logprob"), values(scored, "reference_temperature")]


def test_a_teacher_that_moved_comes_back_under_another_layout(folder, tmp_path):
    expected = local_ranks.run_on_ranks(teacher_after_a_save, 2, folder, str(tmp_path), TP2, True)[0]
    for layout in (TP2, PP2, DP2_SHARDED):
        found = local_ranks.run_on_ranks(teacher_after_a_save, 2, folder, str(tmp_path), layout, False)[0]
        for mine, its in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine, its, atol=1e-5, err_msg=str(layout))


@pytest.mark.parametrize("share,expected", [(0.99, 1.99), (0.01, 1.01), (0.0, 1.0), (1.0, 2.0)])
def test_a_move_goes_so_far_towards_the_policy(share, expected):
    weight = torch.nn.Parameter(torch.ones(3))
    teacher = Reference({"w": weight}, moving=True, on_host=False)
    weight.data.fill_(2.0)
    teacher.move(share)  # 0.99: curiosft.md, section 7
    torch.testing.assert_close(teacher.weights["w"], torch.full((3,), expected))
    assert weight.tolist() == [2.0] * 3 and not teacher.weights["w"].requires_grad


def test_small_steps_of_a_bfloat16_model_are_not_lost():
    """0.001 of the way to 2 from 1, 500 times: a teacher kept in bfloat16 (8 bits) would never leave 1."""
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    teacher = Reference({"w": weight}, moving=True, on_host=False)
    weight.data.fill_(2.0)
    for _ in range(500):
        teacher.move(0.001)
    torch.testing.assert_close(teacher.weights["w"], torch.full((3,), 2 - 0.999**500), rtol=1e-4, atol=0)
    with teacher.in_place():
        assert weight.dtype == torch.bfloat16 and float(weight.data[0]) == pytest.approx(1.3936, abs=0.01)
    assert float(weight.data[0]) == 2.0
    stuck = torch.ones(3, dtype=torch.bfloat16)
    assert torch.equal(stuck.lerp(weight.data, 0.001), stuck), "which is why it is kept in fp32"


def test_the_policy_comes_back_after_an_error():
    weight = torch.nn.Parameter(torch.ones(3))
    teacher = Reference({"w": weight}, moving=False, on_host=False)
    weight.data.fill_(2.0)
    with pytest.raises(RuntimeError), teacher.in_place():
        raise RuntimeError("a pass that failed")
    assert float(weight.data[0]) == 2.0
