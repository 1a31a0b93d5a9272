"""A small training run on the nodes of a `Bed`, and its results."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bed import ROOT, Bed, Node

PORT = 29400
CONFIG = """
output = "{output}"
seed = 3
name = "rl"
steps = {steps}
[model]
path = "{inputs}/model"
[data]
train = ["{inputs}/train.jsonl"]
max_prompt_tokens = 16
[reward]
verifier = "final_marker"
workers = 1
[rollout]
num_engines = {engines}
temperature = 0.8
max_response_tokens = 24
verify_weights = true
[actor]
max_tokens_per_microbatch = 256
parallel.{layout} = 2
optimizer.lr = 1e-3
[checkpoint]
every = 2
[log]
tensorboard = false
rollouts_every = 0
[batch]
prompts = 4
samples = 4
updates = 2
[method]
{method}
"""
SFT = {"batch.samples": "1", "rollout.max_response_tokens": "64"}
"""Overrides that make it a run without engines, which starts much faster."""
METHODS = {False: 'name = "grpo"\nentropy_coefficient = 0.01', True: 'name = "sft"'}


def make_inputs(folder: Path) -> Path:
    """Write the data and the model of `examples/make_arithmetic.py`."""
    script = ROOT / "examples" / "make_arithmetic.py"
    subprocess.run([sys.executable, script, "--out", folder, "--seed", "1"], check=True, stdout=subprocess.DEVNULL)
    return folder


class Job:
    """One run on several nodes: the same command on each.

    Args:
        name: of its folder below the bed's.
        layout: `dp`, `tp` or `pp`, of size 2.
        overrides: configuration keys and values.
    """

    def __init__(
        self,
        bed: Bed,
        inputs: Path,
        name: str,
        *,
        layout: str = "dp",
        steps: int = 2,
        engines: int = 2,
        overrides: Mapping[str, str] | None = None,
    ) -> None:
        self.bed = bed
        self.folder = bed.folder / name
        self.folder.mkdir()
        self.output = self.folder / "run"
        self.config = self.folder / "run.toml"
        method = METHODS[SFT.items() <= (overrides or {}).items()]
        self.config.write_text(
            CONFIG.format(output=self.output, inputs=inputs, layout=layout, steps=steps, engines=engines, method=method)
        )
        self.overrides = [f"--{key}={value}" for key, value in (overrides or {}).items()]
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.ray: dict[str, subprocess.Popen[str]] = {}

    def log(self, node: Node) -> str:
        """Return what the run has printed on a node."""
        file = self.folder / f"{node.name}.log"
        return file.read_text() if file.exists() else ""

    def train(
        self,
        nodes: Sequence[Node],
        *arguments: str,
        endpoint: str = "",
        torchrun: bool = False,
        number: int = 0,
        python_path: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start the run on these nodes; Ray's cluster, if there is one, is joined.

        Args:
            endpoint: host of the first node, where it is not its address.
            torchrun: start it by plain torchrun.
            number: of nodes, where the others are started apart.
            python_path: folder of modules that the run's processes find first.
        """
        for node in nodes:
            options = [f"--nnodes={number or len(nodes)}", f"--rdzv-id={self.folder.name}"]
            options += [f"--rdzv-endpoint={endpoint or nodes[0].address}:{PORT}"]
            command = ["megatron-entropy", "train", str(self.config), *options, *self.overrides, *arguments]
            if torchrun:
                is_host = str(node is nodes[0]).lower()
                command = ["torchrun", "--nproc-per-node=1", "--rdzv-backend=c10d", *options]
                command += [f"--rdzv-conf=is_host={is_host}", f"--local-addr={node.address}"]
                command += ["-m", "megatron_entropy", "train", str(self.config), *self.overrides, *arguments]
            joined = {} if python_path is None else {"PYTHONPATH": f"{python_path}:{ROOT}:{ROOT / 'kernels'}"}
            joined |= {"RAY_ADDRESS": f"{nodes[0].address}:6379"} if self.ray else {}
            self.processes[node.name] = node.start(
                command, log=self.folder / f"{node.name}.log", environment=joined | dict(environment or {})
            )

    def train_alone(self, node: Node, *arguments: str) -> None:
        """Start the run with all its ranks on one node."""
        command = ["megatron-entropy", "train", self.config, *self.overrides, *arguments]
        self.processes[node.name] = node.start(command, log=self.folder / f"{node.name}.log")

    def start_ray(self, nodes: Sequence[Node], environment: Mapping[str, str] | None = None) -> None:
        """Start a Ray cluster with room for one engine on each node."""
        for node in nodes:
            place = (
                ["--head", "--port=6379", "--include-dashboard=false"]
                if node is nodes[0]
                else [f"--address={nodes[0].address}:6379"]
            )
            command = ["ray", "start", *place, f"--node-ip-address={node.address}", "--num-cpus=1", "--block"]
            command += ["--disable-usage-stats", "--object-store-memory=100000000"]
            log = self.folder / f"ray.{node.name}.log"
            process = self.ray[node.name] = node.start(command, log=log, environment=environment)

            def is_started(process: subprocess.Popen[str] = process, log: Path = log) -> bool:
                assert process.poll() is None, log.read_text()
                return "Ray runtime started" in log.read_text()

            wait_for(is_started, 180, f"Ray on {node.name}")

    def wait(self, timeout: float = 300.0) -> dict[str, int]:
        """Wait for the end of the run; returns the exit code of each node, and prints them with the seconds."""
        begin = time.monotonic()
        deadline = begin + timeout
        for name, process in self.processes.items():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"{name} still runs after {timeout:.0f} s:\n{self.all_logs()}") from None
        codes = {name: process.returncode for name, process in self.processes.items()}
        print(f"{self.folder.name}: {codes} after {time.monotonic() - begin:.1f} s")
        return codes

    def wait_for(self, node: Node, pattern: str, timeout: float = 180.0) -> None:
        """Wait until the log of a node has a line that matches."""
        process = self.processes[node.name]

        def found() -> bool:
            if re.search(pattern, self.log(node)):
                return True
            assert process.poll() is None, f"{node.name} has ended:\n{self.all_logs()}"
            return False

        wait_for(found, timeout, f"{pattern!r} on {node.name}", self.all_logs)

    def all_logs(self) -> str:
        """Return the end of every log, for the message of a failed test."""
        return "\n".join(f"--- {node.name}\n{self.log(node)[-3000:]}" for node in self.bed.nodes)

    def stop_ray(self) -> None:
        """End Ray's processes."""
        for process in self.ray.values():
            Node.signal(process, signal.SIGTERM)
            process.wait(60)
        self.ray.clear()

    def metrics(self) -> list[dict[str, Any]]:
        """Return the rows of `metrics.jsonl` without times and memory."""
        rows = [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in row.items() if not key.startswith(("timing/", "perf/"))} for row in rows]


def wait_for(condition: Any, timeout: float, what: str, details: Any = lambda: "", *, interval: float = 0.05) -> None:
    """Wait until the condition holds; an assertion after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout:.0f} s for {what}\n{details()}"
        time.sleep(interval)
