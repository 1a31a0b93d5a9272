"""A training run that kill_test.py disturbs, and the processes it consists of. Needs Linux.

`python kill_run.py train CONFIG` is `megatron-entropy train`, except that rank 0 writes the phase of its step into the
file `$KILL_TEST_PHASE`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("trainer rank", "rank 0", "engine", "verifier worker", "Ray head", "launcher", "checkpoint")
"""What is killed; `checkpoint`: rank 0, and the newest checkpoint is damaged before the run is resumed."""
PHASES = ("generate", "update", "weight_sync", "save", "any")
RAY_HELPERS = ("DashboardAgent", "RuntimeEnvAgent", "dashboard/agent.py", "runtime_env/agent/", "default_worker.py")
"""Ray's agents and idle workers. Those of a killed node end without help, but only after a minute."""
LINGER_SECONDS = 20.0
"""Time that the processes of a run may outlive it."""

CONFIG = """
output = "{folder}/run"
seed = 3
name = "rl"
steps = {steps}
[model]
path = "{inputs}/model"
[data]
train = ["{inputs}/train.jsonl"]
max_prompt_tokens = 16
[reward]
verifier = "kill_run:verify"
workers = 1
[rollout]
temperature = 0.8
max_response_tokens = 24
max_restarts = 1000
[actor]
max_tokens_per_microbatch = 256
parallel.tp = 2
optimizer.lr = 1e-3
[checkpoint]
every = 1
[log]
tensorboard = false
rollouts_every = 0
[batch]
prompts = 4
samples = 4
updates = 2
[method]
name = "grpo"
entropy_coefficient = 0.01
"""


# ---- inside the run ----


def verify(response: str, answer: str) -> bool:
    """Grade a response: a verifier from outside the package, so it runs in worker processes."""
    from megatron_entropy.rewards.strings import final_marker

    return final_marker(response, answer).correct is True


def train(arguments: list[str]) -> int:
    """Run `megatron-entropy` with ranks that are this module, and report the phase on rank 0."""
    from megatron_entropy.cli import main as cli
    from megatron_entropy.launch import torchrun

    torchrun.RANK_MODULE = "kill_run"
    if os.environ.get("RANK") == "0":
        report_phases(Path(os.environ["KILL_TEST_PHASE"]))
    return cli.main(arguments)


def report_phases(path: Path) -> None:
    """Make the step timer of this process write its phase into a file: `start` before the first `generate`."""
    from megatron_entropy.monitor.timer import Phase, StepTimer

    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    call, phases = StepTimer.__call__, ["start"]

    def write() -> None:
        os.pwrite(file, f"{'start' if phases[0] == 'start' else phases[-1]:16}".encode(), 0)

    @contextlib.contextmanager
    def observed(self: StepTimer, phase: Phase) -> Iterator[None]:
        phases.append(phase)
        if phase == "generate":
            phases[0] = "other"
        write()
        with call(self, phase):
            yield
        phases.pop()
        write()

    write()
    StepTimer.__call__ = observed


# ---- outside ----


