#!/usr/bin/env python3
"""Kill processes of a real training run at random moments; the run must end as if undisturbed.

    python tools/kill_test.py [--kills 50] [--seed 1] [--timeout 240] [--out kill_test.json]

Trains a tiny model by GRPO under TP2 with a vLLM engine and verifier workers, with a checkpoint after every step: once
undisturbed, then again and again while SIGKILL hits a trainer rank, rank 0, an engine, a verifier worker, Ray's head
processes or the launcher, in a chosen phase of a step or at any moment, start-up included. After some kills of rank 0
the newest checkpoint is damaged as well. A run that ends by a kill is resumed; some runs get several kills. Promises:
every disturbed run ends with the parameters and metrics (except wall-clock times) of the undisturbed one, bit for bit;
the death of an engine or of a worker does not end the run; no process is left behind (except Ray's own helpers, which
end by themselves).

Prints what was killed when and how it ended, writes it as JSON after every run, and exits with code 1 if a promise was
broken. The plan of kills is a function of the seed; the exact moments are not. Needs Linux, and about a minute for each
kill on two cores.
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
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from kill_run import PHASES, ROOT, TARGETS, Run, find, kill_all
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from megatron_entropy.files import atomic_write_text

REPLACEABLE = ("engine", "verifier worker")
"""Targets that a run replaces without ending."""


@dataclass
class Kill:
    """One kill: the plan, what happened, and the reaction of the run."""

    target: str
    planned: str
    fraction: float
    """Fraction of the phase (of the whole run for `any`) that passes before the kill."""
    phase: str = ""
    process: str = ""
    run: int = 0
    step: int = 0
    outcome: str = ""
    """`survived`, `resumed` or `hung`."""
    damage: str = ""
    """What was done to the newest checkpoint after the kill."""
    last_line: str = ""
    """The last line of the run's log, where the run ended."""
    ended_after: float | None = None
    """Seconds from the kill to the end of the run, where it ended."""


@dataclass
class Comparison:
    """A disturbed run compared with the undisturbed one."""

    run: int
    kills: int
    resumes: int
    equal_parameters: bool
    equal_metrics: bool


def make_plan(kills: int, rng: random.Random) -> list[Kill]:
    """Plan rounds in which every target comes once and every phase at least once.

    Five rounds hold every target in every phase.
    """
    plan: list[Kill] = []
    while len(plan) < kills:
        targets, phases = rng.sample(TARGETS, len(TARGETS)), rng.sample(PHASES, len(PHASES))
        for shift in range(len(PHASES)):
            pairs = [(target, phases[(i + shift) % len(phases)]) for i, target in enumerate(targets)]
            plan += [Kill(target, phase, rng.random()) for target, phase in rng.sample(pairs, len(pairs))]
    return plan[:kills]


def strike(run: Run, kill: Kill, seconds: dict[str, float], skip: int) -> bool:
    """Wait for the moment and kill; return False when the run ended before.

    Args:
        seconds: duration of each phase; of the whole run for `any`.
        skip: how often the phase passes before.
    """
    if kill.planned == "any":
        while run.process.poll() is None and run.seconds < kill.fraction * seconds["any"]:
            time.sleep(0.01)
    is_inside, victims, looked = False, [], 0.0
    while run.process.poll() is None and run.seconds < run.timeout:
        if time.monotonic() - looked > 0.25 and not is_inside:
            victims, looked = find(kill.target), time.monotonic()
        was_inside, is_inside = is_inside, kill.planned in run.phases()
        skip -= is_inside and not was_inside
        if victims and (kill.planned == "any" or (is_inside and skip < 0)):
            victim = victims[int(kill.fraction * len(victims))]
            with contextlib.suppress(psutil.Error):
                kill.process, kill.step = victim.name(), run.step + 1
                time.sleep(0.0 if kill.planned == "any" else kill.fraction * seconds[kill.planned])
                phases = run.phases()
                kill.phase = kill.planned if kill.planned in phases else phases[0]
                if kill.planned not in (kill.phase, "any") and run.step < run.steps - 1:
                    continue  # the phase was shorter this time: wait for the next one
                victim.kill()  # psutil makes sure that it is still the same process
                return True
            victims = []
        time.sleep(0.002)
    return False


