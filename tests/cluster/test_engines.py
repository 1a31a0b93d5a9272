"""Engines on two nodes: a short cut of the network in each phase, the death of a node's Ray, mistakes in joining."""

import random
import re
import signal
import time

import pytest
from bed import Bed
from job import Job, wait_for

TIMEOUT = 600
pytestmark = pytest.mark.timeout(2400)
LONG_ANSWERS = {
    "rollout.max_response_tokens": "400",
    "batch.prompts": "24",
    "actor.max_tokens_per_microbatch": "8192",
    "checkpoint.every": "1",
}


def longest_phase(line: str) -> str:
    """The phase in which a step of the log spent most of its time."""
    seconds = {phase: float(value) for phase, value in re.findall(r"(\w+) ([\d.]+)", line[line.rindex("(") :])}
    return max(seconds, key=seconds.__getitem__)


def test_short_cuts_while_engines_work(bed: Bed, inputs):
    """Three cuts of 20 s, at moments drawn by a seed; the first one while the engines generate."""
    a, b = bed.nodes
    job = Job(bed, inputs, "short", steps=400, overrides=LONG_ANSWERS)
    job.start_ray(bed.nodes)
    job.train(bed.nodes)
    job.wait_for(a, r"rl step 2/", TIMEOUT)
    rng = random.Random(1)
    for number in range(3):
        step = len(job.metrics())
        job.wait_for(a, rf"rl step {step}/", TIMEOUT)
        time.sleep(3 if number == 0 else rng.uniform(0, 15))
        b.cut()
        time.sleep(20)
        b.restore()
        begin = time.monotonic()
        job.wait_for(a, rf"rl step {step + 1}/", TIMEOUT)
        line = next(line for line in job.log(a).splitlines() if f"rl step {step + 1}/" in line)
        print(f"cut {number}: {longest_phase(line)}, {time.monotonic() - begin:.0f} s after it: {line}")
        assert number or longest_phase(line) == "generate", line
    assert "died" not in job.log(a)
    a.signal(job.processes["node-a"], signal.SIGTERM)
    assert set(job.wait(TIMEOUT).values()) == {143}, job.all_logs()


def test_a_link_lost_for_good_while_engines_generate(bed: Bed, inputs):
    """Both nodes end; the engines of the joined cluster end with the run."""
    a, b = bed.nodes
    job = Job(bed, inputs, "lost", steps=400, overrides={**LONG_ANSWERS, "cluster.lost_after": "30"})
    job.start_ray(bed.nodes)
    job.train(bed.nodes)
    job.wait_for(a, r"rl step 2/", TIMEOUT)
    time.sleep(3)
    b.cut()
    begin = time.monotonic()
    assert job.wait(150) == {"node-a": 1, "node-b": 1}, job.all_logs()
    print(f"ended {time.monotonic() - begin:.0f} s after the cut")
    for node, other in ((a, "rank 1 on node-b"), (b, "rank 0 on node-a")):
        assert len(re.findall(r"^error: ", job.log(node), re.MULTILINE)) == 1, job.log(node)
        assert f"{other} has not answered {node.name}" in job.log(node)
    wait_for(lambda: not any("VllmEngine" in process.name() for process in a.processes()), 60, "the engines to end")


def test_a_cluster_without_room_is_an_error_at_once(bed: Bed, inputs):
    job = Job(bed, inputs, "room", engines=3)
    job.start_ray(bed.nodes)
    job.train(bed.nodes)
    assert set(job.wait(120).values()) == {2}, job.all_logs()
    assert "has room for 2 of rollout.num_engines=3 engines" in job.log(bed.nodes[0])


def test_a_cluster_that_wants_a_token(bed: Bed, inputs):
    """First with the token on every node, then without it where the run starts."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    job = Job(bed, inputs, "token")
    job.start_ray(bed.nodes, environment=token)
    job.train(bed.nodes)
    assert set(job.wait(180).values()) == {1}, job.all_logs()
    assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" in job.log(bed.nodes[0])
    job.train(bed.nodes, "--overwrite", environment=token)
    assert set(job.wait(TIMEOUT).values()) == {0}, job.all_logs()
