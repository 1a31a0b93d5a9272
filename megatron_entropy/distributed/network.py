"""The network interface of a run: the one that leads to the first machine, unless a variable names another.

Gloo by default uses the address that this machine's host name leads to. That is often loopback (`127.0.1.1 myname` in
`/etc/hosts`), and ranks on other machines cannot connect to it.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path

import psutil

from megatron_entropy.errors import ConfigError

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


def host_name() -> str:
    """Name of this machine for messages."""
    return socket.gethostname()


def machine_id() -> list[str]:
    """Return what two processes share that can map one another's memory: the kernel and the container."""
    return [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]


def resolve(name: str, *, setting: str) -> str:
    """Return the IPv4 address of a host name.

    Args:
        setting: what holds the name, for the message.
    Raises:
        ConfigError: the name does not resolve.
    """
    try:
        return str(socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ConfigError(
            f"{setting}={name} does not resolve on {host_name()} ({error.strerror}); add it to /etc/hosts of every "
            "node, or use an address"
        ) from None


def is_loopback(address: str) -> bool:
    """Whether an address leads to the machine that asks."""
    return ipaddress.ip_address(address).is_loopback


def address_towards(address: str) -> str:
    """Find this machine's address on its route to `address`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # a datagram socket only chooses a route and sends nothing
        return probe.getsockname()[0]


def choose_interface(address: str) -> str:
    """Let gloo and NCCL use the interface that has this address; the user's own choice stays.

    Returns:
        The interface that gloo uses.
    Raises:
        ConfigError: the user's choice does not exist here, or is loopback and cannot reach other machines.
    """
    interfaces = psutil.net_if_addrs()
    for variable in (GLOO, NCCL):
        for name in os.environ.get(variable, "").split(","):
            if variable == GLOO and name and name not in interfaces:
                raise ConfigError(
                    f"{variable}={name}: {host_name()} has no such interface; it has {', '.join(interfaces)}"
                )
            if name.removeprefix("=") == "lo":
                raise ConfigError(
                    f"{variable}={name} on {host_name()}: loopback cannot reach the other nodes; unset it, or name one "
                    f"of {', '.join(other for other in interfaces if other != 'lo')}"
                )
    found = [name for name, addresses in interfaces.items() if any(a.address == address for a in addresses)]
    if found:
        os.environ.setdefault(GLOO, found[0])
        os.environ.setdefault(NCCL, f"={found[0]}")
    elif GLOO not in os.environ:
        raise ConfigError(
            f"{host_name()} has no interface with the address {address}, at which it reaches the first node; name one "
            f"with {GLOO} and {NCCL}"
        )
    return os.environ[GLOO]