def disturb(run: Run, number: int, plan: list[Kill], seconds: dict[str, float], rng: random.Random) -> list[Kill]:
    """Make one run with up to four kills from the front of the plan, and resume it until it is complete."""
    done: list[Kill] = []
    wanted = min(len(plan), rng.choice((1, 2, 3, 4)))
    while True:
        run.start()
        kills: list[Kill] = []
        while len(done) < wanted and plan and strike(run, plan[0], seconds, rng.randrange(3)):
            kill = plan.pop(0)
            kill.run, kill.outcome = number, "survived"
            done.append(kill)
            kills.append(kill)
            if kill.target not in REPLACEABLE:
                break
        struck = time.monotonic()
        code = run.end()
        if code == 0:
            if not done:  # faster than expected: the moment of the kill comes earlier in the next run
                seconds["any"] = min(seconds["any"], run.seconds)
            return done
        if not kills and code is not None:
            raise RuntimeError(f"a run without a kill ended with exit code {code}:\n{run.log_tail()}")
        last = kills[-1] if kills else done[-1]
        last.outcome, last.last_line = "hung" if code is None else "resumed", run.last_line()
        last.ended_after = round(run.ended - struck, 1)
        if last.target == "checkpoint" and not last.damage:
            last.damage = run.damage_newest_checkpoint(last.fraction)


def kill_test(args: argparse.Namespace, folder: Path, console: Console) -> dict:
    """Make the runs; return the report, which is also written after each run."""
    begin = time.monotonic()
    rng = random.Random(args.seed)
    inputs = folder / "inputs"
    make_inputs(inputs, args.seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("undisturbed", total=args.kills)
        first = Run(folder / "0", inputs, args.steps, args.timeout)
        first.start()
        if first.end() != 0:
            raise RuntimeError(f"the undisturbed run failed:\n{first.log_tail()}")
        expected, seconds = first.result(), first.durations()
        seconds["any"] = first.seconds
        plan, done, comparisons = make_plan(args.kills, rng), [], []
        left_behind = list(first.left_behind)

        def write() -> dict:
            report = {
                "seed": args.seed,
                "planned": args.kills,
                "kills": [asdict(kill) for kill in done],
                "runs": [asdict(comparison) for comparison in comparisons],
                "left_behind": left_behind,
                "seconds": round(time.monotonic() - begin, 1),
            }
            report["broken"] = broken_promises(report)
            atomic_write_text(args.out, json.dumps(report, indent=1) + "\n")
            return report

        report = write()
        while plan:
            number = len(comparisons) + 1
            progress.update(task, description=f"run {number}")
            run = Run(folder / str(number), inputs, args.steps, args.timeout)
            kills = disturb(run, number, plan, seconds, rng)
            done += kills
            parameters, metrics = run.result()
            equal = parameters == expected[0], metrics == expected[1]
            comparisons.append(Comparison(number, len(kills), run.starts - 1, *equal))
            left_behind += run.left_behind
            if all(equal):
                shutil.rmtree(run.folder)
            report = write()
            progress.advance(task, len(kills))
    return report


def make_inputs(folder: Path, seed: int) -> None:
    """Make the data and the model of all runs."""
    script = ROOT / "examples" / "make_arithmetic.py"
    command = [sys.executable, script, "--out", folder, "--seed", str(seed), "--train", "64", "--eval", "16"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": paths})


def broken_promises(report: dict) -> list[str]:
    """Return a line for every broken promise."""
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
        elif kill["outcome"] == "resumed" and kill["target"] in REPLACEABLE:
            found.append(f"{where}: the run ended ({kill['last_line']})")
        elif (
            kill["outcome"] == "resumed"
            and kill["target"] != "launcher"
            and not kill["last_line"].startswith("error: ")
        ):
            found.append(f"{where}: the last line is no error ({kill['last_line']})")
    return found + [f"left behind: {process}" for process in report["left_behind"]]


def print_table(report: dict, console: Console) -> None:
    """Print, for each target and phase, the kills, their outcomes, and how many runs they hit ended equal."""
    equal = {run["run"]: run["equal_parameters"] and run["equal_metrics"] for run in report["runs"]}
    rows: dict[tuple[str, str], Counter] = {}
    for kill in report["kills"]:
        row = rows.setdefault((kill["target"], kill["phase"]), Counter())
        row.update(["kills", kill["outcome"], "equal" if equal[kill["run"]] else "different"])
    table = Table(title="kills")
    for heading in ("target", "phase", "kills", "survived", "resumed", "hung", "bit-identical"):
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
    """Kill, compare, print and write; exit code 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6, help="of each run")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds after which a started run counts as hung")
    parser.add_argument("--out", type=Path, default=Path("kill_test.json"))
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    # Orphaned descendants become children of this process, so that it sees and kills them.
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = Path(tempfile.mkdtemp(prefix="kill_"))
    try:
        report = kill_test(args, folder, console)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        kill_all()
        shutil.rmtree(folder, ignore_errors=True)
    print_table(report, console)
    for line in report["broken"]:
        console.print(f"broken: {line}", style="red", highlight=False, markup=False, soft_wrap=True)
    print(f"{len(report['kills'])} kills, {len(report['broken'])} promises broken; written to {args.out}")
    return int(bool(report["broken"]))


if __name__ == "__main__":
    sys.exit(main())
