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
        description="Draw the plots of a run, write its report.html and print its table. Works on a running run too. "
        "With a second run the page and the table compare the two.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="RUN", type=Path, help="run folder")
    parser.add_argument("other", metavar="OTHER", type=Path, nargs="?", help="run folder to compare it with")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the report."""
    from megatron_entropy.methods import explain_stage
    from megatron_entropy.monitor import report
    from megatron_entropy.monitor.run_folder import RunFolder

    folder = RunFolder(args.folder)
    other = RunFolder(args.other) if args.other else None
    report.write_report(folder, explain_stage, other)
    report.print_table(folder, other)
    print(folder.report)
    return 0
