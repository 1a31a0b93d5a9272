"""Mistakes that only several nodes can make: each ends every node in bounded time, in one line that says what to do.

The line is printed by the node that is at fault and by the first node, and by no other.
"""

import re
import sys

import pytest
from bed import Bed
from job import SFT, Job

TIMEOUT = 300
pytestmark = pytest.mark.timeout(800)


def lines(job: Job, name: str) -> list[str]:
    """The error lines of a node; there must be nothing that only a developer can read."""
    log = job.log(job.bed.node(name))
    assert "Traceback" not in log, log
    found = [line for line in log.splitlines() if line.startswith("error: ")]
    print(f"{name}:", *found, sep="\n    ")
    return found


def test_host_names_that_lead_to_loopback(tmp_path, inputs):
    """Debian's default: every node's own name leads to 127.0.1.1, and the first node is named by its name.

    torchrun itself does not recognise its first node then, which `is_host` repairs; its ranks are ours again.
    """
    hosts = {
        "node-a": "127.0.1.1 node-a\n10.77.0.2 node-b\n",
        "node-b": "127.0.1.1 node-b\n10.77.0.1 node-a\n",
    }
    with Bed(tmp_path, hosts=hosts) as bed:
        for name, by_torchrun in (("ours", False), ("torchrun", True)):
            job = Job(bed, inputs, name, overrides=SFT)
            job.train(bed.nodes, endpoint="" if by_torchrun else "node-a", torchrun=by_torchrun)
            assert set(job.wait(TIMEOUT).values()) == {0}, job.all_logs()


def test_host_names_that_do_not_resolve(tmp_path, inputs):
    with Bed(tmp_path, hosts={"node-a": "", "node-b": ""}) as bed:
        job = Job(bed, inputs, "named", overrides=SFT)
        job.train(bed.nodes, endpoint="node-a")
        assert set(job.wait(60).values()) == {2}
        for name in ("node-a", "node-b"):
            (line,) = lines(job, name)
            assert line.startswith(f"error: --rdzv-endpoint=node-a does not resolve on {name}"), line
        job = Job(bed, inputs, "address", overrides=SFT)
        job.train(bed.nodes)
        assert set(job.wait(TIMEOUT).values()) == {0}, job.all_logs()


def test_interface_that_cannot_work(bed: Bed, inputs):
    for number, (name, message) in enumerate((("lo", "loopback cannot reach"), ("eth7", "no such interface"))):
        job = Job(bed, inputs, f"interface{number}", overrides=SFT)
        job.train(bed.nodes, environment={"GLOO_SOCKET_IFNAME": name})
        assert set(job.wait(TIMEOUT).values()) == {2}, job.all_logs()
        (line,) = lines(job, "node-a")
        assert f"GLOO_SOCKET_IFNAME={name}" in line and message in line, line


def test_a_mistake_on_the_second_node(bed: Bed, inputs):
    """Its model is missing, once where the launcher sees it and once where only its ranks do (plain torchrun)."""
    a, b = bed.nodes
    a.run(["cp", "-r", inputs / "model", bed.disk / "model"])
    for name, by_torchrun in (("ours", False), ("torchrun", True)):
        job = Job(bed, inputs, name, overrides={**SFT, "model.path": str(bed.disk / "model")})
        job.train([a, b], torchrun=by_torchrun)
        codes = job.wait(TIMEOUT)
        if not by_torchrun:
            assert codes == {"node-a": 2, "node-b": 2}, job.all_logs()
            (line,) = lines(job, "node-b")
            assert "disk/model" in line
        assert len(re.findall(r"^error: node-b: model.path: .*disk/model", job.log(a), re.MULTILINE)) == 1, job.log(a)


def test_files_that_differ(bed: Bed, inputs):
    a, b = bed.nodes
    for node in (a, b):
        node.run(["cp", "-r", inputs, bed.disk / "inputs"])
    b.run(["sed", "-i", "1d", bed.disk / "inputs" / "train.jsonl"])
    data = bed.disk / "inputs" / "train.jsonl"
    job = Job(bed, inputs, "data", overrides={**SFT, "data.train": str(data)})
    job.train([a, b])
    assert job.wait(TIMEOUT) == {"node-a": 2, "node-b": 2}, job.all_logs()
    assert lines(job, "node-a") == [
        f"error: {data} holds other rows on node-a and node-b; give every node the same data"
    ]
    assert lines(job, "node-b") == []


def test_settings_that_differ(bed: Bed, inputs):
    a, b = bed.nodes
    job = Job(bed, inputs, "settings", overrides=SFT)
    job.train([a], number=2)
    job.overrides.append("--seed=4")
    job.train([b], number=2, endpoint=a.address)
    assert job.wait(TIMEOUT) == {"node-a": 2, "node-b": 2}, job.all_logs()
    (line,) = lines(job, "node-a")
    assert "the configuration differs between node-a and node-b" in line


def test_output_that_is_not_shared(bed: Bed, inputs):
    job = Job(bed, inputs, "local", overrides={**SFT, "output": str(bed.disk / "run")})
    job.train(bed.nodes)
    assert job.wait(TIMEOUT) == {"node-a": 2, "node-b": 2}, job.all_logs()
    (line,) = lines(job, "node-a")
    assert "is not shared: node-b does not see" in line


