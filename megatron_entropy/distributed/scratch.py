"""The private temporary folder of a command: torchrun's error files, and the sockets and logs of its Ray.

Only the user may read it. It is deleted when the command ends; the next command deletes those of killed ones.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "megatron_"
LOCK_FILE = "megatron_entropy.lock"
RAY_VARIABLE = "RAY_TMPDIR"
MAX_PARENT_LENGTH = 21
"""Longest `TMPDIR` under which the paths of Ray's sockets have at most 107 characters, as Linux demands."""


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Create the folder for processes that this one starts, and delete those of killed commands.

    Ray puts its files into it, unless `RAY_TMPDIR` names another folder; its usual one is open to everybody. The folder
    lies in `TMPDIR`, or in `/tmp` when the sockets' paths would be too long there.
    """
    parent = tempfile.gettempdir()
    if len(os.fsencode(parent)) > MAX_PARENT_LENGTH:
        parent = "/tmp"
    delete_abandoned(Path(parent))
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        lock = _lock(folder)
        ours = {} if RAY_VARIABLE in os.environ else {RAY_VARIABLE: name}
        os.environ |= ours
        try:
            yield folder
        finally:
            for variable in ours:
                del os.environ[variable]
            os.close(lock)


def delete_abandoned(parent: Path) -> None:
    """Delete this user's folders whose lock no process holds; whatever cannot be read or deleted stays."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            found = folder.lstat()
            if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode):
                continue
            file = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while the command lives
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(file)


def _lock(folder: Path) -> int:
    """Put a locked file into the folder; it never lies there unlocked while this process lives."""
    unnamed = folder / f"{LOCK_FILE}.new"
    file = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    with suppress(OSError):  # a file system without locks: nobody can take it, nobody deletes the folder
        fcntl.flock(file, fcntl.LOCK_EX)
        unnamed.rename(folder / LOCK_FILE)
    return file
