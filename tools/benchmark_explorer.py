"""Time the explorer on a made-up run of 100,000 responses: its first page, a search, and one file that holds them all.

python tools/benchmark_explorer.py --tokens 400
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil

from megatron_entropy.config.schema import LogConfig
from megatron_entropy.monitor.metrics import MetricsWriter
from megatron_entropy.monitor.rollout_dumps import dump_rollouts
from megatron_entropy.monitor.run_folder import RunFolder
from megatron_entropy.records import Grade, Group, Prompt, Sample

CONFIG = """[[stages]]
name = "rl"
steps = 400
rollout.max_response_tokens = 64
[stages.method]
name = "cure"
correct_reward = 1.0
wrong_reward = -1.0
overlong_buffer = 16
overlong_factor = 1.0
"""


def make_group(index: int, num_tokens: int, *, initial: int = 2, branches: int = 3) -> Group:
    """Return a group as CURE makes it: each initial response is cut in its middle and continued."""
    rng = np.random.default_rng(index)
    question = tuple(range(4))
    cut = num_tokens // 2

    def sample(head: np.ndarray, parent: int | None) -> Sample:
        tokens = np.concatenate([head, rng.integers(0, 900, num_tokens - len(head) + len(question))]).astype(np.int32)
        entropy = rng.gamma(0.5, 0.8, len(tokens)).astype(np.float32)
        answer, correct = str(rng.integers(3)), bool(rng.random() < 0.5)
        prompt_length = len(head)
        noise = rng.normal(0, 1e-3, len(tokens)).astype(np.float32)
        one = Sample(tokens, prompt_length, "stop", " ".join(f"w{t}" for t in tokens[prompt_length:]), parent=parent)
        values = {
            "grade": Grade(correct, answer),
            "reward": 1.0 if correct else -1.0,
            "logprob": -entropy,
            "rollout_logprob": noise - entropy,
            "entropy": entropy,
            "advantage": one.constant(0.7 if correct else -0.7),
            "weight": one.constant(0.01),
        }
        return Sample(**{**one.__dict__, **values})

    first = [sample(np.array(question, np.int32), None) for _ in range(initial)]
    rest = [sample(one.tokens[: 4 + cut], number) for number, one in enumerate(first) for _ in range(branches)]
    return Group(Prompt(index, f"Question {index}?", question, answer="1"), tuple(first + rest))


def make_run(root: Path, *, steps: int, groups: int, num_tokens: int = 12) -> RunFolder:
    """Write a run folder with `steps` dumps of 8 times `groups` responses."""
    folder = RunFolder(root)
    root.mkdir(parents=True, exist_ok=True)
    folder.config.write_text(CONFIG)
    with MetricsWriter(folder, "rl", LogConfig(tensorboard=False)) as writer:
        for step in range(steps + 1):
            writer.write(step, {"eval/accuracy": step / (steps + 9), "policy/entropy": 2.0 / (1 + step)}, {"step": 0.5})
    made = [make_group(index, num_tokens) for index in range(groups)]
    dump_rollouts(folder.rollouts("rl", 1), made, lambda token: f"Ġw{token}")
    content = folder.rollouts("rl", 1).read_bytes()
    for step in range(2, steps + 1):
        folder.rollouts("rl", step).write_bytes(content)
    return folder


def timed(name: str, request: Callable[[], Sequence[bytes]]) -> None:
    """Print the seconds and bytes of some requests."""
    start = time.perf_counter()
    answers = request()
    print(f"{name:50} {time.perf_counter() - start:7.3f} s {sum(map(len, answers)) / 1e3:10.0f} kB")


def main() -> None:
    """Make the run, start the server, and time it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=400, help="of a response; default: %(default)s")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_run(Path(scratch) / "run", steps=400, groups=32, num_tokens=args.tokens)
        whole = folder.evaluation("rl", 400)
        whole.parent.mkdir(parents=True)
        content = folder.rollouts("rl", 1).read_bytes()
        with whole.open("wb") as file:
            for _ in range(400):
                file.write(content)
        megabytes = len(content) / 1e6
        print(f"400 dumps of 256 responses, {megabytes:.1f} MB each; one of 102,400, {400 * megabytes:.0f} MB")
        command = [sys.executable, "-m", "megatron_entropy", "view", str(folder.root), "--port", "0"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            address = re.findall(r"http://[\d.:]+", server.stdout.readline())[0]
            measure(address)
            print(f"resident memory of the server {psutil.Process(server.pid).memory_info().rss / 2**20:.0f} MiB")
        finally:
            server.terminate()
            server.wait()


def measure(address: str) -> None:
    """Time the requests of the page."""

    def get(path: str, **parameters: object) -> bytes:
        with urllib.request.urlopen(f"{address}/{path}?{urllib.parse.urlencode({'run': 0, **parameters})}") as answer:
            return answer.read()

    train = {"kind": "train", "stage": "rl", "step": 400, "count": 40}
    every = {"kind": "eval", "stage": "rl", "step": 400, "count": 40}

    def first_page() -> list[bytes]:
        return [get(""), get("api/runs"), get("api/metrics"), get("api/dumps"), get("api/rows", **train)]

    def search() -> list[bytes]:
        answers, start = [], 0
        while start is not None:
            answers.append(get("api/rows", **every, start=start, verdict="error"))
            start = json.loads(answers[-1])["next"]
        return answers

    timed("first page: runs, metrics, dumps, 40 responses", first_page)
    timed("one response", lambda: [get("api/sample", **train, line=17)])
    timed("page 1 of the dump of 102,400", lambda: [get("api/rows", **every)])
    timed("a search through all 102,400 without a hit", search)
    timed("the same again, now indexed", search)


if __name__ == "__main__":
    main()
