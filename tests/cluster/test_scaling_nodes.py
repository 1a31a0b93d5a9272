"""The scaling benchmark over two nodes: the same command under torchrun, one folder for one and for two nodes."""

import json

import pytest
from bed import ROOT, Bed

TOOL = [str(ROOT / "tools" / "benchmark_scaling.py"), "--repeats", "2", "--tokens", "512", "--total-tokens", "1024"]
PORT = 29500


@pytest.mark.timeout(600)
def test_one_and_two_nodes_in_one_page(bed: Bed):
    out = bed.folder / "scaling"
    for count in (1, 2):
        nodes = bed.nodes[:count]
        processes = []
        for node in nodes:
            options = [f"--nnodes={count}", "--nproc-per-node=1", f"--rdzv-id=scaling{count}", "--rdzv-backend=c10d"]
            options += [f"--rdzv-endpoint={nodes[0].address}:{PORT + count}", f"--local-addr={node.address}"]
            options += [f"--rdzv-conf=is_host={str(node is nodes[0]).lower()}"]
            command = ["torchrun", *options, *TOOL, "--out", str(out)]
            processes.append(node.start(command, log=bed.folder / f"{count}.{node.name}.log"))
        codes = [process.wait(280) for process in processes]
        logs = "\n".join(path.read_text()[-2000:] for path in bed.folder.glob(f"{count}.*.log"))
        assert codes == [0] * count, logs
    rows = json.loads((out / "scaling.json").read_text())["rows"]
    assert [(row["case"]["nodes"], row["case"]["ranks"]) for row in rows] == [(1, 1)] * 6 + [(2, 2)] * 6
    for row in rows:
        moved = sum(value for name, value in row["values"].items() if name.endswith(" bytes"))
        assert (moved > 0) == (row["case"]["ranks"] == 2), row
    page = (out / "README.md").read_text()
    assert "| 2 | 2 | update |" in page and (out / "weak.png").exists() and (out / "strong.png").exists()
    print(page)
