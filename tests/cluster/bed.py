"""Nodes on one machine: Linux namespaces that act as machines, joined by a bridge.

A node has its own address, host name, process ids, shared memory, `/tmp` and disk, and shares one folder with the other
nodes. It needs root or user namespaces, and `ip` (iproute2), `unshare` and `nsenter` (util-linux).

    with Bed(folder) as bed:
        a, b = bed.nodes
        process = b.start(["torchrun", ...])
        a.cut(); a.restore(); b.kill()

What it is not: the nodes share one kernel, one clock and the machine's cores, and the network has no delay and no loss.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
NETWORK = "10.77.0"
SPACES = ("--uts", "--ipc", "--pid", "--mount", "--net")
IS_ROOT = os.geteuid() == 0

# Process 1 of a node. It is bash, which reaps orphans. What must be seen in the node and lies under /tmp is bound aside
# while the node gets its own /tmp.
INIT = """
set -e
hostname {name}
mount --make-rprivate /
mount -t tmpfs -o size={shm} tmpfs /dev/shm
number=0
for path in {visible}; do
    case $path in /tmp/*) number=$((number + 1)); mkdir /dev/shm/.aside$number
        mount --rbind $path /dev/shm/.aside$number;;
    esac
done
mount -t tmpfs -o size={tmp},mode=1777 tmpfs /tmp
number=0
for path in {visible}; do
    case $path in /tmp/*) number=$((number + 1)); mkdir -p $path; mount --move /dev/shm/.aside$number $path
        rmdir /dev/shm/.aside$number;;
    esac
done
mount -t tmpfs -o size={disk} tmpfs {disk_folder}
mount --bind {hosts} /etc/hosts
ip link set lo up
touch {ready}
while :; do sleep 1000 & wait; done
"""


def why_not() -> str:
    """Return why this machine cannot make nodes; empty if it can."""
    if missing := [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]:
        return f"{', '.join(missing)} is not installed"
    user = [] if IS_ROOT else ["--user", "--map-root-user"]
    inner = "ip link add b0 type bridge && ip link add v0 type veth peer name v1 && mount -t tmpfs tmpfs /tmp"
    probe = ["unshare", *user, "--net", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", inner]
    done = subprocess.run(probe, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    return f"no namespaces with {'root' if IS_ROOT else 'user namespaces'}: {done.stderr.strip().splitlines()[-1:]}"


class Bed:
    """Two or more nodes and the bridge between them.

    Args:
        folder: shared by all nodes, under the same path. `folder/disk` is another folder on every node, its own disk.
        names: host names of the nodes. The addresses are 10.77.0.1, 10.77.0.2, ...
        hosts: `/etc/hosts` of each node by name, where it is not "every node by its address".
        sizes: of `shm`, `tmp` and `disk` by node, as `mount` understands it: `{"node-b": {"shm": "1m"}}`.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str] = ("node-a", "node-b"),
        *,
        hosts: Mapping[str, str] | None = None,
        sizes: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        self.folder = folder.resolve()
        self.disk = self.folder / "disk"
        self._names = names
        self._hosts = dict(hosts or {})
        self._sizes = dict(sizes or {})
        self._own = Path(tempfile.mkdtemp(prefix="bed_", dir=self.folder))
        self._hub: subprocess.Popen | None = None
        self.nodes: list[Node] = []

    def __enter__(self) -> Bed:
        self.disk.mkdir(exist_ok=True)
        try:
            user = [] if IS_ROOT else ["--user", "--map-root-user"]
            self._hub = _spawn(["unshare", *user, "--net", "--mount", "bash", "-c", self._hub_script()])
            _wait_for(self._own / "hub", self._hub)
            for number, name in enumerate(self._names, 1):
                self.nodes.append(self._make_node(number, name))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for node in self.nodes:
            node.kill()
        if self._hub is not None:
            self._hub.kill()
            self._hub.wait()
        shutil.rmtree(self._own, ignore_errors=True)

    def node(self, name: str) -> Node:
        """Return a node by its name."""
        return next(node for node in self.nodes if node.name == name)

    def boot(self, name: str) -> Node:
        """Start a node that was killed again, with an empty disk."""
        position = self._names.index(name)
        self.nodes[position] = self._make_node(position + 1, name)
        return self.nodes[position]

    def _hub_script(self) -> str:
        bridge = "ip link set lo up; ip link add br0 type bridge forward_delay 0; ip link set br0 up"
        return f"{bridge}; touch {self._own / 'hub'}; exec sleep infinity"

    def _make_node(self, number: int, name: str) -> Node:
        assert self._hub is not None
        default = "".join(f"{NETWORK}.{i} {other}\n" for i, other in enumerate(self._names, 1))
        hosts, ready = self._own / f"hosts.{name}", self._own / f"ready.{name}"
        hosts.write_text("127.0.0.1 localhost\n::1 localhost\n" + self._hosts.get(name, default))
        ready.unlink(missing_ok=True)
        sizes = {"shm": "4g", "tmp": "4g", "disk": "1g"} | dict(self._sizes.get(name, {}))
        visible = {str(path) for path in (ROOT, self.folder, Path(sys.prefix), Path(sys.base_prefix))}
        paths = {"disk_folder": self.disk, "hosts": hosts, "ready": ready}
        script = INIT.format(name=name, visible=" ".join(sorted(visible)), **sizes, **paths)
        inside = [*_enter(self._hub.pid, "-m", "-n"), "unshare", *SPACES]
        unshare = _spawn([*inside, "--fork", "--mount-proc", "--kill-child=KILL", "bash", "-c", script])
        _wait_for(ready, unshare)
        init = psutil.Process(unshare.pid).children()[0]
        links = f"""ip link del p{number} 2>/dev/null
            set -e; ip link add p{number} type veth peer name eth0 address 02:00:00:00:00:0{number} netns {init.pid}
            ip link set p{number} master br0 up"""  # the same address after a boot: others remember it
        _run([*_enter(self._hub.pid, "-m", "-n"), "bash", "-c", links])
        node = Node(name, f"{NETWORK}.{number}", unshare, init.pid)
        node.run(["bash", "-c", f"ip addr add {node.address}/24 dev eth0 && ip link set eth0 up"])
        return node


class Node:
    """A machine of a `Bed`. Commands see this checkout and this Python."""

    def __init__(self, name: str, address: str, unshare: subprocess.Popen, pid: int) -> None:
        self.name = name
        self.address = address
        self._unshare = unshare
        self._pid = pid

    def start(
        self, command: Sequence[object], *, log: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command in the node.

        Args:
            log: file for its output; without it the output is piped.
            environment: added to a small standard one.
        """
        variables = {
            "HOME": "/tmp",
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
            "PYTHONUNBUFFERED": "1",
            "RAY_memory_usage_threshold": "0.99",  # the nodes share one machine with whatever else runs on it
        } | dict(environment or {})
        words = [*_enter(self._pid, "-m", "-u", "-i", "-n", "-p"), "env", "-i"]
        words += [f"{key}={value}" for key, value in variables.items()] + [str(word) for word in command]
        output = subprocess.PIPE if log is None else log.open("a")
        try:
            return subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, text=True, cwd=ROOT
            )
        finally:
            if log is not None:
                output.close()  # type: ignore[union-attr]

    def run(self, command: Sequence[object], *, timeout: float = 120.0, **options: object) -> str:
        """Run a command to its end and return its output; a failure is an assertion."""
        process = self.start(command, **options)  # type: ignore[arg-type]
        output, _ = process.communicate(timeout=timeout)
        assert process.returncode == 0, f"{shlex.join(map(str, command))} on {self.name}:\n{output}"
        return output

    @staticmethod
    def signal(process: subprocess.Popen[str], number: int) -> None:
        """Send a signal to a command that `start` started, not to the program that entered the node."""
        for child in psutil.Process(process.pid).children():
            child.send_signal(number)

    def cut(self) -> None:
        """Pull the network cable."""
        self.run(["ip", "link", "set", "eth0", "down"])

    def restore(self) -> None:
        """Plug the network cable in again."""
        self.run(["ip", "link", "set", "eth0", "up"])

    def processes(self) -> list[psutil.Process]:
        """Return the processes of the node, without its init."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            spaces = os.readlink(f"/proc/{self._pid}/ns/pid")
            for process in psutil.process_iter():
                with contextlib.suppress(OSError, psutil.Error):
                    if os.readlink(f"/proc/{process.pid}/ns/pid") == spaces and process.pid != self._pid:
                        if process.name() != "sleep":
                            found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """Return the trainer's ranks, those with the lowest local rank first."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if "LOCAL_RANK" in (variables := process.environ()) and "megatron_entropy" in process.cmdline():
                    found.append((int(variables["LOCAL_RANK"]), process))
        return [process for _, process in sorted(found, key=lambda pair: pair[0])]

    def kill(self) -> None:
        """Pull the plug: every process of the node is killed, and none of its connections is closed."""
        with contextlib.suppress(AssertionError, OSError):
            self.cut()
        self._unshare.send_signal(signal.SIGKILL)
        self._unshare.wait()


def _enter(pid: int, *spaces: str) -> list[str]:
    user = [] if IS_ROOT else ["-U", "--preserve-credentials"]
    return ["nsenter", "-t", str(pid), *user, *spaces, "--"]


def _spawn(command: Sequence[str]) -> subprocess.Popen:
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"


def _wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"no {path.name} after 30 s"
        time.sleep(0.01)