def test_room_on_the_second_node(tmp_path, inputs):
    """A full disk for temporary files, and too little shared memory."""
    for number, (size, folder) in enumerate((("tmp", "/tmp"), ("shm", "/dev/shm"))):
        (tmp_path / str(number)).mkdir()
        with Bed(tmp_path, sizes={"node-b": {size: "8m"}}) as bed:
            job = Job(bed, inputs, f"small-{size}", overrides=SFT)
            job.train(bed.nodes)
            assert job.wait(TIMEOUT) == {"node-a": 2, "node-b": 2}, job.all_logs()
            (line,) = lines(job, "node-a")
            assert re.search(rf"node-b: {folder} has \d+ MiB free", line), line


def test_a_node_that_never_comes(bed: Bed, inputs):
    a, b = bed.nodes
    job = Job(bed, inputs, "alone", overrides=SFT)
    job.train([a], "--join-timeout=5", number=2)
    assert job.wait(60) == {"node-a": 1}
    assert lines(job, "node-a") == ["error: only 1 of 2 nodes came within 5 s: node-a"]
    job = Job(bed, inputs, "headless", overrides=SFT)
    job.train([b], "--join-timeout=5", number=2, endpoint=a.address)
    assert job.wait(60) == {"node-b": 1}
    (line,) = lines(job, "node-b")
    assert "node-b: the first node, --rdzv-endpoint=10.77.0.1:29400" in line and "has not answered for 5 s" in line


def test_nodes_of_two_runs(bed: Bed, inputs):
    a, b = bed.nodes
    job, other = Job(bed, inputs, "mine", overrides=SFT), Job(bed, inputs, "yours", overrides=SFT)
    job.train([a], "--join-timeout=20", number=2)
    other.train([b], number=2, endpoint=a.address)
    assert other.wait(60) == {"node-b": 2}
    (line,) = lines(other, "node-b")
    assert "is that of the run 'mine'" in line and "--rdzv-id='yours'" in line
    assert job.wait(60) == {"node-a": 1}


def test_a_port_in_use(bed: Bed, inputs):
    a, b = bed.nodes
    serve = "import socket, time; s = socket.create_server(('', 29400)); time.sleep(300)"
    holder = a.start([sys.executable, "-c", serve])
    job = Job(bed, inputs, "port", overrides=SFT)
    job.train([a], number=2)
    assert job.wait(120) == {"node-a": 2}
    (line,) = lines(job, "node-a")
    assert line.startswith("error: port 29400 of node-a is in use")
    holder.kill()


def test_two_nodes_with_one_rank(bed: Bed, inputs):
    """By plain torchrun; our launcher numbers the nodes by itself."""
    job = Job(bed, inputs, "ranks", overrides=SFT)
    variables = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x"}
    variables |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500"}
    rank = ["python", "-m", "megatron_entropy", "train", job.config, *job.overrides]
    a, b = bed.nodes
    store = "import torch.distributed as d, time; s = d.TCPStore('10.77.0.1', 29500, is_master=True, "
    holder = a.start(["python", "-c", store + "wait_for_workers=False); time.sleep(300)"])
    variables["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    for node in (a, b):
        job.processes[node.name] = node.start(rank, log=job.folder / f"{node.name}.log", environment=variables)
    assert set(job.wait(TIMEOUT).values()) == {2}, job.all_logs()
    assert any("two processes have rank 0, on" in line for name in ("node-a", "node-b") for line in lines(job, name))
    holder.kill()


def test_clocks_that_differ(bed: Bed, inputs):
    """The namespaces share a clock, so the second node's Python is given another one: emulated."""
    clock = bed.folder / "clock"
    clock.mkdir()
    (clock / "sitecustomize.py").write_text("import time; now = time.time; time.time = lambda: now() + 3600\n")
    a, b = bed.nodes
    job = Job(bed, inputs, "clocks", overrides=SFT)
    job.train([a], number=2)
    job.train([b], number=2, endpoint=a.address, python_path=clock)
    assert job.wait(TIMEOUT) == {"node-a": 0, "node-b": 0}, job.all_logs()
    assert "the clock of node-b is +3600 s from that of node-a" in job.log(b)


@pytest.mark.parametrize(
    ("counts", "ranks", "message"),
    [
        ((2, 1), 2, "node-b: this machine has 1 GPUs for 2 ranks; start as many ranks as it has GPUs"),
        ((1, 0), 1, "node-a has 1 GPUs and node-b has 0; all ranks need a GPU, or none"),
    ],
)
def test_nodes_with_other_numbers_of_gpus(bed: Bed, inputs, counts, ranks, message):
    """The nodes have none, so each one's Python is told a number: emulated."""
    job = Job(bed, inputs, "gpus", overrides={**SFT, "actor.parallel.dp": str(2 * ranks)})
    for node, count in zip(bed.nodes, counts, strict=True):
        folder = bed.folder / f"python.{node.name}"
        folder.mkdir()
        code = f"from megatron_entropy.launch import preflight; preflight.count_gpus = lambda: {count}\n"
        (folder / "sitecustomize.py").write_text(code)
        job.train([node], number=2, endpoint=bed.nodes[0].address, python_path=folder)
    assert job.wait(TIMEOUT) == {"node-a": 2, "node-b": 2}, job.all_logs()
    assert lines(job, "node-a") == [f"error: {message}"]
