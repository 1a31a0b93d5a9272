"""`examples/cluster/train.sbatch` on a real Slurm with two nodes: it finishes, stops, is queued again, loses a node.

The runs train without engines, apart from one with an engine on each node. Shown is what the script and the trainer do
with Slurm's signals and its requeue; a cluster's own limits, accounting and GPUs are not.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bed import ROOT, Bed
from job import SFT, Job, make_inputs, wait_for
from slurm import POLL, Slurm, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=f"no Slurm: {why_not()}")

SCRIPT = ROOT / "examples" / "cluster" / "train.sbatch"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with Bed(tmp_path_factory.mktemp("slurm")) as bed:
        yield Slurm(bed)


@pytest.fixture(scope="module")
def inputs(slurm: Slurm) -> Path:
    return make_inputs(slurm.bed.folder / "inputs")


class SlurmJob(Job):
    """A run that Slurm starts."""

    def submit(self, slurm: Slurm, *options: str, **variables: str) -> str:
        log = self.folder / "job.log"
        arguments = [str(self.config), f"--output={self.output}", *self.overrides]
        self.slurm = slurm
        self.id = slurm.submit(SCRIPT, [f"--output={log}", *options], arguments, **({"RAY": "0"} | variables))
        return self.id

    def text(self) -> str:
        """All logs of the job."""
        files = [self.folder / "job.log", *sorted((self.output / "logs" / self.id).glob("*.log"))]
        return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in files if file.exists())

    def wait_for_step(self, step: int, *, start: int = 0, timeout: float = 300.0) -> None:
        """Wait until a step is done; `start`: of the job, 0 before the first requeue."""

        def is_done() -> bool:
            assert self.slurm.show(self.id)["JobState"] not in ENDED, self.text()
            return self.text().count(f"start {self.id}-") > start and any(
                row["step"] >= step for row in self.metrics_so_far()
            )

        wait_for(is_done, timeout, f"step {step} of {self.id}", self.text, interval=POLL)

    def metrics_so_far(self) -> list[dict]:
        return self.metrics() if (self.output / "metrics.jsonl").exists() else []

    def steps(self) -> list[int]:
        return [row["step"] for row in self.metrics_so_far() if row["step"]]


@pytest.mark.timeout(600)
def test_a_job_finishes_with_a_log_of_each_node(slurm, inputs):
    job = SlurmJob(slurm.bed, inputs, "finish", overrides=SFT)
    job.submit(slurm)
    assert slurm.wait_for_state(job.id, *ENDED) == "COMPLETED", job.text()
    assert job.steps() == [1, 2]
    logs = job.output / "logs" / job.id
    assert {"train.node-a.log", "train.node-b.log"} <= {path.name for path in logs.iterdir()}


@pytest.mark.timeout(1200)
def test_a_signal_stops_the_run_and_queues_it_again(slurm, inputs):
    job = SlurmJob(slurm.bed, inputs, "requeue", steps=100_000, overrides=SFT | {"checkpoint.every": "1000"})
    job.submit(slurm)
    job.wait_for_step(1)
    slurm.run("scancel", "--batch", "--signal=TERM", job.id)  # what --signal=B:TERM@600 sends before the time limit
    wait_for(lambda: slurm.show(job.id)["Restarts"] == "1", 120, "the requeue", job.text, interval=POLL)
    stopped = job.steps()[-1]
    assert "exit code 143" in job.text() and stopped < 100_000
    slurm.wait_for_state(job.id, "RUNNING")
    job.wait_for_step(stopped + 1, start=1)
    assert job.steps()[:stopped] == list(range(1, stopped + 1)), "no step twice, none left out"
    (job.output / "logs" / job.id / "stop").touch()
    slurm.run("scancel", "--batch", "--signal=TERM", job.id)
    slurm.wait_for_state(job.id, *ENDED)
    shown = slurm.show(job.id)
    assert (shown["Restarts"], shown["ExitCode"]) == ("1", "143:0"), job.text()
    assert job.steps() == list(range(1, job.steps()[-1] + 1))


@pytest.mark.timeout(600)
def test_a_signal_to_every_process_stops_the_run_for_good(slurm, inputs):
    """`scancel --signal=TERM` reaches the launchers and the ranks, but not the script."""
    job = SlurmJob(slurm.bed, inputs, "stop", steps=100_000, overrides=SFT | {"checkpoint.every": "1000"})
    job.submit(slurm)
    job.wait_for_step(1)
    slurm.run("scancel", "--signal=TERM", job.id)
    slurm.wait_for_state(job.id, *ENDED)
    shown = slurm.show(job.id)
    assert (shown["Restarts"], shown["ExitCode"]) == ("0", "143:0"), job.text()
    saved = job.output / "checkpoints" / "rl" / f"step_{job.steps()[-1]:06d}"
    assert saved.is_dir(), job.text()


@pytest.mark.timeout(1200)
def test_a_run_goes_on_after_the_death_of_a_node(slurm, inputs):
    job = SlurmJob(slurm.bed, inputs, "death", steps=100_000, overrides=SFT | {"checkpoint.every": "1"})
    job.submit(slurm)
    job.wait_for_step(3)
    begin = time.monotonic()
    slurm.bed.node("node-b").kill()
    wait_for(lambda: slurm.show(job.id)["Restarts"] == "1", 300, "the requeue", job.text, interval=POLL)
    print(f"queued again {time.monotonic() - begin:.0f} s after the death of the node")
    slurm.start(slurm.bed.boot("node-b"))
    slurm.wait_for_state(job.id, "RUNNING")
    resumed = job.steps()[-1]
    job.wait_for_step(resumed + 1, start=1)
    slurm.run("scancel", job.id)
    assert slurm.wait_for_state(job.id, *ENDED, timeout=60) == "CANCELLED", job.text()
    assert slurm.show(job.id)["Restarts"] == "1", "not queued again"
    steps = job.steps()
    assert steps == list(range(1, steps[-1] + 1)), job.text()


@pytest.mark.timeout(1800)
def test_a_job_with_an_engine_on_each_node(slurm, inputs):
    job = SlurmJob(slurm.bed, inputs, "engines")
    job.submit(slurm, RAY="1", RAY_OPTIONS="--num-cpus=1 --object-store-memory=100000000")
    assert slurm.wait_for_state(job.id, *ENDED, timeout=1500) == "COMPLETED", job.text()
    assert job.steps() == [1, 2]
    logs = {path.name for path in (job.output / "logs" / job.id).iterdir()}
    assert {f"{kind}.{node.name}.log" for kind in ("ray", "train") for node in slurm.bed.nodes} <= logs
    assert "ray_token" in logs
