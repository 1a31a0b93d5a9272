"""`megatron-entropy config`: print configuration keys with type, default and meaning."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from megatron_entropy.cli.arguments import Subparsers

if TYPE_CHECKING:
    from megatron_entropy.config.describe import Table


def add_parser(subparsers: Subparsers) -> None:
    """Define the command line."""
    parser = subparsers.add_parser(
        "config",
        help="print configuration keys with type, default and meaning",
        description="Print the configuration keys with type, default and meaning: all of them, or those at or below "
        "PREFIX (such as actor.parallel or method).",
        allow_abbrev=False,
    )
    parser.add_argument("prefix", metavar="PREFIX", nargs="?", default="", help="dotted name of a key or table")
    parser.add_argument("--method", metavar="NAME", help="only this method's settings; default: those of every method")
    parser.add_argument(
        "--format",
        choices=("table", "markdown", "toml"),
        default="table",
        help="toml: a configuration file with all defaults, needs --method; default: %(default)s",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the keys."""
    from megatron_entropy.config import describe
    from megatron_entropy.errors import ConfigError
    from megatron_entropy.methods import METHOD_CONFIGS, load_method_config

    if args.format == "toml" and not args.method:
        raise ConfigError("--format toml needs --method NAME, because a file has settings of one method")
    methods = {args.method: load_method_config(args.method)} if args.method else METHOD_CONFIGS
    tables = describe.select(describe.list_tables(methods), args.prefix)
    if args.format == "table":
        _print_tables(tables)
    else:
        print(describe.to_markdown(tables) if args.format == "markdown" else describe.to_toml(tables))
    return 0


def _print_tables(tables: list[Table]) -> None:
    import rich.table
    from rich.console import Console
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in tables:
        shown = rich.table.Table(title=Text(f"{table.title}: {table.meaning}"), title_justify="left", expand=True)
        for heading, ratio in (("key", 3), ("type", 2), ("default", 2), ("meaning", 6)):
            shown.add_column(heading, ratio=ratio, overflow="fold")
        for key in table.keys:
            default = "required" if key.default is None else key.default
            shown.add_row(*map(Text, (table.path(key), key.type, default, key.meaning)))
        console.print(shown)
