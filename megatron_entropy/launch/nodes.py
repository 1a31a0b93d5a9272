"""The machines of a run meet before torchrun starts: the first node opens a store, the others come to it.

torchrun's own meeting (`--rdzv-backend=c10d`) compares the nodes' clocks, waits ten minutes without a word for a node
of another run, and names nobody. So the launcher numbers the nodes here and gives torchrun the finished order.
"""

from __future__ import annotations

import datetime
import json
import socket
import time
from dataclasses import dataclass
from typing import Any

from megatron_entropy.distributed import network
from megatron_entropy.errors import ConfigError, Fault

DEFAULT_PORT = 29400
PORT_TIMEOUT = 40.0
"""Seconds that the first node waits for its port, which the agents of an earlier run may hold for a while."""
LEAVE_TIMEOUT = 10.0
"""Seconds that the first node stays for the others after a failure."""
REPLY_TIMEOUT = 30.0
"""Seconds that the first node may take to answer once it has accepted a connection."""


@dataclass(frozen=True)
class NodesSpec:
    """What the command line says about the nodes.

    `count`: number of nodes. `endpoint`: `HOST` or `HOST:PORT` of the first one. `run_id`: equal on all nodes of a run.
    `timeout`: seconds between the first node's arrival and the last one's.
    """

    count: int
    endpoint: str
    run_id: str = ""
    timeout: float = 600.0

    @property
    def host(self) -> str:
        """Name or address of the first node."""
        return self.endpoint.partition(":")[0]

    @property
    def port(self) -> int:
        """Port of the store on the first node.

        Raises:
            ConfigError: it is not a port number.
        """
        text = self.endpoint.partition(":")[2] or str(DEFAULT_PORT)
        if not text.isdigit() or not 0 < int(text) < 2**16:
            raise ConfigError(f"--rdzv-endpoint={self.endpoint}: write HOST:PORT, as in node-1:{DEFAULT_PORT}")
        return int(text)


@dataclass(frozen=True)
class Place:
    """This node's place: its number, the address and port of the first node's store, and the store."""

    number: int
    spec: NodesSpec
    address: str
    store: Any

    def post_failure(self, failure: dict[str, Any]) -> None:
        """Leave a failure for the ranks of the other nodes, which wait for its reason; the first one stays."""
        from megatron_entropy.distributed import peers

        key = f"{peers.PREFIX}/{peers.FAILURE}"
        peers.in_time(lambda: self.store.compare_set(key, "", json.dumps(failure)), 3.0)

    def leave(self) -> None:
        """Let the first node, which owns the store, wait until the others have read why the run ends."""
        from megatron_entropy.distributed import peers

        if self.number:
            peers.in_time(lambda: self.store.add("launch/left", 1), 3.0)
            return
        deadline = time.monotonic() + LEAVE_TIMEOUT
        while time.monotonic() < deadline and self.store.add("launch/left", 0) < self.spec.count - 1:
            time.sleep(0.05)


class EndedElsewhere(Exception):
    """Another node has printed why the run does not start."""


def meet(spec: NodesSpec, *, ranks: int, error: str = "") -> Place:
    """Wait for all nodes, and get this node's place.

    Args:
        ranks: number of ranks that this node starts.
        error: a user's mistake found on this node, which ends all nodes.
    Raises:
        ConfigError: a mistake found on this node or, on the first node, on any; a wrong endpoint, or another run's.
        EndedElsewhere: a mistake found on another node.
        Fault: a node has not come in time.
    """
    address = network.resolve(spec.host, setting="--rdzv-endpoint")
    own = {"name": network.host_name(), "ranks": ranks, "error": error, "head": address}
    if _is_here(spec, address):
        store = _open_store(spec, address)
        return _lead(spec, store, own)
    store = _join_store(spec, address)
    return _follow(spec, store, own)


def _is_here(spec: NodesSpec, address: str) -> bool:
    """Whether this is the first node: whether the endpoint's address is one of its own."""
    if network.is_loopback(address):
        if spec.host in ("localhost", network.host_name(), socket.getfqdn()) or spec.host == address:
            return True
        raise ConfigError(
            f"--rdzv-endpoint={spec.endpoint} leads to {address} on {network.host_name()}, which is this node itself; "
            "use the address of the first node"
        )
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _open_store(spec: NodesSpec, address: str) -> Any:
    import torch.distributed as dist

    deadline = time.monotonic() + PORT_TIMEOUT
    while True:
        try:
            return _store(address, spec, is_master=True)
        except (RuntimeError, dist.DistError) as error:
            if time.monotonic() > deadline:
                text = " ".join(str(error).split())
                reason = "is in use" if "EADDRINUSE" in text else f"cannot be opened ({text[:200]})"
                raise ConfigError(
                    f"port {spec.port} of {network.host_name()} {reason}; end what uses it, or choose another with "
                    "--rdzv-endpoint=HOST:PORT on every node"
                ) from None
            time.sleep(1.0)


