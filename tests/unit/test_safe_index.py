"""A checkpoint's index and objects are read without running code; damage and forgery are one line each."""

import io
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemWriter, save

from megatron_entropy.errors import CheckpointError
from megatron_entropy.weights.safe_index import check_checkpoint, read_index


class Forged:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    save({"weight": torch.ones(3, 4), "state": None}, storage_writer=FileSystemWriter(folder), no_dist=True)
    return folder


def copy_of(shards, folder):
    for file in shards.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_an_index_is_read(shards):
    index = read_index(shards)
    assert set(index.state_dict_metadata) == {"weight", "state"}
    check_checkpoint(shards)


def test_a_forged_index_runs_nothing(shards, tmp_path):
    copy_of(shards, tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Forged(ran)))
    for read in (read_index, check_checkpoint):
        with pytest.raises(CheckpointError, match=r"\.metadata: cannot be read: it refers to (posix|nt)\.system"):
            read(tmp_path)
    assert not ran.exists()


def test_a_forged_object_in_a_data_file_runs_nothing(shards, tmp_path):
    copy_of(shards, tmp_path)
    ran = tmp_path / "ran"
    index = read_index(tmp_path)
    key = next(key for key in index.storage_data if key.fqn == "state")
    stored = index.storage_data[key]
    forged = io.BytesIO()
    torch.save(Forged(ran), forged)
    file = tmp_path / stored.relative_path
    stored.offset, stored.length = file.stat().st_size, len(forged.getvalue())
    file.write_bytes(file.read_bytes() + forged.getvalue())
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="state is not a plain value"):
        check_checkpoint(tmp_path)
    assert not ran.exists()


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "..", "a/b"])
def test_an_index_names_files_of_its_folder_only(shards, tmp_path, path):
    copy_of(shards, tmp_path)
    index = read_index(tmp_path)
    next(iter(index.storage_data.values())).relative_path = path
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="not a file of the checkpoint's folder"):
        read_index(tmp_path)


@given(st.data())
def test_damaged_bytes_are_one_line(shards, tmp_path_factory, data):
    folder = copy_of(shards, tmp_path_factory.mktemp("damaged"))
    file = folder / data.draw(st.sampled_from(sorted(f.name for f in Path(shards).iterdir())))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        check_checkpoint(folder)
    except CheckpointError as error:
        assert "\n" not in str(error)
