#!/usr/bin/env python3
"""Load a reward server with concurrent answers, some hostile: `python tools/load_test_rewards.py`.

Starts `megatron-entropy serve-rewards` on a free port and sends every answer in a connection of its own, all at once;
a refused one (429, 503) is sent again after the time that the server asks for. 95 % are ordinary mathematical answers
of known verdict; 2.5 % are LaTeX on which sympy does not end; 2.5 % go to a verifier that hangs, dies or raises
(tests/unit/bad_verifiers.py). Meanwhile a worker is killed, as the out-of-memory killer would. Then the same ordinary
answers are graded in one call of the client that training uses.

Prints the outcome of every kind of answer, latencies, the throughput and where the server listens. Exit code 1: an
ordinary answer without its verdict, a hostile one with a verdict, or an answer that is missing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from megatron_entropy.rewards import RemoteGrader

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "unit"
BAD_VERIFIER = "bad_verifiers:misbehave"
NEVER_ENDING = (
    r"\boxed{9^{9^{9^{9}}}}",
    r"\boxed{(10^{9})!}",
    r"\boxed{\sum_{i=1}^{10^{12}} i^{i}}",
    r"\boxed{\binom{10^9}{5 \cdot 10^8}}",
    r"\boxed{2^{2^{100}} - 2^{2^{100}}}",
)
MISBEHAVIOUR = ("hang", "exit", "segfault", "memory", "raise")
ORDINARY = (
    (r"so $x = 2\sqrt{3}$, \boxed{2\sqrt{3}}", r"\sqrt{12}", True),
    (r"\boxed{\frac{1}{2}}", "0.5", True),
    (r"\boxed{(x-1)(x+1)}", "x^2-1", True),
    (r"\boxed{41}", "42", False),
    ("I do not know", "42", False),
)


@dataclass
class Answer:
    """An answer, what is expected (None: an error), and what the server said."""

    kind: str
    verifier: str
    response: str
    truth: str
    expected: bool | None
    correct: bool | None = None
    error: str | None = "missing"
    seconds: float = 0.0
    refusals: int = 0

    @property
    def is_as_expected(self) -> bool:
        """Whether the verdict is right; a hostile answer must have an error instead."""
        return self.correct is self.expected and (self.error is None) == (self.expected is not None)


def main() -> int:
    """Run the test and print its figures."""
    args = _parse()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    answers = make_answers(args.answers)
    command = ["serve-rewards", "--port", "0", "--verifier", BAD_VERIFIER, "--workers", str(args.workers)]
    command += ["--timeout", str(args.timeout), "--queue", str(args.queue)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{TESTS}", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, "-m", "megatron_entropy", *command], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        print(line, end="")
        url = re.findall(r"http://[\d.]+:\d+", line)[0]
        with RemoteGrader(url, verifier="math_verify", budget=600.0, patience=60.0) as grader:
            grader.grade([("1", "1")] * 50)  # the workers have started
            show_listeners(server.pid)
            started = time.monotonic()
            asyncio.run(send_all(url, answers, server.pid))
            show(answers, time.monotonic() - started)
            ordinary = [answer for answer in answers if answer.expected is not None]
            started = time.monotonic()
            grades = grader.grade([(answer.response, answer.truth) for answer in ordinary])
            seconds = time.monotonic() - started
        wrong = sum(grade.correct is not answer.expected for grade, answer in zip(grades, ordinary, strict=True))
        print(f"one call of the client: {len(ordinary)} answers in {seconds:.1f} s ({len(ordinary) / seconds:.0f}/s)")
    finally:
        server.terminate()
        code = server.wait(60)
    print(f"the server ended with code {code}")
    return int(wrong > 0 or code != 0 or not all(answer.is_as_expected for answer in answers))


def make_answers(count: int) -> list[Answer]:
    """`count` answers, mixed: of 40, one is LaTeX that never ends, and one goes to the bad verifier."""
    answers = []
    for index in range(count):
        if index % 40 == 7:
            text = NEVER_ENDING[index // 40 % len(NEVER_ENDING)]
            answers.append(Answer("never-ending LaTeX", "math_verify", text, "7", None))
        elif index % 40 == 27:
            text = MISBEHAVIOUR[index // 40 % len(MISBEHAVIOUR)]
            answers.append(Answer(text, BAD_VERIFIER, text, "", None))
        else:
            text, truth, expected = ORDINARY[index % len(ORDINARY)]
            answers.append(Answer("ordinary", "math_verify", f"answer {index}: {text}", truth, expected))
    return answers


async def send_all(url: str, answers: Sequence[Answer], pid: int) -> None:
    """Send every answer in a connection of its own, and kill one worker meanwhile."""
    await asyncio.gather(*(send(url, answer) for answer in answers), kill_worker(pid))


async def send(url: str, answer: Answer) -> None:
    """Send one answer until the server grades it."""
    host, port = url.removeprefix("http://").split(":")
    pair = {"response": answer.response, "answer": answer.truth}
    body = json.dumps({"verifier": answer.verifier, "pairs": [pair]}).encode()
    head = f"POST /grade HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    started = time.monotonic()
    while True:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        reply = (await reader.read()).decode()
        writer.close()
        status = int(reply.split()[1])
        if status not in (429, 503):
            break
        answer.refusals += 1
        await asyncio.sleep(float(re.findall(r"(?i)retry-after: (\d+)", reply)[0]))
    answer.seconds = time.monotonic() - started
    content = json.loads(reply.partition("\r\n\r\n")[2])
    if status == 200:
        answer.correct, answer.error = content["grades"][0]["correct"], content["grades"][0]["error"]
    else:
        answer.error = f"status {status}: {content}"


async def kill_worker(pid: int) -> None:
    """Kill a worker as soon as the answers are on their way."""
    await asyncio.sleep(1.0)
    workers = [child for child in psutil.Process(pid).children() if "spawn_main" in " ".join(child.cmdline())]
    workers[0].kill()


def show_listeners(pid: int) -> None:
    """Print the addresses on which the server and its workers listen."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for process in family:
        for connection in process.net_connections():
            if connection.status == psutil.CONN_LISTEN:
                print(f"process {process.pid} listens on {connection.laddr.ip}:{connection.laddr.port}")