class Run:
    """A training run in a folder of its own, and the processes of its current start."""

    def __init__(self, folder: Path, inputs: Path, steps: int, timeout: float) -> None:
        self.folder = folder
        self.timeout = timeout
        folder.mkdir()
        (folder / "config.toml").write_text(CONFIG.format(folder=folder, inputs=inputs, steps=steps))
        self.steps = steps
        self._phase = folder / "phase"
        self._log = folder / "log"
        self.starts = 0
        self.left_behind: list[str] = []

    def start(self) -> None:
        """Start the run, or resume it if it was started before."""
        self._phase.unlink(missing_ok=True)
        paths = [ROOT, ROOT / "kernels", ROOT / "tools"]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "KILL_TEST_PHASE": str(self._phase),
            "RAY_TMPDIR": str(self.folder.parent),
        }
        flags = ["--resume"] if self.starts else []
        self.starts += 1
        self._started, self._started_at = time.monotonic(), time.time()
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "train", str(self.folder / "config.toml"), *flags],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def seconds(self) -> float:
        """Time since the current start."""
        return time.monotonic() - self._started

    @property
    def step(self) -> int:
        """Number of steps in the metrics."""
        with contextlib.suppress(OSError):
            return (self.folder / "run" / "metrics.jsonl").read_bytes().count(b'"train/loss"')
        return 0

    def phases(self) -> tuple[str, ...]:
        """Return the phase of rank 0, with `save` before it while a checkpoint is written in the background."""
        try:
            phase = self._phase.read_text().strip() or "start"
        except OSError:
            return ("start",)
        try:
            saves = os.scandir(self.folder / "run" / "checkpoints" / "rl")
            is_writing = any(e.name.endswith(".partial") and e.stat().st_mtime > self._started_at for e in saves)
        except OSError:
            is_writing = False
        return ("save", phase) if is_writing else (phase,)

    def last_line(self) -> str:
        """Return the last line of the log."""
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def log_tail(self) -> str:
        """Return the last 40 lines of the log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-40:])

    def end(self) -> int | None:
        """Wait for the end and kill what is left of the run; return the exit code, or None where it hung."""
        try:
            code = self.process.wait(max(0.0, self.timeout - self.seconds))
        except subprocess.TimeoutExpired:
            code = None
        self.ended = time.monotonic()
        deadline = time.monotonic() + (LINGER_SECONDS if code is not None else 0.0)
        while (rest := [process for process in living() if not is_ray_helper(process)]) and time.monotonic() < deadline:
            time.sleep(0.1)
        if code is not None:
            self.left_behind += [describe(process) for process in rest]
        kill_all()
        return code

    def damage_newest_checkpoint(self, fraction: float) -> str:
        """Truncate a file of the newest checkpoint or flip a bit of it, if there is an older one; return what."""
        steps = sorted((self.folder / "run" / "checkpoints" / "rl").glob("step_??????"))
        if len(steps) < 2:
            return ""
        files = sorted(path for path in steps[-1].rglob("*") if path.is_file())
        file = files[int(fraction * len(files))]
        position = int(fraction * file.stat().st_size)
        what = f"{file.relative_to(steps[-1].parent)}, byte {position}"
        if int(1000 * fraction) % 2:
            os.truncate(file, position)
            return f"{what}: truncated"
        with file.open("r+b") as stream:
            stream.seek(position)
            byte = stream.read(1)[0]
            stream.seek(position)
            stream.write(bytes([byte ^ 1]))
        return f"{what}: a bit flipped"

    def result(self) -> tuple[bytes, list[dict]]:
        """Return the final parameters, and the metrics without wall-clock times."""
        rows = [{key: row[key] for key in row if not key.startswith(("timing/", "perf/"))} for row in self._rows()]
        return (self.folder / "run" / "hf" / "model.safetensors").read_bytes(), rows

    def durations(self) -> dict[str, float]:
        """Return the mean seconds of each phase over all steps but the first, which waits for the engine."""
        rows = self._rows()[2:]
        return {phase: sum(row.get(f"timing/{phase}", 0.0) for row in rows) / len(rows) for phase in PHASES}

    def _rows(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "run" / "metrics.jsonl").read_text().splitlines()]


def find(target: str) -> list[psutil.Process]:
    """Return the processes of a kind among the descendants of this process."""
    target = "rank 0" if target == "checkpoint" else target
    return [process for process in psutil.Process().children(recursive=True) if target_of(process) == target]


def target_of(process: psutil.Process) -> str:
    """Return which of `TARGETS` a process is, or an empty string."""
    try:
        command = " ".join(process.cmdline())
        if "-m kill_run" in command:
            return "rank 0" if process.environ().get("RANK") == "0" else "trainer rank"
        if "kill_run.py train" in command:
            return "launcher"
        if "VllmEngine" in command:
            return "engine"
        if "multiprocessing.spawn" in command:
            return "verifier worker"
        if process.name() in ("gcs_server", "raylet"):
            return "Ray head"
    except psutil.Error:
        pass
    return ""


def is_ray_helper(process: psutil.Process) -> bool:
    """Whether a process is one of `RAY_HELPERS`, or has ended."""
    with contextlib.suppress(psutil.Error):
        return any(name in " ".join(process.cmdline()) for name in RAY_HELPERS)
    return True


def living() -> list[psutil.Process]:
    """Return the living descendants of this process, and reap its dead children."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, ChildProcessError):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
            elif process.ppid() == os.getpid():
                os.waitpid(process.pid, os.WNOHANG)
    return found


def kill_all() -> None:
    """Kill all descendants of this process and wait until they have ended."""
    while rest := living():
        for process in rest:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.05)


def describe(process: psutil.Process) -> str:
    """Return name and beginning of the command line of a process."""
    with contextlib.suppress(psutil.Error):
        return f"{process.name()}: {' '.join(process.cmdline())[:120]}"
    return "?"


if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
