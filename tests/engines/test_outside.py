"""A method, a verifier and a data format from a folder outside the repository train with the real engines.

Proves also that a run on one machine listens on the loopback interface only.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

from megatron_entropy.monitor.metrics import read_metrics

ROOT = Path(__file__).parents[2]

CONFIG = """
output = "{folder}/run"
steps = 2
[model]
path = "{folder}/inputs/model"
[data]
train = ["{folder}/train.jsonl"]
format = "my_schema:SCHEMA"
max_prompt_tokens = 16
[reward]
verifier = "my_verifier:grade"
[rollout]
max_response_tokens = 24
[method]
name = "my_method:MyConfig"
scale = 0.1
[batch]
prompts = 4
samples = 4
"""


def listening(process: psutil.Process) -> set[str]:
    """Addresses on which a process and its descendants listen."""
    found = set()
    for member in [process, *process.children(recursive=True)]:
        try:
            connections = member.net_connections(kind="tcp")
        except psutil.Error:  # it ended meanwhile
            continue
        found |= {connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN}
    return found


def test_extensions_from_outside_train(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "kernels", tmp_path / "mine"]))}
    environment.pop("RAY_ADDRESS", None)
    shutil.copytree(ROOT / "tests" / "outside", tmp_path / "mine")
    script = ROOT / "examples" / "make_arithmetic.py"
    sizes = ["--train", "64", "--eval", "16"]
    subprocess.run([sys.executable, script, "--out", tmp_path / "inputs", *sizes], check=True, env=environment)
    questions = [json.loads(line) for line in (tmp_path / "inputs" / "train.jsonl").read_text().splitlines()]
    lines = [json.dumps({"problem": row["question"], "result": row["answer"]}) for row in questions]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    config = tmp_path / "run.toml"
    config.write_text(CONFIG.format(folder=tmp_path))
    command = [sys.executable, "-m", "megatron_entropy", "train", str(config)]
    process = subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    addresses = set()
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            addresses |= listening(psutil.Process(process.pid))
        time.sleep(0.5)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-3000:]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["policy/entropy_bonus"] > 0 for row in rows[1:] if row["reward/mean"])
    assert 'name = "my_method:MyConfig"' in (tmp_path / "run" / "config.toml").read_text()
    assert addresses and not [a for a in addresses if not re.fullmatch(r"127\..*|::1|::ffff:127\..*", a)], addresses
