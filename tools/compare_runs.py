"""Runs of the comparison (see compare.py): what is compared, how a run is made, and the curve it leaves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_entropy.config import load
from megatron_entropy.config.schema import Config
from megatron_entropy.monitor.metrics import read_metrics
from megatron_entropy.monitor.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ROOT / "examples" / "compare" / "compare.toml"
STOPPED = 128 + signal.SIGTERM
STOP = threading.Event()
"""Set by Ctrl-C or `kill`: all runs end."""
POLL_SECONDS = 0.5
"""Time between two looks at a run's metrics."""


@dataclass(frozen=True)
class Variant:
    """What is compared: stages of the settings file, and the variant they start from (None: random weights)."""

    name: str
    label: str
    stages: tuple[str, ...]
    start: str | None
    color: str
    marker: str


VARIANTS = (
    Variant("sft", "SFT", ("sft",), None, "#000000", "o"),
    Variant("curiosft", "CurioSFT", ("curiosft",), None, "#D55E00", "s"),
    Variant("grpo", "GRPO", ("grpo",), "sft", "#000000", "o"),
    Variant("dapo", "DAPO", ("dapo",), "sft", "#0072B2", "s"),
    Variant("cure", "CURE stage 1", ("cure",), "sft", "#D55E00", "^"),
    Variant("sent", "SENT", ("sent_certain", "sent_uncertain"), "sft", "#009E73", "D"),
    Variant("cer", "CER", ("cer",), "sft", "#CC79A7", "v"),
    Variant("kl_cov", "KL-Cov", ("kl_cov",), "sft", "#E69F00", "P"),
    Variant("grpo_after_curiosft", "GRPO after CurioSFT", ("grpo",), "curiosft", "#D55E00", "s"),
)
"""In the order of the page, with the colours of Okabe and Ito, which colour-blind readers can tell apart."""


@dataclass(frozen=True)
class Point:
    """One evaluation: `spent` is generated tokens, or steps of SFT; `passes` is pass@k by k."""

    spent: float
    accuracy: float
    entropy: float
    length: float
    passes: dict[str, float]


@dataclass(frozen=True)
class Curve:
    """The evaluations of one run, its wall-clock `seconds`, its `steps`, its generated `tokens`."""

    points: list[Point]
    seconds: float
    steps: int
    tokens: int

    @classmethod
    def of_run(cls, folder: Path) -> Curve:
        """Read a complete run."""
        rows = read_metrics(RunFolder(folder).metrics)
        tokens, points = 0, []
        for row in rows:
            tokens += round(row.get("rollout/tokens") or 0)
            if row.get("eval/accuracy") is not None:
                passes = {name.rpartition("_")[2]: row[name] for name in row if name.startswith("eval/pass_at_")}
                spent = tokens or row["step"]
                points.append(Point(spent, row["eval/accuracy"], row["eval/entropy"], row["eval/length"], passes))
        return cls(
            points,
            json.loads((folder / "completed.json").read_text())["seconds"],
            sum(row["step"] > 0 for row in rows),
            tokens,
        )

    def at(self, spent: float, quantity: Callable[[Point], float]) -> float:
        """Return a quantity at a budget, linear between two evaluations."""
        return float(np.interp(spent, [point.spent for point in self.points], [quantity(p) for p in self.points]))


QUANTITIES: dict[str, Callable[[Point], float]] = {
    "accuracy": lambda point: point.accuracy,
    "entropy": lambda point: point.entropy,
    "length": lambda point: point.length,
    "pass@8": lambda point: point.passes["8"],
}


class RunFailedError(Exception):
    """A run ended with an error; the message holds its last lines."""


@dataclass(frozen=True)
class Run:
    """One run of the comparison: a variant with a seed, its stages, and the number of tokens it may generate."""

    variant: Variant
    seed: int
    out: Path
    stages: tuple[Config, ...]
    budget: int

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.out / f"seed{self.seed}" / self.variant.name

    @property
    def file(self) -> Path:
        """The settings of its last start."""
        return self.folder.with_suffix(".toml")

    @property
    def completed(self) -> Path:
        """A file that is written when the run is complete."""
        return self.folder / "completed.json"

    @property
    def inputs(self) -> Path:
        """The folder of the seed's data and random model."""
        return self.out / f"seed{self.seed}" / "inputs"

    @property
    def configs(self) -> list[Config]:
        """The settings of its stages, with this seed's files."""
        seed_folder = self.out / f"seed{self.seed}"
        start = seed_folder / self.variant.start / "hf" if self.variant.start else self.inputs / "model"
        configs = []
        for config in self.stages:
            files = {
                key: [str(self.inputs / Path(name).name) for name in getattr(config.data, key)]
                for key in ("train", "eval")
            }
            changes = {
                "seed": self.seed,
                "output": str(self.folder),
                "model": config.model.model_copy(update={"path": str(start)}),
                "data": config.data.model_copy(update=files),
            }
            configs.append(config.model_copy(update=changes))
        return configs

    @property
    def is_complete(self) -> bool:
        """Whether it ran to its end with these settings."""
        if not self.completed.exists() or self.file.read_text() != load.to_toml(self.configs):
            return False
        return not self.variant.start or json.loads(self.completed.read_text())["budget"] >= self.budget

    def done(self, step: int, tokens: float) -> float:
        """Return the fraction that is done: of the token budget, or of the steps of SFT."""
        return tokens / self.budget if self.variant.start else step / self.stages[-1].steps


