#!/usr/bin/env python3
"""Random kills of a real training run, which must end as if nobody had touched it.

    python tools/kill_test.py [--kills 50] [--seed 1] [--timeout 240] [--out kill_test.json]

Trains a tiny model by GRPO under TP2 with a vLLM engine and verifier workers, a checkpoint every step: once
undisturbed, then again and again while SIGKILL hits a trainer rank, rank 0, an engine, a verifier worker or Ray's head
processes, in a chosen phase of a step or at any moment, start-up included. A run that ends of it is resumed; some are
killed several times. Every disturbed run must end with the same parameters and metrics (but for wall-clock times) as
the undisturbed one, bit for bit; the death of an engine or of a worker must not end it; and no process may stay behind
(of Ray's own helpers it is only known that they end by themselves).

Prints what was killed when and how it ended, writes it as JSON after every run, and exits with code 1 if a promise was
broken. The plan of kills is a function of the seed, the moments are not quite. Needs Linux, most of a minute
per kill on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("trainer rank", "rank 0", "engine", "verifier worker", "Ray head")
REPLACED = ("engine", "verifier worker")
"""What a run gets a new one of without ending."""
PHASES = ("generate", "update", "push", "save", "any")
RAY_HELPERS = ("DashboardAgent", "RuntimeEnvAgent", "dashboard/agent.py", "runtime_env/agent/", "default_worker.py")
"""Ray's agents, and workers that are nobody's yet; those of a killed node end by themselves, but after a minute."""
LINGER = 20.0
"""Seconds that processes of a run may outlive it."""

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
verifier = "kill_test:verify"
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


# In the run: the same program, on whose rank 0 the step's clock tells the phase.


def verify(response: str, answer: str) -> bool:
    """A verifier of the user's own, which works in processes of its own."""
    from megatron_entropy.rewards.strings import final_marker

    return final_marker(response, answer).correct is True


def launch_train(arguments: list[str]) -> int:
    """`megatron-entropy train`, with `be_rank` on every rank."""
    from megatron_entropy.cli import main as cli
    from megatron_entropy.launch import torchrun

    torchrun.RANK_MODULE = "kill_test"
    return cli.main(["train", *arguments])


def be_rank() -> int:
    """`megatron_entropy.train`, writing down the phase on rank 0."""
    from megatron_entropy.launch import rank as train
    from megatron_entropy.monitor.timer import StepTimer

    if os.environ["RANK"] == "0":
        file = os.open(os.environ["KILL_TEST_PHASE"], os.O_WRONLY | os.O_CREAT)
        clock, parts = StepTimer.__call__, ["start"]

        @contextlib.contextmanager
        def observed(self: StepTimer, part: str) -> Iterator[None]:
            parts.append(part)
            if part == "generate":
                parts[0] = "other"
            tell()
            with clock(self, part):
                yield
            parts.pop()
            tell()

        def tell() -> None:
            os.pwrite(file, f"{'start' if parts[0] == 'start' else parts[-1]:16}".encode(), 0)

        tell()
        StepTimer.__call__ = observed
    return train.main()


# Outside: the one who kills.


@dataclass
class Kill:
    """One kill: what was planned, what happened, how the run took it."""

    target: str
    planned: str
    fraction: float
    """Of the phase (of the whole run for `any`) that passes before."""
    phase: str = ""
    process: str = ""
    run: int = 0
    step: int = 0
    outcome: str = ""
    """`survived`, `resumed` or `hung`."""
    said: str = ""
    """The run's last line, where it ended."""
    ended_after: float | None = None
    """Seconds from the kill until the run had ended, where it did."""


@dataclass
class Verdict:
    """A disturbed run compared with the undisturbed one."""

    run: int
    kills: int
    resumes: int
    equal_parameters: bool
    equal_metrics: bool


