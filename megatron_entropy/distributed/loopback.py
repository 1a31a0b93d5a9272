"""Keep the network sockets of a run on one machine to the loopback interface.

torch's `TCPStore` listens on all interfaces, also where torchrun or vLLM creates it. `activate` replaces the class, in
the few modules that have imported it, by one that hands it a socket bound to 127.0.0.1. Gloo and Ray read
environment variables, which engines inherit. `megatron-entropy train` activates it; plain torchrun on several machines
does not.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

VARIABLE = "MEGATRON_ENTROPY_LOOPBACK"
"""Set for all processes of a run on one machine."""

_MODULES = (
    "torch.distributed",
    "torch.distributed.rendezvous",
    "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend",
    "vllm.distributed.utils",
)


def request() -> None:
    """Ask this process and those it starts to use loopback; the user's own choice of a gloo interface stays."""
    os.environ[VARIABLE] = "1"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # Ray's switch for "this machine only", the default elsewhere than on Linux: its servers then listen on 127.0.0.1.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


def activate() -> None:
    """Bind the stores of this process to 127.0.0.1, where it is requested; may be called again after imports."""
    if VARIABLE not in os.environ:
        return
    import torch.distributed as dist

    original: Any = dist.TCPStore
    if not hasattr(original, "is_on_loopback"):

        class LoopbackStore(original):
            """A `TCPStore` whose server listens on 127.0.0.1."""

            is_on_loopback = True

            def __init__(self, host_name: str, port: int, *arguments: Any, **options: Any) -> None:
                is_master = options.get("is_master", arguments[1] if len(arguments) > 1 else False)
                if not is_master or options.get("master_listen_fd") is not None or not options.get("use_libuv", True):
                    super().__init__(host_name, port, *arguments, **options)
                    return
                try:
                    server = socket.create_server(("127.0.0.1", port), backlog=1024)
                except OSError as error:
                    raise dist.DistNetworkError(str(error)) from error
                options["master_listen_fd"] = server.fileno()
                super().__init__("127.0.0.1", server.getsockname()[1], *arguments, **options)
                server.detach()  # the store closes it

        dist.TCPStore = LoopbackStore  # type: ignore[misc]
    for name in _MODULES:
        if hasattr(sys.modules.get(name), "TCPStore"):
            sys.modules[name].TCPStore = dist.TCPStore  # type: ignore[attr-defined]
