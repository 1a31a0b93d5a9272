"""The private folder of a launcher: for its user alone, gone with it, and swept up by the next one if it was killed."""

import os
import subprocess
import sys
import tempfile

import pytest

from megatron_entropy.distributed.scratch import LOCK_FILE, MAX_PARENT_LENGTH, PREFIX, scratch_folder

HOLDER = """
import sys
from megatron_entropy.distributed.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "some" / "log").mkdir(parents=True)
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def short(monkeypatch):
    """A folder for temporary files whose name is short."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        monkeypatch.setattr(tempfile, "tempdir", name)
        monkeypatch.setenv("TMPDIR", name)
        monkeypatch.delenv("RAY_TMPDIR", raising=False)
        yield name


def test_the_folder_is_private_and_gone_afterwards(short):
    with scratch_folder() as folder:
        assert folder.stat().st_mode & 0o777 == 0o700 and str(folder.parent) == short
        assert os.environ["RAY_TMPDIR"] == str(folder)
        (folder / "ray").mkdir()
    assert not folder.exists() and os.listdir(short) == [] and "RAY_TMPDIR" not in os.environ


def test_a_folder_of_the_user_for_ray_is_kept(short, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/mine")
    with scratch_folder():
        assert os.environ["RAY_TMPDIR"] == "/mine"
    assert os.environ["RAY_TMPDIR"] == "/mine"


def test_paths_of_sockets_stay_short(monkeypatch, tmp_path):
    assert len(str(tmp_path)) > MAX_PARENT_LENGTH
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_folder() as folder:
        assert str(folder.parent) == "/tmp"
    longest = f"/tmp/{'x' * (MAX_PARENT_LENGTH - 5)}/{PREFIX}abcdefgh/ray/session_2026-01-01_00-00-00_000000_4194304"
    assert len(f"{longest}/sockets/plasma_store") <= 107


def test_folders_of_killed_launchers_are_deleted_and_no_others(short):
    def start():
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen([sys.executable, "-c", HOLDER], text=True, **pipes)
        return process, process.stdout.readline().strip()

    (killed, dead), (living, alive) = start(), start()
    foreign, link = f"{short}/{PREFIX}foreign", f"{short}/{PREFIX}link"
    os.mkdir(foreign)
    os.symlink(alive, link)
    killed.kill()
    killed.communicate()
    assert os.path.isdir(dead)
    with scratch_folder():
        assert not os.path.exists(dead)
        assert os.path.exists(f"{alive}/{LOCK_FILE}") and os.path.isdir(foreign) and os.path.islink(link)
    living.stdin.close()
    assert living.wait() == 0 and not os.path.exists(alive)
