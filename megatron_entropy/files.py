"""Files and folders that appear complete or not at all: a reader never meets half of one.

What is new is written beside its final name, forced to disk, and renamed: the rename is the only visible step.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def atomic_write_text(path: Path, text: str) -> None:
    """Replace a file by `text` (UTF-8) in one step.

    Raises:
        OSError: the file cannot be written; the old one stays.
    """
    with atomic_writer(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_writer(path: Path) -> Iterator[Path]:
    """Replace a file in one step by what the `with` block writes to the path it is given.

    Args:
        path: the file; its folder is created where it is missing.
    Yields:
        A path in the same folder. After an error in the block it is removed and the old file stays.
    Raises:
        OSError: the file cannot be written; the old one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        fsync_path(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Replace a folder by the one that the `with` block fills.

    Args:
        folder: the folder; its parent is created where it is missing.
    Yields:
        An empty folder `NAME.partial` beside it. After an error in the block it is removed and the old folder stays.
    Raises:
        OSError: the folder cannot be written.
    """
    folder = folder.resolve()
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            shutil.rmtree(folder)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fsync_path(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
