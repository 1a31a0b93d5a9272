"""Runs over two nodes, with an engine on each: the numbers are those of one machine with the same layout.

Equal bit for bit: the ranks reduce in the same order, the engines get the same bytes, and a sample's seed does not
depend on the engine that draws it.
"""

import pytest
from bed import Bed
from job import Job


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("layout", ["dp", "tp", "pp"])
def test_two_nodes_compute_what_one_machine_does(bed: Bed, inputs, layout):
    one = Job(bed, inputs, "one", layout=layout)
    one.train_alone(bed.nodes[0])
    assert one.wait(600) == {"node-a": 0}, one.all_logs()
    two = Job(bed, inputs, "two", layout=layout)
    two.start_ray(bed.nodes)
    two.train(bed.nodes)
    two.wait_for(bed.nodes[0], "step 1/", 600)
    engines = [[process.name() for process in node.processes() if "VllmEngine" in process.name()] for node in bed.nodes]
    assert set(two.wait(600).values()) == {0}, two.all_logs()
    two.stop_ray()
    assert [len(names) for names in engines] == [1, 1], engines
    assert all(row["train/grad_norm"] > 0 for row in one.metrics() if row["step"])
    assert two.metrics() == one.metrics()
