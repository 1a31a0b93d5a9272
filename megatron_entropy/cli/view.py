"""`megatron-entropy view`: a local page that shows a run's curves and rollouts and explains its decisions."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_entropy.cli.arguments import Subparsers, positive_int

DESCRIPTION = """Show a run on a local page, also while it trains: curves of its metrics, rollouts by step and question
with filters, and for every response its token entropies, its cut and branches (CURE), the parts of its reward (CER,
DAPO), its penalized tokens (SENT) and the answers of its group. With a second run both are shown side by side. The page
can be reached from this machine only; for a remote one: ssh -L 8642:127.0.0.1:8642 HOST. Ctrl-C stops it."""
PACKAGES = ("fastapi", "uvicorn")


def add_parser(subparsers: Subparsers) -> None:
    """Define the command line."""
    from megatron_entropy.cli.serve_rewards import port_number

    parser = subparsers.add_parser(
        "view", help="explore a run's curves and rollouts in a browser", description=DESCRIPTION, allow_abbrev=False
    )
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", type=Path, help="run folder, or two to compare")
    add("--port", type=port_number, default=8642, help="0: any free one; default: %(default)s")
    add("--export", metavar="FILE", type=Path, help="write the page into one .html file, or FOLDER/index.html, instead")
    add("--samples", metavar="N", type=positive_int, default=400, help="of a stage with --export; default: %(default)s")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve the page, or write it."""
    from megatron_entropy.cli.serve_rewards import check_packages, listen
    from megatron_entropy.errors import ConfigError

    if len(args.runs) > 2:
        raise ConfigError(f"view shows one run or two, got {len(args.runs)}")
    check_packages("view", PACKAGES)
    from megatron_entropy.explorer.index import RunReader

    readers = [RunReader(folder) for folder in args.runs]
    if args.export:
        from megatron_entropy.explorer.export import export

        file, count = export(readers, args.export, samples=args.samples)
        print(f"{file}: {count} responses, {file.stat().st_size / 1e6:.1f} MB")
        return 0
    from megatron_entropy.explorer.server import serve

    listener = listen("127.0.0.1", args.port)
    names = " and ".join(str(folder) for folder in args.runs)
    print(f"{names} on http://127.0.0.1:{listener.getsockname()[1]}; Ctrl-C stops it", flush=True)
    serve(readers, listener)
    return 0
