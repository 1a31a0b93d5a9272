"""Memory of a stage: free before the next stage's model is built.

Stages of the real trainer on two CPU ranks with the distributed optimizer. Proves that no parameter of a stage is left
when the next is built, that its process groups are gone with their threads, and that the memory of the process after a
stage is what it was before it, within 5 %. Pages of library code are not counted: they become resident as it is called.
"""

import os
import sys
from pathlib import Path

import make_arithmetic
import pytest
from local_ranks import run_on_ranks

from megatron_entropy.launch import prepare

pytestmark = pytest.mark.actor

CONFIG = """
output = "{folder}/run"
model.path = "{folder}/model"
data.train = ["{folder}/train.jsonl"]
data.max_prompt_tokens = 16
rollout.max_response_tokens = 24
batch.prompts = 4
steps = 1
method.name = "sft"
[actor]
dtype = "{dtype}"
max_tokens_per_microbatch = 64
parallel = {{ dp = 2, distributed_optimizer = true }}
[[stages]]
name = "first"
[[stages]]
name = "second"
[[stages]]
name = "third"
"""


def make_inputs(folder: Path, monkeypatch) -> None:
    """Arithmetic with a model of 14 million parameters, which takes 150 to 250 MB a rank while it trains."""
    for name, value in {"HIDDEN": 512, "FEED_FORWARD": 1536, "HEAD_DIM": 128}.items():
        monkeypatch.setattr(make_arithmetic, name, value)
    monkeypatch.setattr(sys, "argv", ["make_arithmetic", "--out", str(folder), "--train", "16", "--eval", "1"])
    make_arithmetic.main()


def train_stages(configs: list) -> tuple[list[float], list[tuple[int, int]]]:
    """Memory (GB) before and after each stage; living parameters and gloo's threads before each and at the end."""
    import gc

    import torch

    from megatron_entropy.distributed import memory
    from megatron_entropy.trainer import loop

    os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "32"  # as the launcher does; the default fills over many stages
    used: list[float] = []
    left: list[tuple[int, int]] = []

    def look() -> None:
        living = [item for item in gc.get_objects() if isinstance(item, torch.nn.Parameter)]
        names = [Path(f"/proc/self/task/{task}/comm").read_text() for task in os.listdir("/proc/self/task")]
        left.append((len(living), sum("gloo" in name for name in names)))

    build, used_memory = loop.build, memory.used_memory

    def look_and_build(*args):
        look()
        return build(*args)

    def note_used_memory() -> float:
        used.append(used_memory())
        return used[-1]

    loop.build, memory.used_memory = look_and_build, note_used_memory
    loop.train(configs, resume=False)
    look()
    return used, left


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_of_a_stage_is_free_before_the_next(tmp_path, monkeypatch, dtype):
    make_inputs(tmp_path, monkeypatch)
    config = tmp_path / "run.toml"
    config.write_text(CONFIG.format(folder=tmp_path, dtype=dtype))
    spec = prepare.resolve([str(config)], [])
    prepare.prepare_run_folder(spec, resume=False, overwrite=False)
    for used, left in run_on_ranks(train_stages, 2, spec.configs):
        living, threads = zip(*left, strict=True)
        assert living == (0, 0, 0, 0), "a parameter of an earlier stage lives"
        assert threads[1] == threads[2] == threads[3] > threads[0], "the groups of the last stage live, no others"
        assert len(used) == 6
        for before, after in zip(used[::2], used[1::2], strict=True):
            assert after < 1.05 * before, used
