"""A Slurm cluster on the nodes of a `Bed`: munged and slurmd on each, slurmctld on the first."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bed import IS_ROOT, Bed, Node
from job import wait_for

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scancel", "scontrol")
FOLDERS = "/usr/sbin:/usr/bin:/sbin:/bin"
NODE_TIMEOUT = 10
"""Seconds until slurmctld takes a silent node for dead."""
POLL = 0.5
"""Seconds between two questions to Slurm, each of which is a process."""
CONF = """
ClusterName=bed
SlurmctldHost={head.name}({head.address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=/tmp/munge.socket
StateSaveLocation=/tmp/slurmctld
SlurmdSpoolDir=/tmp/slurmd
SlurmctldPidFile=/tmp/slurmctld.pid
SlurmdPidFile=/tmp/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout={timeout}
KillWait=5
GresTypes=gpu
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """Return why Slurm cannot be started here; empty if it can."""
    if missing := [program for program in PROGRAMS if shutil.which(program, path=FOLDERS) is None]:
        return f"{', '.join(missing)} is not installed (Debian: slurmctld slurmd slurm-client munge)"
    return "" if IS_ROOT else "slurmd needs root"


class Slurm:
    """Slurm's daemons on all nodes; they end with the nodes."""

    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        self.head = bed.nodes[0]
        self.folder = bed.folder / "slurm"
        self.folder.mkdir()
        self._environment = {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": self._path()}
        (self.folder / "munge.key").write_bytes(bytes(range(32)) * 4)
        (self.folder / "munge.key").chmod(0o400)
        nodes = [f"NodeName={n.name} NodeAddr={n.address} CPUs=2 RealMemory=8000 Gres=gpu:8" for n in bed.nodes]
        content = CONF.format(head=self.head, folder=self.folder, timeout=NODE_TIMEOUT, nodes="\n".join(nodes))
        (self.folder / "slurm.conf").write_text(content)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for number in range(8):
            (self.folder / f"gpu{number}").touch()  # slurmd counts files, which devices they are does not matter to it
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        for node in bed.nodes:
            self.start(node)
        wait_for(self._is_up, 60, "all nodes of Slurm", self.logs, interval=POLL)

    def start(self, node: Node) -> None:
        """Start the daemons of a node."""
        conf = self.folder / "slurm.conf"
        munged = ["munged", "-F", "--force", f"--key-file={self.folder / 'munge.key'}", "--socket=/tmp/munge.socket"]
        munged += ["--pid-file=/tmp/munged.pid", "--seed-file=/tmp/munged.seed", "--log-file=/tmp/munged.log"]
        node.run(["mkdir", "-p", "/tmp/slurmctld", "/tmp/slurmd"])
        self._spawn(node, munged)
        wait_for(lambda: self._exists(node, "/tmp/munge.socket"), 20, f"munged on {node.name}", self.logs)
        if node is self.head:
            self._spawn(node, ["slurmctld", "-D", "-f", conf])
        self._spawn(node, ["slurmd", "-D", "-f", conf, "-N", node.name])

    def run(self, *command: object) -> str:
        """Run a client command on the first node."""
        return self.head.run(command, environment=self._environment)

    def submit(self, script: Path, options: Sequence[str], arguments: Sequence[str], **variables: str) -> str:
        """Submit a job; returns its id."""
        environment = self._environment | variables
        return self.head.run(["sbatch", "--parsable", *options, script, *arguments], environment=environment).strip()

    def show(self, job: str) -> dict[str, str]:
        """Return what `scontrol show job` says."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", job)))

    def wait_for_state(self, job: str, *states: str, timeout: float = 400.0) -> str:
        """Wait until a job is in one of these states; a requeued job waits 5 s instead of Slurm's 2 minutes.

        Slurm refuses to start it in the second in which its first start ended.
        """
        is_advanced = False

        def reached() -> bool:
            nonlocal is_advanced
            shown = self.show(job)
            if shown["JobState"] == "PENDING" and shown["Reason"] == "BeginTime" and not is_advanced:
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now+5")
                is_advanced = True
            return shown["JobState"] in states

        wait_for(reached, timeout, f"job {job} in {states}", self.logs, interval=POLL)
        return self.show(job)["JobState"]

    def logs(self) -> str:
        """Return the end of every log, for the message of a failed test."""
        return "\n".join(f"--- {path.name}\n{path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.log")))

    def _path(self) -> str:
        return f"{Path(sys.executable).parent}:{FOLDERS}"

    def _spawn(self, node: Node, command: Sequence[object]) -> subprocess.Popen[str]:
        log = self.folder / f"daemons.{node.name}.log"
        process = node.start(command, log=log, environment=self._environment)
        time.sleep(0.2)
        assert process.poll() is None, log.read_text()
        return process

    def _is_up(self) -> bool:
        return self.run("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * len(self.bed.nodes)

    @staticmethod
    def _exists(node: Node, path: str) -> bool:
        process = node.start(["test", "-e", path])
        return process.wait(10) == 0
