"""The lock of a folder: one living run or evaluation writes to it at a time."""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import logging
import os
import socket
from pathlib import Path

from megatron_entropy.errors import ConfigError

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"


class RunLock:
    """Locks a folder for the life of this process.

    It is a POSIX record lock, which the kernel releases when the process ends, however it ends; network file systems
    (NFS, Lustre, GPFS, CephFS) keep it for all machines. The file itself stays and names the last owner.
    """

    def __init__(self, folder: Path, *, option: str = "output") -> None:
        """Take the lock.

        Args:
            folder: exists already.
            option: the flag that names the folder, for the message.
        Raises:
            ConfigError: another process holds it; the message names its machine, its pid and since when.
        """
        self._file = _open_locked(folder, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX, option)
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now}).encode(), 0)

    def close(self) -> None:
        """Release the lock."""
        os.close(self._file)


def check_unlocked(folder: Path) -> None:
    """See that no living run holds the lock of a folder; changes nothing.

    Raises:
        ConfigError: as `RunLock`.
    """
    if (folder / LOCK_FILE).exists():
        os.close(_open_locked(folder, os.O_RDONLY, fcntl.LOCK_SH))


def _open_locked(folder: Path, flags: int, kind: int, option: str = "output") -> int:
    """Open and lock the file; a file system without locks is warned of."""
    try:
        file = os.open(folder / LOCK_FILE, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        raise ConfigError(
            f"{option}={folder}: {LOCK_FILE} cannot be opened ({error.strerror}); fix that, or choose another folder "
            f"with --{option}=..."
        ) from None
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            owner = os.pread(file, 4096, 0)
            os.close(file)
            raise ConfigError(
                f"{option}={folder} is in use by a running process ({_describe(owner)}); stop it first, or choose "
                f"another folder with --{option}=..."
            ) from None
        log.warning(
            "%s=%s is on a file system without file locks (%s): nothing keeps a second process from writing to it",
            option,
            folder,
            error.strerror,
        )
    return file


def _describe(owner: bytes) -> str:
    try:
        known = json.loads(owner)
        return f"on {known['host']}, pid {known['pid']}, since {known['since']}"
    except (ValueError, KeyError, TypeError):
        return "its lock file does not name it"