def run_all(runs: Sequence[Run], jobs: int) -> list[str]:
    """Make the runs that are not complete, `jobs` at a time; return the errors of those that failed.

    Args:
        runs: a run comes after the one it starts from.
        jobs: runs at a time.
    """
    failures: list[str] = []
    futures: dict[tuple[str, int], Future] = {}
    columns = (
        TextColumn("{task.description:32}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar, ThreadPoolExecutor(jobs) as threads:
        total = bar.add_task("all runs", total=len(runs))
        inputs = threading.Lock()

        def work(run: Run) -> None:
            task = bar.add_task(f"seed {run.seed}: {run.variant.label}", total=1.0)
            try:
                if run.variant.start and (start := futures.get((run.variant.start, run.seed))):
                    start.result()
                if not run.is_complete:
                    with inputs:
                        make_inputs(run)
                    train(run, lambda fraction: bar.update(task, completed=fraction))
            except Exception as error:
                failures.append(str(error))
                raise
            finally:
                bar.remove_task(task)
                bar.advance(total)

        for run in runs:
            futures[run.variant.name, run.seed] = threads.submit(work, run)
        try:
            wait(futures.values())
        except KeyboardInterrupt:
            STOP.set()
            threads.shutdown(cancel_futures=True)
            raise
    return failures


def make_inputs(run: Run) -> None:
    """Make the data and the random model of the run's seed, and semantic entropies where the run needs them.

    Raises:
        RunFailedError: a command failed.
    """
    if not (run.inputs / "model" / "model.safetensors").exists():
        call(ROOT / "examples" / "make_compare.py", "--out", run.inputs, "--seed", run.seed)
    config = run.configs[0]
    with_entropies = run.inputs / "rl-se.jsonl"
    if str(with_entropies) in config.data.train and not with_entropies.exists():
        call(
            "-m", "megatron_entropy", "semantic-entropy", config.model.path, run.inputs / "rl.jsonl",
            "--out", with_entropies, "--verifier", config.reward.verifier,
            "--max-tokens", config.rollout.max_response_tokens, "--max-prompt-tokens", config.data.max_prompt_tokens,
            "--seed", run.seed, "--samples", 8,
        )  # fmt: skip


def call(*arguments: object) -> None:
    """Run Python with these arguments.

    Raises:
        RunFailedError: it ended with an error.
    """
    process = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True)
    if process.returncode:
        command = " ".join(map(str, arguments[:3]))
        tail = "\n".join(process.stderr.splitlines()[-5:])
        raise RunFailedError(f"{command}: exit code {process.returncode}\n{tail}")


def train(run: Run, report_progress: Callable[[float], None]) -> None:
    """Train one run. RL ends at the first evaluation after the budget is spent.

    Args:
        report_progress: receives the fraction that is done.
    Raises:
        RunFailedError: the run ended with an error, or its steps generate fewer tokens than the budget.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    run.completed.unlink(missing_ok=True)
    load.write(run.configs, run.file)
    log = run.folder.with_suffix(".log")
    command = [sys.executable, "-W", "ignore", "-m", "megatron_entropy", "train", str(run.file), "--overwrite"]
    begin = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            is_spent = watch(process, run, report_progress)
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
    if code != (STOPPED if is_spent else 0):
        tail = "\n".join(log.read_text().splitlines()[-5:])
        raise RunFailedError(f"{run.folder}: exit code {code}\n{tail}")
    if run.variant.start and not is_spent:
        raise RunFailedError(
            f"{run.folder}: {run.stages[-1].steps} steps generate too few tokens; raise `steps` in {SETTINGS}"
        )
    completed = {"seconds": time.perf_counter() - begin, "budget": run.budget}
    run.completed.write_text(json.dumps(completed) + "\n")


def watch(process: subprocess.Popen, run: Run, report_progress: Callable[[float], None]) -> bool:
    """Follow a run to its end and stop it when the budget is spent; return whether it was spent."""
    metrics = RunFolder(run.folder).metrics
    while process.poll() is None:
        if STOP.wait(POLL_SECONDS):
            process.terminate()
            break
        rows = read_metrics(metrics)
        if not rows:
            continue
        tokens = sum(row.get("rollout/tokens") or 0 for row in rows)
        report_progress(run.done(rows[-1]["step"], tokens))
        if run.variant.start and tokens >= run.budget and rows[-1].get("eval/accuracy") is not None:
            process.terminate()
            return True
    return False
