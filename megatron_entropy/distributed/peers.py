"""What the ranks tell one another beside their process groups, over torchrun's key-value store.

Before the process groups exist the ranks meet here: rank 0 compares what they bring, so that a difference between
machines is one line instead of a hang. Later the first rank that fails leaves its reason here, and the others, which
only see a broken connection, report that reason.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from threading import Thread
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_entropy.distributed import loopback, network
from megatron_entropy.errors import ConfigError, Fault, UserError

log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 30.0
"""Seconds until the store, which torchrun's first node has opened, must answer."""
CLOCK_TOLERANCE = 5.0
"""Seconds that the machines' clocks may differ before a warning."""
MEETING_TIMEOUT = 600.0
"""Seconds between the first rank's arrival and the last one's."""
PREFIX = "megatron_entropy"
"""Of all keys, in the store that the agents of torchrun use too."""
FAILURE = "failure"

Result = TypeVar("Result")


class Peers:
    """This rank's place in the meeting.

    `node`: name of this machine. `nodes`: name of each rank's machine, after `meet`. `is_single_machine`: all ranks
    can map one another's memory. `culprit`: the rank that found the mistake which `meet` raised.
    """

    def __init__(self) -> None:
        """Connect to the store.

        Raises:
            ConfigError: `MASTER_ADDR` does not resolve here, or nothing answers there.
        """
        loopback.activate()
        self.rank = int(os.environ["RANK"])
        self.world_size = int(os.environ["WORLD_SIZE"])
        self.node = network.host_name()
        self.nodes: list[str] = [self.node] * self.world_size
        self.is_single_machine = True
        self.culprit: int | None = None
        self._master = network.resolve(os.environ["MASTER_ADDR"], setting="MASTER_ADDR")
        try:
            store = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=CONNECT_TIMEOUT)))[0]
        except (RuntimeError, dist.DistError):
            raise ConfigError(
                f"nothing answers {self.node} at MASTER_ADDR={os.environ['MASTER_ADDR']} ({self._master}), "
                f"MASTER_PORT={os.environ['MASTER_PORT']} within {CONNECT_TIMEOUT:.0f} s; see that the name leads to "
                "the first node (torchrun --local-addr=ADDRESS names it by an address) and that the port is open"
            ) from None

        self.store: Any = dist.PrefixStore(PREFIX, store)

    def meet(self, facts: dict[str, Any], compare: Callable[[Sequence[dict[str, Any]]], None]) -> None:
        """Wait for all ranks, let rank 0 compare their facts, and choose the network interface; a collective.

        Args:
            facts: plain values. `error`: a user's mistake that this rank has found, or None.
            compare: called on rank 0 with the facts of every rank, each with `rank` and `node`; raises a `UserError`.
        Raises:
            UserError: on every rank, for the first rank with an error, what `compare` raised, or two processes with one
                rank.
            Fault: a rank has not come in time.
        """
        own = {**facts, "rank": self.rank, "node": self.node, "machine": network.machine_id(), "master": self._master}
        if self.store.add(f"count/{self.rank}", 1) > 1:
            other = json.loads(self.store.get(f"facts/{self.rank}"))["node"]
            message = f"two processes have rank {self.rank}, on {other} and {self.node}; give every node its own rank"
            self.store.set("verdict", json.dumps({"error": message, "culprit": 0, "nodes": self.nodes}))
            raise ConfigError(message)
        self.store.set(f"facts/{self.rank}", json.dumps(own))
        if self.rank == 0:
            self._judge(compare)
        self._wait(["verdict"])
        verdict = json.loads(self.store.get("verdict"))
        self.nodes = verdict["nodes"]
        if verdict["error"]:
            self.culprit = verdict["culprit"]
            raise (Fault if verdict.get("fault") else ConfigError)(verdict["error"])
        self.is_single_machine = verdict["single"]
        ahead = time.time() - verdict["time"]
        if abs(ahead) > CLOCK_TOLERANCE:
            log.warning("the clock of %s is %+.0f s from that of %s; set the clocks", self.node, ahead, self.nodes[0])
        if not self.is_single_machine:
            reachable = verdict["address"] if network.is_loopback(self._master) else self._master
            network.choose_interface(network.address_towards(reachable))

    def _judge(self, compare: Callable[[Sequence[dict[str, Any]]], None]) -> None:
        """Gather the facts of all ranks and publish the verdict."""
        verdict: dict[str, Any] = {"error": None, "culprit": 0, "nodes": self.nodes}
        try:
            self._wait([f"facts/{rank}" for rank in range(self.world_size)])
            if self.store.check(["verdict"]):
                return  # another process has this rank, and has said so
            everyone = [json.loads(self.store.get(f"facts/{rank}")) for rank in range(self.world_size)]
            verdict["nodes"] = [facts["node"] for facts in everyone]
            several = len({facts["node"] for facts in everyone}) > 1
            for facts in everyone:
                if facts["error"]:
                    verdict["culprit"] = facts["rank"]
                    raise ConfigError(f"{facts['node']}: {facts['error']}" if several else facts["error"])
            compare(everyone)
            addresses = [facts["master"] for facts in everyone if not network.is_loopback(facts["master"])]
            verdict["single"] = len({tuple(facts["machine"]) for facts in everyone}) == 1
            verdict["address"] = addresses[0] if addresses else ""
            if not verdict["single"] and not addresses:
                raise ConfigError(
                    f"MASTER_ADDR={os.environ['MASTER_ADDR']} leads to {self._master} on every node, which other nodes "
                    "cannot reach; start torchrun with --local-addr=ADDRESS on every node"
                )
        except (UserError, Fault) as error:
            verdict |= {"error": str(error), "fault": isinstance(error, Fault)}
        if not self.store.check(["verdict"]):  # as above, while this rank waited
            self.store.set("verdict", json.dumps(verdict | {"time": time.time()}))

    def _wait(self, keys: Sequence[str]) -> None:
        """Wait until all keys exist, or the verdict does."""
        deadline = time.monotonic() + MEETING_TIMEOUT
        while missing := [key for key in keys if not self.store.check([key])]:
            if self.store.check(["verdict"]):
                return
            if time.monotonic() > deadline:
                ranks = ", ".join(key.rpartition("/")[2] for key in missing)
                raise Fault(f"waited {MEETING_TIMEOUT:.0f} s for {ranks}; see the output of the other nodes")
            time.sleep(0.05)

    def post_failure(self, failure: dict[str, Any]) -> dict[str, Any]:
        """Leave the reason of this rank's end for the others; returns the first one that was left."""
        first = in_time(lambda: self.store.compare_set(FAILURE, "", json.dumps(failure)), 3.0)
        return json.loads(first) if first else failure

    def failure(self, timeout: float) -> dict[str, Any] | None:
        """Return the reason that the first failed rank left, None when there is none after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            if in_time(lambda: self.store.check([FAILURE]), deadline - time.monotonic()):
                return json.loads(in_time(lambda: self.store.get(FAILURE), 3.0) or "null")
            if time.monotonic() > deadline:
                return None
            time.sleep(0.1)


def in_time(function: Callable[[], Result], timeout: float) -> Result | None:
    """Call a function of the store, which may wait for a lost machine; None when it fails or takes too long."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    Thread(target=run, daemon=True, name="store").start()
    try:
        return future.result(max(timeout, 0.1))
    except (FutureTimeout, RuntimeError, dist.DistError):
        return None
