"""What several subcommands need: the argument parser, types of arguments, a progress bar."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

Subparsers = argparse._SubParsersAction


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and where to find help, then exit with code 2; under torchrun only rank 0 prints."""
        is_first = os.environ.get("RANK", "0") == "0"
        self.exit(2, f"error: {message} (see {self.prog} --help)\n" if is_first else None)


@contextmanager
def byte_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar over `total` bytes; yields a function that adds finished bytes."""
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)


def byte_size(text: str) -> int:
    """Parse a size such as `500MB`, `4GiB` or `1000` into bytes.

    Raises:
        ArgumentTypeError: the text is not a size.
    """
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    if match is None or match[2] not in units or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"must be a size such as 500MB or 4GiB, got {text}")
    return int(float(match[1]) * units[match[2]])


def positive_int(text: str) -> int:
    """Parse a whole number of at least 1.

    Raises:
        ArgumentTypeError: the text is not one.
    """
    if not text.lstrip("+").isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def positive_float(text: str) -> float:
    """Parse a finite number above 0.

    Raises:
        ArgumentTypeError: the text is not one.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return value


def server_url(text: str) -> str:
    """Parse the address of a reward server.

    Raises:
        ArgumentTypeError: the text is not one.
    """
    from megatron_entropy.config.types import check_server_url

    try:
        return check_server_url(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, got {text}") from None


def fraction(text: str) -> float:
    """Parse a number above 0 and at most 1.

    Raises:
        ArgumentTypeError: the text is not one.
    """
    if (value := positive_float(text)) > 1:
        raise argparse.ArgumentTypeError(f"must be at most 1, got {text}")
    return value
