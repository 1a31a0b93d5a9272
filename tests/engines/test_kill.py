"""Four random kills of a real run (tools/kill_test.py can do more).

Proves: when the launcher, rank 0, an engine or a verifier worker is killed, and a checkpoint is damaged after a kill,
the run survives or resumes and ends with bit-identical parameters and metrics; no process is left; every run that could
gave the reason in one line.
The comparison is exact because nothing in a run may depend on when it was interrupted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_killed_runs_end_like_undisturbed_ones(tmp_path):
    out = tmp_path / "report.json"
    # With this seed one run gets all four kills, and its newest checkpoint is damaged when rank 0 is killed.
    command = [sys.executable, ROOT / "tools" / "kill_test.py", "--kills", "4", "--seed", "1883", "--out", out]
    done = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    report = json.loads(out.read_text())
    assert len(report["kills"]) == 4 and report["broken"] == [] and report["left_behind"] == []
    assert all(run["equal_parameters"] and run["equal_metrics"] for run in report["runs"])
    assert {kill["target"]: kill["outcome"] for kill in report["kills"]} == {
        "launcher": "resumed",
        "engine": "survived",
        "verifier worker": "survived",
        "checkpoint": "resumed",
    }
