"""What happens to a run over two nodes when a rank, an agent, a node or the network fails, and when it is stopped.

Every surviving node ends in bounded time, in one line; the next start continues. Runs without engines are used where
engines play no part, because they start in a fraction of the time.
"""

import re
import signal
import time

import pytest
from bed import Bed
from job import SFT, Job

TIMEOUT = 400
LOST_AFTER = 20
pytestmark = pytest.mark.timeout(1800)
LONG = {**SFT, "checkpoint.every": "1", "cluster.lost_after": str(LOST_AFTER)}


def started(bed: Bed, inputs, name: str, *, steps: int = 4000, **options) -> Job:
    """A run that has saved its first checkpoint."""
    job = Job(bed, inputs, name, steps=steps, overrides=LONG)
    job.train(bed.nodes, **options)
    job.wait_for(bed.nodes[0], r"step 2/", TIMEOUT)
    return job


def errors(job: Job) -> dict[str, list[str]]:
    """The error lines of every node; no traceback is allowed."""
    found = {}
    for node in job.bed.nodes:
        log = job.log(node)
        assert "Traceback" not in log, log
        found[node.name] = [line for line in log.splitlines() if line.startswith("error: ")]
    print(found)
    return found


def resumes(job: Job, nodes) -> None:
    """The run continues with a few more steps than it has."""
    newest = max(int(path.name[5:]) for path in (job.output / "checkpoints" / "rl").glob("step_??????"))
    job.processes.clear()
    job.train(nodes, "--resume", f"--steps={newest + 2}", f"--actor.parallel.dp={len(nodes)}")
    assert set(job.wait(TIMEOUT).values()) == {0}, job.all_logs()
    assert job.metrics()[-1]["step"] == newest + 2


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank(bed: Bed, inputs, victim):
    job = started(bed, inputs, "killed")
    node = bed.nodes[victim]
    node.ranks()[0].kill()
    assert set(job.wait(60).values()) == {1}, job.all_logs()
    found = errors(job)
    (line,) = found[node.name]
    assert re.match(rf"error: rank {victim} on {node.name} was killed by SIGKILL", line), line
    assert found["node-a"] == [line] or victim == 0
    resumes(job, bed.nodes)


def test_a_stop_signal_to_either_node(bed: Bed, inputs):
    for number, node in enumerate(bed.nodes):
        job = started(bed, inputs, f"stopped{number}")
        node.signal(job.processes[node.name], signal.SIGTERM)
        assert job.wait(60) == {"node-a": 143, "node-b": 143}, job.all_logs()
        assert errors(job) == {"node-a": [], "node-b": []}
        resumes(job, bed.nodes[: number + 1])


def test_a_node_without_power(bed: Bed, inputs):
    """Nothing closes its connections: only its silence is noticed."""
    job = started(bed, inputs, "power")
    bed.nodes[1].kill()
    begin = time.monotonic()
    job.processes.pop("node-b").wait(30)
    assert job.wait(LOST_AFTER + 60) == {"node-a": 1}, job.all_logs()
    assert time.monotonic() - begin < LOST_AFTER + 40
    (line,) = errors(job)["node-a"]
    silence = re.search(r"rank 1 on node-b has not answered node-a for (\d+) s", line)
    assert silence and LOST_AFTER <= int(silence[1]) <= LOST_AFTER + 5, line
    bed.boot("node-b")
    resumes(job, bed.nodes)


def test_a_link_lost_for_good(bed: Bed, inputs):
    job = started(bed, inputs, "cut")
    bed.nodes[1].cut()
    assert job.wait(LOST_AFTER + 90) == {"node-a": 1, "node-b": 1}, job.all_logs()
    found = errors(job)
    assert re.search(r"rank 1 on node-b has not answered node-a for \d+ s", found["node-a"][0]), found
    assert re.search(r"rank 0 on node-a has not answered node-b for \d+ s", found["node-b"][0]), found
    assert [len(lines) for lines in found.values()] == [1, 1]
    resumes(job, bed.nodes[:1])


def test_a_stop_signal_while_the_link_is_lost(bed: Bed, inputs):
    job = Job(bed, inputs, "cut", steps=4000, overrides={**LONG, "cluster.lost_after": "300"})
    job.train(bed.nodes)
    job.wait_for(bed.nodes[0], r"step 2/", TIMEOUT)
    bed.nodes[1].cut()
    job.wait_for(bed.nodes[0], r"rank 1 on node-b has not answered", 60)
    for node in bed.nodes:
        node.signal(job.processes[node.name], signal.SIGTERM)
    assert job.wait(60) == {"node-a": 143, "node-b": 143}, job.all_logs()
    assert "SIGTERM received while rank 1 on node-b does not answer" in errors(job)["node-a"][0]


def test_a_short_cut_during_updates(bed: Bed, inputs):
    job = Job(bed, inputs, "short", steps=4000, overrides={**LONG, "cluster.lost_after": "120"})
    job.train(bed.nodes)
    job.wait_for(bed.nodes[0], r"step 2/", TIMEOUT)
    bed.nodes[1].cut()
    time.sleep(20)
    before = len(job.metrics())
    bed.nodes[1].restore()
    job.wait_for(bed.nodes[0], rf"step {before + 2}/", 60)
    job.wait_for(bed.nodes[0], "rank 1 on node-b answers again", 60)
    bed.nodes[0].signal(job.processes["node-a"], signal.SIGTERM)
    assert set(job.wait(60).values()) == {143}, job.all_logs()


def test_a_disk_that_fills_on_one_node(tmp_path, inputs):
    """The run goes on, and a failure is still one line, although its report cannot be written there."""
    with Bed(tmp_path, sizes={"node-b": {"tmp": "100m"}}) as bed:
        job = started(bed, inputs, "full")
        bed.nodes[1].run(["bash", "-c", "! dd if=/dev/zero of=/tmp/big bs=4k 2>/dev/null"])
        before = len(job.metrics())
        job.wait_for(bed.nodes[0], rf"step {before + 2}/", 60)
        bed.nodes[0].ranks()[0].kill()
        assert set(job.wait(60).values()) == {1}, job.all_logs()
        found = errors(job)
        assert "rank 0 on node-a was killed by SIGKILL" in found["node-a"][0]
        assert [len(found[name]) for name in ("node-a", "node-b")] == [1, 1], found
