"""Files that appear complete or not at all, and JSON of unknown origin.

A new file or folder is written beside its final name, forced to disk, and renamed: the rename is the only visible step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_entropy.errors import UserError

MAX_JSON_BYTES = 64 * 2**20
"""Largest JSON file that `read_json` reads."""


def read_json(path: Path, error: type[UserError]) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        UserError: of the class `error`, in one line that names the file: it is missing, not a regular file, too large,
            not UTF-8, not JSON, nested too deeply, half a surrogate pair, or not an object.
    """
    try:
        if not os.path.isfile(path):
            raise error(f"{path}: {'not a regular file' if os.path.lexists(path) else 'no such file'}")
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise error(f"{path}: {size} bytes are too many for this file; at most {MAX_JSON_BYTES} are read")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        if r"\ud" in text.lower():
            json.dumps(content, ensure_ascii=False).encode()  # a lone surrogate is no text
    except OSError as reason:
        raise error(f"{path}: cannot be read: {reason.strerror or reason}") from None
    except error:
        raise
    except (ValueError, RecursionError) as reason:  # JSONDecodeError, UnicodeError, a number of 5,000 digits
        raise error(f"{path}: not valid JSON: {json_problem(reason)}") from None
    if not isinstance(content, dict):
        raise error(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def json_problem(reason: ValueError | RecursionError) -> str:
    """Say in one line why a text is not JSON that can be read."""
    return "nested too deeply" if isinstance(reason, RecursionError) else str(reason)


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
