"""Parse the command line of `megatron-entropy` and run the subcommand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from megatron_entropy.cli import (
    completion,
    config,
    convert,
    doctor,
    eval,
    fp8_report,
    inspect,
    merge_lora,
    report,
    semantic_entropy,
    serve_rewards,
    train,
    view,
)
from megatron_entropy.cli.arguments import Parser
from megatron_entropy.errors import Fault, UserError

COMMANDS = (
    train,
    eval,
    config,
    report,
    view,
    convert,
    inspect,
    merge_lora,
    semantic_entropy,
    fp8_report,
    serve_rewards,
    doctor,
    completion,
)
"""Modules of the subcommands, in the order of `--help`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        arguments: the command line without the program's name; None: `sys.argv`.

    Returns:
        Exit code: 0, 2 after a user's mistake, 1 after a fault, 128 + n after signal n.
    """
    parser = _parser()
    args, unknown = parser.parse_known_args(arguments)
    if args.command == "train":
        args.overrides = unknown
    elif unknown:
        parser.error(f"unknown argument {unknown[0]}")
    return exit_code(lambda: args.run(args))


def exit_code(command: Callable[[], int]) -> int:
    """Run `command` and turn expected errors into one line on standard error and an exit code, as in `main`."""
    try:
        return command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Fault as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has read enough
        sys.stderr.close()
        return 0
    except OSError as error:  # a name that is too long, a full disk, no permission
        print(f"error: {error.strerror or error}: {str(error.filename or '')[:200]}", file=sys.stderr)
        return 1


def _parser() -> Parser:
    parser = Parser(
        prog="megatron-entropy",
        description="Entropy-aware post-training of language models on Megatron-Core.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"megatron-entropy {version('megatron-entropy')}")
        except PackageNotFoundError:
            print("megatron-entropy, not installed: run from its source folder")
        parser.exit()
