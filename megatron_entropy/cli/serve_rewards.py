"""`megatron-entropy serve-rewards`: grade answers for runs, evaluations and CurioSFT's trainer over HTTP."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import ipaddress
import os
import socket
import sys
from collections.abc import Sequence

from megatron_entropy.cli.arguments import Subparsers, byte_size, positive_float, positive_int

DESCRIPTION = """Serve graders over HTTP until Ctrl-C or SIGTERM: POST /grade for reward.url of a run, the protocol of
CurioSFT's reward server (/process_batch, /process_single, /health, /pool_status, /reinit_pool), and /metrics for
Prometheus. Answers are graded in processes that are killed when they hang. Listens on this machine only, unless --host
says otherwise."""
PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
BACKLOG = 2048
"""Connections that may wait to be accepted."""


def add_parser(subparsers: Subparsers) -> None:
    """Define the command line."""
    parser = subparsers.add_parser(
        "serve-rewards", help="grade answers over HTTP", description=DESCRIPTION, allow_abbrev=False
    )
    add = parser.add_argument
    cores = len(os.sched_getaffinity(0))
    add("--host", default="127.0.0.1", help="address to listen on; default: %(default)s")
    add("--port", type=port_number, default=19876, help="0: any free one; default: %(default)s")
    add(
        "--workers", type=positive_int, default=cores, help="processes that grade; default: the cores, %(default)s here"
    )
    add("--timeout", type=positive_float, default=10.0, help="seconds for one answer; default: %(default)s")
    add("--queue", metavar="N", type=positive_int, default=10_000, help="answers that may wait; default: %(default)s")
    add("--max-body", metavar="SIZE", type=byte_size, default="64MiB", help="of a request; default: %(default)s")
    add("--verifier", metavar="NAME", action="append", default=[], help="a further one, package.module:function")
    add("--token", help="requests must bring it; better in the environment variable MEGATRON_ENTROPY_REWARD_TOKEN, "
        "which other users of this machine cannot see")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Bind the socket, say where, and serve."""
    check_packages("serve-rewards", PACKAGES)
    from megatron_entropy.rewards import COMPARISON, TOKEN_VARIABLE, VERIFIERS, load_verifier
    from megatron_entropy.rewards.server import ServerSettings, serve

    for name in args.verifier:
        load_verifier(name)
    settings = ServerSettings(
        verifiers=tuple(dict.fromkeys([*VERIFIERS, COMPARISON, *args.verifier])),
        workers=args.workers,
        timeout=args.timeout,
        queue=args.queue,
        max_body=args.max_body,
        token=args.token or os.environ.get(TOKEN_VARIABLE, "").strip(),
    )
    listener = listen(args.host, args.port)
    address, port = listener.getsockname()[:2]
    if not (settings.token or ipaddress.ip_address(address.partition("%")[0]).is_loopback):
        print(
            f"warning: --host {args.host}: every machine that reaches this address may use the server; set a token "
            f"in {TOKEN_VARIABLE}",
            file=sys.stderr,
        )
    host = f"[{address}]" if ":" in address else address
    print(
        f"reward server on http://{host}:{port} ({args.workers} workers, {args.timeout:g} s for an answer, "
        f"{args.queue} may wait); Ctrl-C stops it",
        flush=True,
    )
    serve(settings, listener)
    return 0


def port_number(text: str) -> int:
    """Parse a port.

    Raises:
        ArgumentTypeError: the text is none.
    """
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 65535, got {text}")
    return int(text)


def check_packages(command: str, packages: Sequence[str]) -> None:
    """Name the packages of the extra `eval` that a command needs and does not find.

    Raises:
        MissingPackageError: there are some.
    """
    from megatron_entropy.errors import MissingPackageError

    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        names = ", ".join(missing).replace("_", "-")
        raise MissingPackageError(f"{command} needs {names}: pip install 'megatron-entropy[eval]'")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ConfigError: the address does not exist, or its port is taken.
    """
    from megatron_entropy.errors import ConfigError

    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"--port {port}: the port of {host} is in use; stop the other server, or choose another port"
            ) from None
        raise ConfigError(f"--host {host} --port {port}: cannot listen there: {error}") from None