def _join_store(spec: NodesSpec, address: str) -> Any:
    import torch.distributed as dist

    deadline = time.monotonic() + spec.timeout
    while True:
        try:
            socket.create_connection((address, spec.port), timeout=5.0).close()
            return _store(address, spec, is_master=False)
        except (OSError, RuntimeError, dist.DistError) as error:
            if time.monotonic() > deadline:
                raise Fault(
                    f"{network.host_name()}: the first node, --rdzv-endpoint={spec.endpoint} ({address}), has not "
                    f"answered for {spec.timeout:.0f} s ({' '.join(str(error).split())[:200]}); start the same command "
                    "there, and see that the port is open"
                ) from None
            time.sleep(1.0)


def _store(address: str, spec: NodesSpec, *, is_master: bool) -> Any:
    """Open or join the store; torchrun in this process shares it (`multi_tenant`)."""
    import torch.distributed as dist

    timeout = datetime.timedelta(seconds=REPLY_TIMEOUT)
    return dist.TCPStore(
        address, spec.port, is_master=is_master, wait_for_workers=False, timeout=timeout, multi_tenant=is_master
    )


def _lead(spec: NodesSpec, store: Any, own: dict[str, Any]) -> Place:
    """Wait for the others, judge, and publish the verdict."""
    store.set("launch/run", json.dumps({"id": spec.run_id, "nodes": spec.count}))
    deadline = time.monotonic() + spec.timeout
    keys = [f"launch/node/{number}" for number in range(1, spec.count)]
    while time.monotonic() < deadline and not all(store.check([key]) for key in keys):
        time.sleep(0.05)
    nodes = [own] + [json.loads(store.get(key)) for key in keys if store.check([key])]
    verdict: dict[str, Any] = {"error": "", "by": 0, "address": own["head"]}
    if bad := [number for number, node in enumerate(nodes) if node["error"]]:
        verdict |= {"error": f"{nodes[bad[0]]['name']}: {nodes[bad[0]]['error']}", "by": bad[0]}
    elif len(nodes) < spec.count:
        names = ", ".join(node["name"] for node in nodes)
        verdict |= {"error": f"only {len(nodes)} of {spec.count} nodes came within {spec.timeout:.0f} s: {names}"}
    elif len({node["ranks"] for node in nodes}) > 1:
        counts = ", ".join(f"{node['name']} {node['ranks']}" for node in nodes)
        verdict |= {"error": f"the nodes start different numbers of ranks: {counts}"}
    elif network.is_loopback(own["head"]):
        verdict["address"] = nodes[1]["head"] if len(nodes) > 1 else own["head"]
    store.set("launch/verdict", json.dumps(verdict))
    if verdict["error"]:
        _wait_for_readers(store, len(nodes) - 1)
        raise (ConfigError if bad or len(nodes) == spec.count else Fault)(verdict["error"])
    return Place(0, spec, verdict["address"], store)


def _wait_for_readers(store: Any, count: int) -> None:
    """Keep the store open until the other nodes have read the verdict."""
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline and store.add("launch/read", 0) < count:
        time.sleep(0.05)


def _follow(spec: NodesSpec, store: Any, own: dict[str, Any]) -> Place:
    """Join, and wait for the verdict of the first node."""
    import torch.distributed as dist

    try:
        run = json.loads(store.get("launch/run"))
        if run["id"] != spec.run_id:
            raise ConfigError(
                f"{own['name']}: --rdzv-endpoint={spec.endpoint} is that of the run {run['id']!r}, this node was "
                f"started with --rdzv-id={spec.run_id!r}; start all nodes of a run with the same id"
            )
        number = store.add("launch/joined", 1)
        if number >= run["nodes"] or run["nodes"] != spec.count:
            raise ConfigError(
                f"{own['name']}: the run at --rdzv-endpoint={spec.endpoint} has {run['nodes']} nodes, this is number "
                f"{number + 1} and was started with --nnodes={spec.count}; end nodes of an earlier run, or correct it"
            )
        store.set(f"launch/node/{number}", json.dumps(own))
        while not store.check(["launch/verdict"]):
            time.sleep(0.05)
        verdict = json.loads(store.get("launch/verdict"))
        store.add("launch/read", 1)
    except (RuntimeError, dist.DistError) as error:
        raise Fault(f"{own['name']}: the first node has gone ({' '.join(str(error).split())[:200]})") from None
    if verdict["error"]:
        if verdict["by"] == number:
            raise ConfigError(own["error"])
        raise EndedElsewhere
    return Place(number, spec, verdict["address"], store)
