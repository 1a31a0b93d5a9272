"""`megatron-entropy report`: draw a run's plots and write its report page."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_entropy.cli.arguments import Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Define the command line."""
    parser = subparsers.add_parser(
        "report",
        help="draw a run's plots and write its report.html",
        description="Draw the plots of a run, write its report.html and print its table. Works on a running run too.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="RUN", type=Path, help="run folder")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the report."""
    from megatron_entropy.monitor import report
    from megatron_entropy.monitor.run_folder import RunFolder

    folder = RunFolder(args.folder)
    report.write_report(folder)
    report.print_table(folder)
    return 0