class Run:
    """A training run in a folder of its own, and the processes of its present start."""

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
        """Start, or resume what was started."""
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
        """Since the present start."""
        return time.monotonic() - self._started

    @property
    def step(self) -> int:
        """Steps written down in the metrics."""
        with contextlib.suppress(OSError):
            return (self.folder / "run" / "metrics.jsonl").read_bytes().count(b'"train/loss"')
        return 0

    def phase(self) -> str:
        """What rank 0 does now; `save` while a checkpoint is being written, whatever else goes on."""
        try:
            phase = self._phase.read_text().strip() or "start"
        except OSError:
            return "start"
        try:
            saves = os.scandir(self.folder / "run" / "checkpoints" / "rl")
            writing = any(e.name.endswith(".partial") and e.stat().st_mtime > self._started_at for e in saves)
        except OSError:
            writing = False
        return "save" if writing else phase

    def find(self, target: str) -> list[psutil.Process]:
        """The processes of one kind."""
        return [process for process in psutil.Process().children(recursive=True) if kind_of(process) == target]

    def last_line(self) -> str:
        """The end of the log."""
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def log_tail(self) -> str:
        """More of it."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-40:])

    def end(self) -> int | None:
        """Wait for the end; the exit code, or None where the run hung. Whatever it has left behind is ended too."""
        try:
            code = self.process.wait(max(0.0, self.timeout - self.seconds))
        except subprocess.TimeoutExpired:
            code = None
        self.ended = time.monotonic()
        deadline = time.monotonic() + (LINGER if code is not None else 0.0)
        while (rest := [process for process in living() if not is_ray_helper(process)]) and time.monotonic() < deadline:
            time.sleep(0.1)
        if code is not None:
            self.left_behind += [describe(process) for process in rest]
        clear()
        return code

    def result(self) -> tuple[bytes, list[dict]]:
        """Parameters, and metrics without the wall-clock times."""
        rows = [json.loads(line) for line in (self.folder / "run" / "metrics.jsonl").read_text().splitlines()]
        timeless = [{key: row[key] for key in row if not key.startswith("timing/")} for row in rows]
        return (self.folder / "run" / "hf" / "model.safetensors").read_bytes(), timeless

    def durations(self) -> dict[str, float]:
        """Seconds of a phase, by the metrics of all steps but the first, which waits for the engine."""
        rows = [json.loads(line) for line in (self.folder / "run" / "metrics.jsonl").read_text().splitlines()][2:]
        return {phase: sum(row.get(f"timing/{phase}", 0.0) for row in rows) / len(rows) for phase in PHASES}


def kind_of(process: psutil.Process) -> str:
    """Which of `TARGETS` a process is, if any."""
    try:
        command = " ".join(process.cmdline())
        if "-m kill_test" in command:
            return "rank 0" if process.environ().get("RANK") == "0" else "trainer rank"
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
    """One of `RAY_HELPERS`, or gone; not waited for, ended here."""
    with contextlib.suppress(psutil.Error):
        return any(name in " ".join(process.cmdline()) for name in RAY_HELPERS)
    return True


def living() -> list[psutil.Process]:
    """What has been started from here and lives; the dead are laid to rest."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, ChildProcessError):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
            elif process.ppid() == os.getpid():
                os.waitpid(process.pid, os.WNOHANG)
    return found


def clear() -> None:
    """End all that has been started from here, and nothing else."""
    while rest := living():
        for process in rest:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.05)


def describe(process: psutil.Process) -> str:
    """Name and the beginning of the command line."""
    with contextlib.suppress(psutil.Error):
        return f"{process.name()}: {' '.join(process.cmdline())[:120]}"
    return "?"


def make_plan(kills: int, rng: random.Random) -> list[Kill]:
    """Rounds in which every target and every phase comes once, and in five rounds every target in every phase."""
    plan: list[Kill] = []
    while len(plan) < kills:
        targets, phases = rng.sample(TARGETS, len(TARGETS)), rng.sample(PHASES, len(PHASES))
        for shift in range(len(PHASES)):
            pairs = list(zip(targets, phases[shift:] + phases[:shift], strict=True))
            plan += [Kill(target, phase, rng.random()) for target, phase in rng.sample(pairs, len(pairs))]
    return plan[:kills]


