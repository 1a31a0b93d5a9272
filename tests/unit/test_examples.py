"""The examples: the tiny files have the papers' stages, and train the same under TP2 and PP2 on the same rollouts.

That every file is valid is shown by test_example_runs.py. The tiny ones run as a whole with `-m exhaustive`: three
steps of each stage under TP2 with recorded responses, then under PP2 on the recording. Losses agree within 1e-4:
layouts sum in another order, and three steps of Adam at these learning rates amplify the difference.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_plan import model

from megatron_entropy.config import check, load
from megatron_entropy.methods import build_method, load_method_config

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
TINY = sorted(path.stem for path in (EXAMPLES / "tiny").glob("*.toml"))
TOLERANCE = 1e-4


def test_tiny_examples_have_the_stages_of_the_papers():
    assert TINY == sorted(["start", *(path.stem for path in (EXAMPLES / "papers").glob("*.toml"))])
    for name in set(TINY) - {"start"}:
        tiny, paper = (
            load.load(EXAMPLES / kind / f"{name}.toml", [], load_method_config) for kind in ("tiny", "papers")
        )
        assert [s.method.name for s in tiny] == [s.method.name for s in paper]
        for stage in tiny:
            arch = dataclasses.replace(model("qwen3", 4, 160, 480, 4, 2, 32, 17), max_positions=512)
            check.check(stage, arch, world_size=2)
            build_method(stage)


def test_demo_and_its_plain_counterpart_differ_only_in_the_methods():
    files = [EXAMPLES / "quickstart.toml", EXAMPLES / "quickstart_plain.toml"]
    demo, plain = (load.load(chosen, [], load_method_config) for chosen in (files[:1], files))
    assert [[stage.method.name for stage in run] for run in (demo, plain)] == [["curiosft", "cure"], ["sft", "dapo"]]
    for ours, theirs in zip(demo, plain, strict=True):
        build_method(ours), build_method(theirs)
        same = {"output": "", "method": theirs.method, "batch": theirs.batch}
        assert ours.model_copy(update=same) == theirs.model_copy(update={"output": ""})
        assert (ours.batch.prompts, ours.batch.updates) == (theirs.batch.prompts, theirs.batch.updates)


def train(name: str, inputs: Path, run: Path, *flags: str) -> dict[tuple[str, int], float]:
    """Run a tiny example for three steps of each stage; return the losses by stage and step."""
    path = EXAMPLES / "tiny" / f"{name}.toml"
    steps = ["--steps=3"]
    data = json.dumps([str(inputs / "train.jsonl")])
    command = [
        sys.executable, "-m", "megatron_entropy", "train", str(path), f"--output={run}", "--data.eval=[]", *steps,
        f"--model.path={inputs / 'start' / 'hf'}", f"--data.train={data}", "--checkpoint.every=0", *flags,
    ]  # fmt: skip
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(row["stage"], row["step"]): row["train/loss"] for row in rows if row["step"]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Arithmetic data with a column of semantic entropies, and a model trained on a little of it."""
    folder = tmp_path_factory.mktemp("inputs")
    script = [sys.executable, str(EXAMPLES / "make_arithmetic.py"), "--out", str(folder), "--train", "600"]
    subprocess.run(script, check=True, env=ENVIRONMENT)
    file = folder / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**row, "semantic_entropy": row["level"] / 4}) + "\n" for row in rows))
    start = [sys.executable, "-m", "megatron_entropy", "train", str(EXAMPLES / "tiny" / "start.toml")]
    start += [
        f"--output={folder / 'start'}",
        f"--model.path={folder / 'model'}",
        f"--data.train={json.dumps([str(file)])}",
    ]
    subprocess.run([*start, "--data.eval=[]", "--steps=120", "--checkpoint.every=0"], check=True, env=ENVIRONMENT)
    return folder


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in TINY if name != "start"])
def test_a_tiny_example_trains_the_same_under_another_layout(name, inputs, tmp_path):
    recorded = tmp_path / "rollouts"
    tensor = train(name, inputs, tmp_path / "tp2", f"--rollout.record={recorded}", "--actor.parallel.tp=2")
    layers = ["--actor.parallel.tp=1", "--actor.parallel.pp=2", f"--rollout.replay={recorded}"]
    pipeline = train(name, inputs, tmp_path / "pp2", *layers)
    assert tensor.keys() == pipeline.keys() and len(tensor) >= 3
    for step, loss in tensor.items():
        assert pipeline[step] == pytest.approx(loss, abs=TOLERANCE), step
