"""The lock of a run folder: held by a living process, released by its death, named in the error."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from megatron_entropy.errors import ConfigError
from megatron_entropy.launch.lock import LOCK_FILE, RunLock, check_unlocked

HOLDER = """
import sys, pathlib
from megatron_entropy.launch.lock import RunLock
lock = RunLock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_held_lock_names_its_owner(tmp_path, holder):
    expected = rf"output={tmp_path} is in use .*\(on {os.uname().nodename}, pid {holder.pid}, since 20"
    for take in (RunLock, check_unlocked):
        with pytest.raises(ConfigError, match=expected):
            take(tmp_path)


def test_the_lock_of_a_killed_process_is_free(tmp_path, holder):
    holder.kill()
    holder.wait()
    check_unlocked(tmp_path)
    RunLock(tmp_path).close()


def test_a_damaged_lock_file_is_taken_over_or_described(tmp_path, holder):
    (tmp_path / LOCK_FILE).write_bytes(b"\xff[")
    with pytest.raises(ConfigError, match="its lock file does not name it"):
        RunLock(tmp_path)
    holder.kill()
    holder.wait()
    RunLock(tmp_path).close()


def test_a_file_system_without_locks_is_said_so(tmp_path, monkeypatch, caplog):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    RunLock(tmp_path).close()
    assert "without file locks (No locks available)" in caplog.text


def test_checking_leaves_an_empty_folder_empty(tmp_path):
    check_unlocked(tmp_path)
    assert list(tmp_path.iterdir()) == []