def strike(run: Run, kill: Kill, seconds: dict[str, float], skip: int) -> bool:
    """Wait for the moment and kill; False when the run ended before.

    Args:
        seconds: how long each phase lasts; under `any` the whole run.
        skip: how often to let the phase pass before.
    """
    if kill.planned == "any":
        while run.process.poll() is None and run.seconds < kill.fraction * seconds["any"]:
            time.sleep(0.01)
    inside, victims, looked = False, [], 0.0
    while run.process.poll() is None and run.seconds < run.timeout:
        if time.monotonic() - looked > 0.25 and not inside:
            victims, looked = run.find(kill.target), time.monotonic()
        phase = run.phase()
        entered = phase == kill.planned and not inside
        inside = phase == kill.planned
        skip -= entered
        if victims and (kill.planned == "any" or (inside and skip < 0)):
            victim = victims[int(kill.fraction * len(victims))]
            with contextlib.suppress(psutil.Error):
                kill.process, kill.step = victim.name(), run.step + 1
                time.sleep(0.0 if kill.planned == "any" else kill.fraction * seconds[kill.planned])
                kill.phase = run.phase()
                if kill.planned not in (kill.phase, "any") and run.step < run.steps - 1:
                    continue  # it was shorter this time: the next one
                victim.kill()  # psutil makes sure that it is still the same process
                return True
            victims = []
        time.sleep(0.002)
    return False


def disturb(run: Run, number: int, plan: list[Kill], seconds: dict[str, float], rng: random.Random) -> list[Kill]:
    """One run with up to four kills off the plan's front, resumed until it is done."""
    done: list[Kill] = []
    wanted = min(len(plan), rng.choice((1, 2, 3, 4)))
    while True:
        run.start()
        here: list[Kill] = []
        while len(done) < wanted and plan and strike(run, plan[0], seconds, rng.randrange(3)):
            kill = plan.pop(0)
            kill.run, kill.outcome = number, "survived"
            done.append(kill)
            here.append(kill)
            if kill.target not in REPLACED:
                break
        struck = time.monotonic()
        code = run.end()
        if code == 0:
            return done
        if not here and code is not None:
            raise RuntimeError(f"a run that nobody touched ended with exit code {code}:\n{run.log_tail()}")
        last = here[-1] if here else done[-1]
        last.outcome, last.said = "hung" if code is None else "resumed", run.last_line()
        last.ended_after = round(run.ended - struck, 1)


