"""`examples/cluster/torchrun.sh` on two nodes: a stop signal to the script, the next start, and the end of its Ray."""

import signal

import pytest
from bed import ROOT, Bed, Node
from job import SFT, Job

SCRIPT = ROOT / "examples" / "cluster" / "torchrun.sh"


def start(job: Job, run_id: str, *arguments: str, ray: str) -> None:
    """Start the script on every node."""
    variables = {"HEAD": "node-a", "NNODES": "2", "RUN_ID": run_id, "RAY": ray, "LOGS": str(job.folder / "ray")}
    variables["RAY_OPTIONS"] = "--num-cpus=1 --object-store-memory=100000000"
    for node in job.bed.nodes:
        log = job.folder / f"{node.name}.log"
        command = [SCRIPT, job.config, *job.overrides, *arguments]
        job.processes[node.name] = node.start(command, log=log, environment=variables)


@pytest.mark.timeout(900)
def test_a_stop_signal_to_the_script_and_the_next_start(bed: Bed, inputs):
    """The run has no engines; the second start has Ray nevertheless, which must end with it."""
    job = Job(bed, inputs, "script", steps=4000, overrides=SFT | {"checkpoint.every": "1000"})
    start(job, "first", ray="0")
    job.wait_for(bed.nodes[0], r"step 2/", 200)
    Node.signal(job.processes["node-b"], signal.SIGTERM)
    assert job.wait(90) == {"node-a": 143, "node-b": 143}, job.all_logs()
    stopped = job.metrics()[-1]["step"]
    start(job, "second", f"--steps={stopped + 2}", ray="1")
    assert job.wait(400) == {"node-a": 0, "node-b": 0}, job.all_logs()
    assert [row["step"] for row in job.metrics()] == list(range(stopped + 3))
    assert len(list((job.folder / "ray").glob("ray.node-?.log"))) == 2
    left = [process.name() for node in bed.nodes for process in node.processes()]
    assert not [name for name in left if "ray" in name or "gcs" in name], left
