"""A checkpoint written under one layout continues under any other as if nothing had happened.

Two updates, a save, two more updates: the losses and gradient norms of the last two must come out the same when they
are computed after a load, by another layout, with or without the distributed optimizer. Tolerance 1e-5: other layouts
sum in another order (about 1e-7 relative in fp32). Runs the real Megatron model on CPU ranks.
"""

from pathlib import Path

import check_layouts
import numpy as np
import pytest

from megatron_entropy import parallel
from megatron_entropy.architecture import read_shape
from megatron_entropy.config import ActorConfig, OptimizerConfig, ParallelConfig

pytestmark = pytest.mark.actor

TP2 = ParallelConfig(tp=2)
PP2 = ParallelConfig(pp=2)
PP2_VPP2 = ParallelConfig(pp=2, vpp=2)
DP2_SHARDED = ParallelConfig(dp=2, distributed_optimizer=True)


def updates(folder: str, checkpoints: str, layout: ParallelConfig, saves: bool) -> list[tuple[float, float, float]]:
    """Loss, gradient norm and learning rate of updates 3 and 4; saves after 2, or starts from what was saved."""
    from megatron_entropy import checkpoint
    from megatron_entropy.actor.actor import Actor
    from megatron_entropy.resharding.folder import TensorFolder
    from megatron_entropy.resharding.source import load

    parallel.lay_out(layout, seed=1)
    shape = read_shape(folder)
    optimizer = OptimizerConfig(lr=1e-3, eps=1e-3, warmup_steps=4, weight_decay=0.1)
    config = ActorConfig(parallel=layout, optimizer=optimizer, dtype="float32", token_budget=192)
    actor = Actor(shape, config, total_updates=10)
    samples = check_layouts.make_samples(shape.vocab_size)

    def update() -> tuple[float, float, float]:
        metrics = actor.update(samples, lambda s, b: (-b.advantage * s.logprob - 0.01 * s.entropy, {}), temperature=1.0)
        return tuple(metrics[f"train/{name}"].value for name in ("loss", "grad_norm", "lr"))

    if saves:
        load(TensorFolder(folder), shape, actor.named_shards())
        actor.after_load()
        update()
        update()
        checkpoint.save(Path(checkpoints), actor, checkpoint.Progress(2, 2, 7, "settings"), keep=2)
    else:
        path, progress = checkpoint.newest(Path(checkpoints))
        assert progress == checkpoint.Progress(2, 2, 7, "settings")
        checkpoint.load(path, actor, progress)
    return [update(), update()]


@pytest.mark.parametrize("source", [TP2, DP2_SHARDED], ids=["from TP2", "from sharded DP2"])
def test_training_goes_on_under_another_layout(tmp_path, source):
    folder = str(tmp_path / "model")
    check_layouts.make_checkpoint(Path(folder))
    checkpoints = str(tmp_path / "checkpoints")
    expected = parallel.run_on_ranks(updates, 2, folder, checkpoints, source, True)[0]
    assert expected[1][0] < expected[0][0] and expected[1][2] > expected[0][2] > 0, "it does learn, and warm up"
    for target in (source, TP2, PP2, PP2_VPP2, DP2_SHARDED):
        found = parallel.run_on_ranks(updates, 2, folder, checkpoints, target, False)[0]
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=str(target))
        if target is source:
            assert found == expected, "under the layout that saved, to the bit"


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, caplog):
    from megatron_entropy import checkpoint

    for step in (2, 4, 6):
        folder = tmp_path / f"step_{step:06d}"
        (folder / "shards").mkdir(parents=True)
        (folder / "shards" / "data").write_bytes(b"x" * 10)
        (folder / "state.json").write_text(
            f'{{"step": {step}, "updates": 0, "position": 0, "fingerprint": "", "files": {{"shards/data": 10}}}}'
        )
    (tmp_path / "step_000004" / "shards" / "data").write_bytes(b"short")
    (tmp_path / "step_000006" / "state.json").unlink()
    (tmp_path / "step_000008.partial").mkdir()
    path, progress = checkpoint.newest(tmp_path)
    assert path.name == "step_000002" and progress.step == 2
    assert "step_000004" in caplog.text and "5 bytes instead of 10" in caplog.text and "step_000006" in caplog.text