def kill_test(chosen: argparse.Namespace, folder: Path, console: Console) -> dict:
    """Make the runs; the report, which is also written after each."""
    begin = time.monotonic()
    kills, seed = chosen.kills, chosen.seed
    rng = random.Random(seed)
    inputs = folder / "inputs"
    script = ROOT / "examples" / "make_arithmetic.py"
    command = [sys.executable, script, "--out", inputs, "--seed", str(seed), "--train", "64", "--test", "16"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": paths})
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("undisturbed", total=kills)
        first = Run(folder / "0", inputs, chosen.steps, chosen.timeout)
        first.start()
        if first.end() != 0:
            raise RuntimeError(f"the undisturbed run failed:\n{first.log_tail()}")
        expected, seconds = first.result(), first.durations()
        seconds["any"] = first.seconds
        plan, done, verdicts = make_plan(kills, rng), [], []
        left_behind = list(first.left_behind)

        def write() -> dict:
            report = {
                "seed": seed,
                "planned": kills,
                "kills": [asdict(kill) for kill in done],
                "runs": [asdict(verdict) for verdict in verdicts],
                "left_behind": left_behind,
                "seconds": round(time.monotonic() - begin, 1),
            }
            report["broken"] = broken(report)
            partial = chosen.out.with_name(f"{chosen.out.name}.partial")
            partial.write_text(json.dumps(report, indent=1) + "\n")
            partial.replace(chosen.out)
            return report

        report = write()
        while plan:
            progress.update(task, description=f"run {len(verdicts) + 1}")
            run = Run(folder / str(len(verdicts) + 1), inputs, chosen.steps, chosen.timeout)
            struck = disturb(run, len(verdicts) + 1, plan, seconds, rng)
            done += struck
            parameters, metrics = run.result()
            same = parameters == expected[0], metrics == expected[1]
            verdicts.append(Verdict(len(verdicts) + 1, len(struck), run.starts - 1, *same))
            left_behind += run.left_behind
            if all(same):
                shutil.rmtree(run.folder)
            report = write()
            progress.advance(task, len(struck))
    return report


def broken(report: dict) -> list[str]:
    """Promises that were not kept."""
    found = [
        f"run {run['run']}: {what} differ from the undisturbed run's"
        for run in report["runs"]
        for what in ("parameters", "metrics")
        if not run[f"equal_{what}"]
    ]
    for kill in report["kills"]:
        where = f"run {kill['run']}: {kill['target']} killed in {kill['phase']}, step {kill['step']}"
        if kill["outcome"] == "hung":
            found.append(f"{where}: the run hung")
        elif kill["outcome"] == "resumed" and kill["target"] in REPLACED:
            found.append(f"{where}: the run ended ({kill['said']})")
        elif kill["outcome"] == "resumed" and not kill["said"].startswith("error: "):
            found.append(f"{where}: the last line is no error ({kill['said']})")
    return found + [f"left behind: {process}" for process in report["left_behind"]]


def print_table(report: dict, console: Console) -> None:
    """Target by phase: kills, how they were taken, whether the runs they hit came out equal."""
    equal = {run["run"]: run["equal_parameters"] and run["equal_metrics"] for run in report["runs"]}
    rows: dict[tuple[str, str], Counter] = {}
    for kill in report["kills"]:
        row = rows.setdefault((kill["target"], kill["phase"]), Counter())
        row.update(["kills", kill["outcome"], "equal" if equal[kill["run"]] else "different"])
    table = Table(title="kills")
    for heading in ("target", "phase", "kills", "survived in place", "resumed", "hung", "equal to the bit"):
        table.add_column(heading, justify="left" if heading in ("target", "phase") else "right")
    total: Counter = Counter()
    for (target, phase), row in sorted(rows.items(), key=lambda item: (TARGETS.index(item[0][0]), item[0][1])):
        total.update(row)
        numbers = [str(row[name]) for name in ("kills", "survived", "resumed", "hung", "equal")]
        table.add_row(target, phase, *numbers)
    table.add_section()
    table.add_row("all", "", *[str(total[name]) for name in ("kills", "survived", "resumed", "hung", "equal")])
    console.print(table)


def main() -> int:
    """Kill, compare, print, write, tell by the exit code."""
    if "RANK" in os.environ:
        return be_rank()
    if sys.argv[1:2] == ["train"]:
        return launch_train(sys.argv[2:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6, help="of each run")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds of a start, beyond which it hangs")
    parser.add_argument("--out", type=Path, default=Path("kill_test.json"))
    chosen = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    # Orphans of what is started from here become this process's children, whoever their parent was.
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = Path(tempfile.mkdtemp(prefix="kill_"))
    try:
        report = kill_test(chosen, folder, console)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        clear()
        shutil.rmtree(folder, ignore_errors=True)
    print_table(report, console)
    for line in report["broken"]:
        console.print(f"broken: {line}", style="red", highlight=False, markup=False, soft_wrap=True)
    print(f"{len(report['kills'])} kills, {len(report['broken'])} promises broken; written to {chosen.out}")
    return int(bool(report["broken"]))


if __name__ == "__main__":
    sys.exit(main())