def show(answers: Sequence[Answer], seconds: float) -> None:
    """Print outcomes, latencies and throughput."""
    outcomes = Counter(
        (
            answer.kind,
            {True: "correct", False: "wrong", None: (answer.error or "no error").split(":")[0]}[answer.correct],
        )
        for answer in answers
    )
    for (kind, outcome), count in sorted(outcomes.items()):
        print(f"{kind:24} {outcome:12} {count:5}")
    print(f"{len(answers)} answers in {seconds:.1f} s ({len(answers) / seconds:.0f}/s), all at once")
    for name, chosen in (("all", answers), ("ordinary", [answer for answer in answers if answer.kind == "ordinary"])):
        p50, p95, p99 = np.percentile([answer.seconds for answer in chosen], [50, 95, 99])
        print(f"seconds to the grade, {name}: p50 {p50:.2f}, p95 {p95:.2f}, p99 {p99:.2f}")
    refused = sum(answer.refusals > 0 for answer in answers)
    print(f"refused with 429 at first: {refused} answers, {sum(answer.refusals for answer in answers)} times")
    strange = [answer for answer in answers if not answer.is_as_expected]
    print(f"not as expected: {len(strange)}")
    for answer in strange[:20]:
        print(f"  {answer.response[:60]!r}: {answer.correct}, {answer.error}, after {answer.seconds:.1f} s")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds for one answer; default: %(default)s")
    parser.add_argument("--queue", type=int, default=10_000, help="answers that may wait; default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
