"""Weights cross the network once for each node, however many engines it has."""

import sys
from pathlib import Path

import pytest
from bed import Bed, Node

SCRIPT = Path(__file__).with_name("transfer.py")
MODEL_BYTES = 16 * 1024 * 2048 * 4


def received(node: Node) -> int:
    """Bytes that have come in over the node's cable."""
    (line,) = [line for line in node.run(["cat", "/proc/net/dev"]).splitlines() if "eth0:" in line]
    return int(line.split(":")[1].split()[0])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("here", [0, 1], ids=["engines on the other node", "one beside the trainer"])
def test_the_network_carries_the_model_once_for_each_node(bed: Bed, tmp_path, here):
    a, b = bed.nodes
    receivers = here + 3
    nodes = [a, *[a] * here, *[b] * 3]
    before = received(b)
    command = [sys.executable, SCRIPT, tmp_path / "info.json"]
    processes = [node.start([*command, rank, receivers]) for rank, node in enumerate(nodes)]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(nodes), "\n".join(outputs)
    carried = received(b) - before
    print(f"{receivers} engines: {carried / MODEL_BYTES:.3f} models to node-b in {outputs[0].split()[-1]} s")
    assert 1 <= carried / MODEL_BYTES < 1.05
