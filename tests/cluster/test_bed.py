"""The nodes are machines as far as a run can tell: names, addresses, processes, memory and disks of their own.

Also a run with all ranks on one node whose host name leads to its address on the network, as on most clusters.
"""

import pytest
from bed import Bed, Node
from job import SFT, Job

CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 9), timeout=2)
except OSError as error:
    print(type(error).__name__)
"""


def reach(a: Node, b: Node) -> str:
    """`ConnectionRefusedError` when the other node answers, `TimeoutError` when it does not."""
    return a.run(["python", "-c", CONNECT, b.name]).strip()


def test_nodes_are_separate(bed: Bed):
    a, b = bed.nodes
    assert [node.run(["hostname"]).strip() for node in bed.nodes] == ["node-a", "node-b"]
    assert reach(a, b) == reach(b, a) == "ConnectionRefusedError"
    for folder in ("/tmp", "/dev/shm", str(bed.disk)):
        a.run(["touch", f"{folder}/mine"])
        b.run(["test", "!", "-e", f"{folder}/mine"])
    a.run(["touch", bed.folder / "ours"])
    b.run(["test", "-e", bed.folder / "ours"])
    assert a.run(["readlink", "/proc/self/ns/pid"]) != b.run(["readlink", "/proc/self/ns/pid"])
    b.cut()
    assert reach(a, b) != "ConnectionRefusedError"
    b.restore()
    assert reach(a, b) == "ConnectionRefusedError"
    b.start(["sleep", "100"])
    b.kill()
    assert b.processes() == []
    assert reach(a, bed.boot("node-b")) == "ConnectionRefusedError"


@pytest.mark.timeout(300)
def test_all_ranks_on_a_node_with_a_real_name(bed: Bed, inputs):
    """torchrun's ranks look for rank 0 under the host name; the run listens on loopback only."""
    job = Job(bed, inputs, "one", overrides=SFT)
    job.train_alone(bed.nodes[0])
    assert job.wait(240) == {"node-a": 0}, job.all_logs()
