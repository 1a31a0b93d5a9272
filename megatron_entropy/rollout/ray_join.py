"""Why a Ray cluster could not be joined: Ray says "Failed to connect to Ray cluster" for every reason."""

from __future__ import annotations

import socket
from typing import Any

import ray

from megatron_entropy.distributed.network import host_name

CONNECT_TIMEOUT = 5.0
"""Seconds until the head must accept a connection."""
REPLY_TIMEOUT = 10.0
"""Seconds until it must say which Ray it is."""
TOKEN = (
    "it wants another authentication token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a copy of the token of "
    "its head (~/.ray/auth_token there) on every node, for ray start and for the run"
)


def find_problem(address: str) -> str:
    """Ask the head of a cluster that could not be joined.

    Args:
        address: `HOST:PORT`, the value of RAY_ADDRESS.
    Returns:
        What is wrong and what to do, in one line; the empty text if the head answers as it should.
    """
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        return "write HOST:PORT of its head, as ray start --head prints it"
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT).close()
    except OSError as error:
        reason = error.strerror or str(error)
        return f"{host_name()} cannot reach it ({reason}); start its head there with ray start --head --port={port}"
    return _ask(address)


def _ask(address: str) -> str:
    import grpc
    from ray._private.gcs_utils import create_gcs_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    messages: Any = gcs_service_pb2
    channel: Any = create_gcs_channel(address)  # it sends the token, where this process has one
    with channel:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            version = stub.CheckAlive(messages.CheckAliveRequest(), timeout=REPLY_TIMEOUT).ray_version
        except grpc.RpcError as error:
            code = error.code()  # type: ignore[attr-defined]
            return (
                TOKEN if code == grpc.StatusCode.UNAUTHENTICATED else f"what answers there is no head of Ray ({code})"
            )
    if version != ray.__version__:
        return f"it runs Ray {version} and {host_name()} has {ray.__version__}; install the same version everywhere"
    return ""
