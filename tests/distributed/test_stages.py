"""Memory of a stage: free before the next stage's model is built.

Runs of three stages on two CPU ranks with the distributed optimizer, started as a user starts them. Proves that no
parameter of a stage is left when the next is built, that its process groups are gone with their threads, and that the
resident memory after a stage is what it was before it, within 5 %.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import make_arithmetic
import pytest

pytestmark = pytest.mark.actor

CONFIG = """
output = "{folder}/run"
model.path = "{folder}/model"
data.train = ["{folder}/train.jsonl"]
data.max_prompt_tokens = 16
rollout.max_response_tokens = 24
batch.prompts = 4
steps = 1
method = {{ name = "stage_probe:ProbeConfig", lines = "{folder}/lines" }}
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_of_a_stage_is_free_before_the_next(tmp_path, monkeypatch, dtype):
    make_inputs(tmp_path, monkeypatch)
    (tmp_path / "run.toml").write_text(CONFIG.format(folder=tmp_path, dtype=dtype))
    command = [sys.executable, "-m", "megatron_entropy", "train", str(tmp_path / "run.toml")]
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    logged = re.findall(r"stage \w+: ([\d.]+) GB in use before it, ([\d.]+) GB after it", ended.stdout + ended.stderr)
    assert len(logged) == 3
    for before, after in logged:
        assert float(after) < 1.05 * float(before), logged
    for rank in range(2):
        lines = [json.loads(line) for line in (tmp_path / f"lines.{rank}").read_text().splitlines()]
        assert [line["parameters"] for line in lines] == [0, 0, 0], "a parameter of an earlier stage lives"
        assert len({line["threads"] for line in lines}) == 1, "the groups of an earlier stage live"
        assert max(line["resident"] for line in lines[1:]) < 1.05 * lines[0]["resident"], lines
