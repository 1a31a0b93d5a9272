"""Checkpoints: complete or absent, written in the background, readable under any layout, skipped when damaged.

Runs the real Megatron model on CPU ranks. A checkpoint written under one layout continues under any other: two updates,
a save, two more updates while it is written. The losses and gradient norms of the last two must be the same after a
load, under another layout, with or without the distributed optimizer. Tolerance 1e-5: other layouts sum in another
order (about 1e-7 relative in fp32).
"""

import io
import json
import os
import pickle
import resource
import shutil
import signal
import threading
import zlib
from pathlib import Path

import check_layouts
import numpy as np
import pytest
import torch
import torch.distributed as dist
from local_ranks import run_on_ranks
from rich.console import Console

from megatron_entropy.checkpoint import inspection
from megatron_entropy.config.architecture import read_architecture
from megatron_entropy.config.schema import ActorConfig, OptimizerConfig, ParallelConfig
from megatron_entropy.distributed import process_groups
from megatron_entropy.errors import CheckpointError, Fault, UserError
from megatron_entropy.weights import manifest
from megatron_entropy.weights.manifest import Content, FileRecord, ModelFacts, StageProgress
from megatron_entropy.weights.megatron_folder import MegatronFolder

pytestmark = pytest.mark.actor

ROOT = Path(__file__).parents[2]
ONE = ParallelConfig()
TP2 = ParallelConfig(tp=2)
PP2 = ParallelConfig(pp=2)
PP2_VPP2 = ParallelConfig(pp=2, vpp=2)
DP2_SHARDED = ParallelConfig(dp=2, distributed_optimizer=True)
CP2_SHARDED = ParallelConfig(cp=2, distributed_optimizer=True)


def build(folder: str, layout: ParallelConfig):
    from megatron_entropy.actor.actor import Actor

    process_groups.init_model_parallel(layout, seed=1)
    arch = read_architecture(folder)
    optimizer = OptimizerConfig(lr=1e-3, eps=1e-3, warmup_steps=4, weight_decay=0.1)
    config = ActorConfig(parallel=layout, optimizer=optimizer, dtype="float32", max_tokens_per_microbatch=192)
    return Actor(arch, config, total_updates=10)


def load_folder(actor, folder: str) -> None:
    from megatron_entropy.weights.hf_folder import TensorFolder
    from megatron_entropy.weights.source import load

    load(TensorFolder(folder), actor.arch, actor.config.parallel, actor.named_shards())
    actor.after_load()


def updates(folder: str, checkpoints: str, layout: ParallelConfig, saves: bool) -> list[tuple[float, float, float]]:
    """Loss, gradient norm and learning rate of updates 3 and 4, after saving or loading the state of update 2."""
    from megatron_entropy.checkpoint import saver as checkpoint

    actor = build(folder, layout)
    samples = check_layouts.make_samples(actor.arch.vocab_size)
    expected = checkpoint.StageProgress(2, 2, 7, "settings", {"mean": 0.1, "seen": [1, 2]})

    def update() -> tuple[float, float, float]:
        metrics = actor.update(samples, lambda s, b: (-b.advantage * s.logprob - 0.01 * s.entropy, {}), temperature=1.0)
        return tuple(metrics[f"train/{name}"].value for name in ("loss", "grad_norm", "lr"))

    if not saves:
        path, progress = checkpoint.newest(Path(checkpoints))
        assert progress == expected
        checkpoint.load(path, actor, progress)
        return [update(), update()]
    load_folder(actor, folder)
    saver = checkpoint.Saver(Path(checkpoints), keep=2, asynchronous=True)
    update()
    update()
    saver.save(actor, expected)
    found = [update(), update()]
    saver.close()
    return found


@pytest.mark.parametrize(
    "source, targets",
    [(TP2, (TP2, PP2_VPP2, DP2_SHARDED)), (CP2_SHARDED, (CP2_SHARDED, TP2, PP2))],
    ids=["from TP2", "from sharded CP2"],
)
def test_training_continues_under_another_layout(tmp_path, source, targets):
    folder = str(tmp_path / "model")
    check_layouts.make_checkpoint(Path(folder), experts=False)
    checkpoints = str(tmp_path / "checkpoints")
    expected = run_on_ranks(updates, 2, folder, checkpoints, source, True)[0]
    assert expected[1][0] < expected[0][0] and expected[1][2] > expected[0][2] > 0, (
        "the loss falls and the learning rate warms up"
    )
    for target in targets:
        found = run_on_ranks(updates, 2, folder, checkpoints, target, False)[0]
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=str(target))
        if target is source:
            assert found == expected, "under the layout that saved, to the bit"


def traffic(folder: str, checkpoints: str, layout: ParallelConfig, saves: bool) -> tuple[int, int]:
    """Bytes of tensors: saving, those that this rank receives and writes; loading, those that it reads, and 0."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    from megatron_entropy.checkpoint import saver as checkpoint

    actor = build(folder, layout)
    found = {"received": 0, "read": 0}
    if not saves:
        read_data = FileSystemReader.read_data

        def counting_read(self, plan, planner):
            found["read"] += sum(self.storage_data[item.storage_index].length for item in plan.items)
            return read_data(self, plan, planner)

        FileSystemReader.read_data = counting_read
        path, progress = checkpoint.newest(Path(checkpoints))
        checkpoint.load(path, actor, progress)
        return found["read"], 0
    load_folder(actor, folder)
    actor.update(check_layouts.make_samples(actor.arch.vocab_size), lambda s, b: (-s.logprob, {}), temperature=1.0)

    def count(function):
        def counting(*args, **options):
            tensors = [item for arg in args for item in (arg if isinstance(arg, list) else [arg])]
            found["received"] += sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point())
            return function(*args, **options)

        return counting

    for name in ("all_gather", "all_gather_into_tensor", "gather", "all_to_all", "all_reduce", "broadcast", "recv"):
        setattr(dist, name, count(getattr(dist, name)))
    saver = checkpoint.Saver(Path(checkpoints), keep=1, asynchronous=False)
    saver.save(actor, checkpoint.StageProgress(1, 1, 0, "settings"))
    saver.close()
    files = (Path(checkpoints) / "step_000001" / "shards").glob(f"__{process_groups.rank()}_*")
    return found["received"], sum(path.stat().st_size for path in files)


def test_nothing_is_gathered_and_every_byte_is_written_and_read_about_once(tmp_path):
    folder, checkpoints = str(tmp_path / "model"), str(tmp_path / "checkpoints")
    check_layouts.make_checkpoint(Path(folder), experts=False)
    sharded = ParallelConfig(dp=4, distributed_optimizer=True)
    received, written = zip(*run_on_ranks(traffic, 4, folder, checkpoints, sharded, True), strict=True)
    assert received == (0, 0, 0, 0)
    stored = sum(tensor.bytes for tensor in manifest.tensors(Path(checkpoints) / "step_000001" / "shards").values())
    # A tensor has a header of 1 kB in the files, which counts in a model this small.
    assert stored < sum(written) < 1.12 * stored and max(written) < 1.12 * stored / 4 * 1.05
    for target in (sharded, ParallelConfig(pp=2, dp=2)):
        read, _ = zip(*run_on_ranks(traffic, 4, folder, checkpoints, target, False), strict=True)
        assert stored < sum(read) < 1.15 * stored, str(target)
        assert max(read) < 1.15 * stored / 4 * 1.05, "the ranks share the work"


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4)])
def test_boxes_split_any_range_of_a_tensor_into_few(shape):
    from megatron_entropy.checkpoint.optimizer_shards import boxes, covering_rows

    tensor = np.arange(np.prod(shape)).reshape(shape)

    def elements(box):
        return tensor[tuple(slice(a, a + n) for a, n in zip(*box, strict=True))].ravel().tolist()

    for first in range(tensor.size):
        for last in range(first + 1, tensor.size + 1):
            found = list(boxes(shape, first, last))
            assert sum((elements(box) for box in found), []) == list(range(first, last))
            assert len(found) <= 2 * len(shape) - 1
            rows, origin = covering_rows(shape, first, last)
            assert elements(rows)[first - origin : last - origin] == list(range(first, last))


def check_saver(folder: str, checkpoints: str) -> None:
    """Every promise of `Saver`, on two ranks that share one model."""
    import psutil

    from megatron_entropy.checkpoint import saver as checkpoint
    from megatron_entropy.checkpoint.snapshot import Snapshot

    root = Path(checkpoints)
    actor = build(folder, TP2)
    load_folder(actor, folder)

    def progress(step: int) -> checkpoint.StageProgress:
        return checkpoint.StageProgress(step, step, 0, "settings")

    def names() -> list[str]:
        process_groups.barrier()  # no rank changes the folder while another lists it
        found = sorted(path.name for path in root.iterdir())
        process_groups.barrier()
        return found

    # `save` returns before the bytes are written, `check` does not wait, the next save does.
    saver = checkpoint.Saver(root, keep=2, asynchronous=True)
    write, wait, gate, order = Snapshot.write, saver.wait, threading.Event(), []

    def write_at_the_gate(snapshot):
        gate.wait()
        order.append("written")
        return write(snapshot)

    def open_the_gate_and_wait():
        order.append("waiting")
        gate.set()
        wait()

    Snapshot.write = write_at_the_gate
    saver.save(actor, progress(1))
    saver.check()
    assert names() == ["step_000001.partial"]
    saver.wait = open_the_gate_and_wait
    saver.save(actor, progress(2))
    saver.wait = wait
    assert order[:2] == ["waiting", "written"] and (root / "step_000001").is_dir()
    Snapshot.write = write
    saver.wait()
    assert not psutil.Process().children(), "no helper process that could outlive a killed rank"

    # The newest `keep` complete checkpoints stay; later ones, which were not resumed, and partial ones are deleted.
    if process_groups.rank() == 0:
        (root / "step_000009").mkdir()
        (root / "step_000008.partial").mkdir()
    saver.save(actor, progress(3))
    saver.wait()
    assert names() == ["step_000002", "step_000003"]

    # A rank that cannot write stops all ranks with one line and leaves no partial checkpoint. The next save works.
    def limit(bytes_: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, resource.RLIM_INFINITY))

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for victim in (1, 0):
        if process_groups.rank() == victim:
            limit(50_000)
        with pytest.raises(Fault, match=r"step_000004 could not be written \(File too large.*step_000003 is the last"):
            saver.save(actor, progress(4))
            saver.wait()
        limit(resource.RLIM_INFINITY)
        assert names() == ["step_000002", "step_000003"]
    saver.close()

    saver = checkpoint.Saver(root, keep=1, asynchronous=False, resumed_step=3)
    saver.save(actor, progress(4))
    assert names() == ["step_000004"]
    saver.close()

    # A damaged checkpoint is no obstacle to its successor of the same step, nor to a later one, and never called good.
    for save_step in (5, 5, 7):
        if process_groups.rank() == 0 and not (root / "step_000005").exists():
            shutil.copytree(root / "step_000004", root / "step_000005")  # says that it is of step 4
        process_groups.barrier()
        assert process_groups.run_on_rank_zero(lambda: checkpoint.newest(root))[0].name == "step_000004"
        saver = checkpoint.Saver(root, keep=2, asynchronous=True, resumed_step=4)
        if save_step == 7:
            limit(50_000)
            with pytest.raises(Fault, match=r"step_000007 could not be written .*step_000004 is the last good one"):
                saver.save(actor, progress(7))
                saver.wait()
            limit(resource.RLIM_INFINITY)
            assert names() == ["step_000004", "step_000005"]
        saver.save(actor, progress(save_step))
        saver.close()
        assert names() == ["step_000004", f"step_{save_step:06d}"]
        if process_groups.rank() == 0:
            (root / "step_000005").exists() and shutil.rmtree(root / "step_000005")
        process_groups.barrier()

    # Weights that are not finite are not saved.
    name, weight = next(iter(actor.named_shards().items()))
    if process_groups.rank() == 1:
        weight.data.view(-1)[0] = float("nan")
    saver = checkpoint.Saver(root, keep=2, asynchronous=True, resumed_step=7)
    with pytest.raises(
        Fault, match=r"step_000008 could not be written \(tensor .* not finite.*step_000007 is the last"
    ):
        saver.save(actor, progress(8))
        saver.wait()
    assert names() == ["step_000004", "step_000007"]
    saver.close()


def save_once(folder: str, checkpoints: str) -> None:
    from megatron_entropy.checkpoint import saver as checkpoint

    actor = build(folder, ONE)
    load_folder(actor, folder)
    saver = checkpoint.Saver(Path(checkpoints), keep=1, asynchronous=False)
    saver.save(actor, checkpoint.StageProgress(1, 2, 3, "settings"))
    saver.close()


def refusals(checkpoints: str, others: list[str]) -> list[str]:
    """The errors of `load` for other models."""
    from megatron_entropy.checkpoint import saver as checkpoint

    messages = []
    for other in others:
        path, progress = checkpoint.newest(Path(checkpoints))
        with pytest.raises(CheckpointError) as refusal:
            checkpoint.load(path, build(other, ONE), progress)
        messages.append(str(refusal.value))
    return messages


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with checkpoints, and its model in `model`; tests must not change it."""
    folder = tmp_path_factory.mktemp("run")
    check_layouts.make_checkpoint(folder / "model", experts=False)
    run_on_ranks(save_once, 1, str(folder / "model"), str(folder / "checkpoints" / "rl"))
    return folder


def test_the_docstrings_of_the_saver_are_true(tmp_path):
    check_layouts.make_checkpoint(tmp_path / "model", experts=False)
    run_on_ranks(check_saver, 2, str(tmp_path / "model"), str(tmp_path / "checkpoints"))


def test_a_checkpoint_of_another_model_is_refused_naming_tensor_and_shapes(run, tmp_path):
    config = json.loads((run / "model" / "config.json").read_text())
    others = {
        "wider": {"intermediate_size": 112},
        "deeper": {"num_hidden_layers": 6},
        "family": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
        "words": {"vocab_size": 305},
    }
    for name, changes in others.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **changes}))
    folders = [str(tmp_path / name) for name in others]
    messages = run_on_ranks(refusals, 1, str(run / "checkpoints" / "rl"), folders)[0]
    wider, deeper, family, words = messages
    assert "decoder.layers.mlp.linear_fc1.weight is (4, 192, 64) in it and (4, 224, 64)" in wider
    assert "(4, 64) in it and (6, 64) in the model" in deeper
    assert "missing" in family and "belongs to another model: tensor decoder.layers." in family
    assert "301 rows" in words and "305" in words
    assert not any("\n" in line for line in messages)


def make_files(folder: Path, step: int) -> Path:
    """A checkpoint with the files that `newest` reads."""
    checkpoint = folder / f"step_{step:06d}"
    (checkpoint / "shards").mkdir(parents=True)
    data = checkpoint / "shards" / "data"
    data.write_bytes(b"x" * 1000)
    model = ModelFacts(architecture="Qwen3ForCausalLM", num_layers=1, hidden_size=8, vocab_size=16)
    content = Content(progress=StageProgress(step, 0, 0, ""), layout=ONE, model=model)
    manifest.write(checkpoint, content, {"shards/data": FileRecord.of(data)})
    return checkpoint


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def edit_state(checkpoint: Path) -> None:
    text = (checkpoint / "state.json").read_text()
    (checkpoint / "state.json").write_text(text.replace('"position": 0', '"position": 1'))


def forge(**changes):
    """Change the progress in `state.json`, and its checksum with it."""

    def spoil(checkpoint: Path) -> None:
        body = json.loads((checkpoint / "state.json").read_text())
        body["content"]["progress"] |= changes
        del body["crc32"]
        body["crc32"] = zlib.crc32(json.dumps(body, sort_keys=True).encode())
        (checkpoint / "state.json").write_text(json.dumps(body))

    return spoil


DAMAGE = {
    "truncated": (lambda c: os.truncate(c / "shards" / "data", 999), "shards/data has 999 bytes instead of 1000"),
    "a flipped bit": (lambda c: flip(c / "shards" / "data", 500), "shards/data was changed"),
    "a missing file": (lambda c: (c / "shards" / "data").unlink(), "shards/data is missing"),
    "no state.json": (lambda c: (c / "state.json").unlink(), "state.json is missing"),
    "torn state.json": (lambda c: os.truncate(c / "state.json", 50), "state.json: not valid JSON"),
    "no object": (lambda c: (c / "state.json").write_text("[]"), "state.json: expected a JSON object"),
    "an empty object": (lambda c: (c / "state.json").write_text("{}"), "state.json is not a checkpoint's"),
    "deep JSON": (lambda c: (c / "state.json").write_text("[" * 100_000), "state.json: not valid JSON: nested too"),
    "negative step": (forge(step=-5), "step: input should be greater than or equal to 0, found -5"),
    "a text as step": (forge(step="2"), "step: input should be a valid integer, found '2'"),
    "negative position": (forge(position=-3), "position: input should be greater than or equal to 0, found -3"),
    "a huge position": (forge(position=10**30), "position: "),
    "another step": (forge(step=7), "state.json is of step 7"),
    "an unknown key": (forge(order=1), "order: "),
    "edited state.json": (edit_state, "state.json was changed"),
    "not even a folder": (lambda c: (shutil.rmtree(c), c.write_bytes(b"")), "state.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_and_reported(tmp_path, caplog, damage):
    from megatron_entropy.checkpoint import saver as checkpoint

    for step in (2, 4):
        make_files(tmp_path, step)
    (tmp_path / "step_000006.partial").mkdir()
    path, progress = checkpoint.newest(tmp_path)
    assert path.name == "step_000004" and progress.step == 4
    assert "step_000006.partial was never completed" in caplog.text
    spoil, reason = DAMAGE[damage]
    spoil(path)
    path, progress = checkpoint.newest(tmp_path)
    assert path.name == "step_000002" and progress.step == 2
    assert "step_000004 is damaged and skipped: " in caplog.text and reason in caplog.text
    spoil(path)
    with pytest.raises(CheckpointError, match="every checkpoint is damaged.*step_000004.*step_000002") as refusal:
        checkpoint.newest(tmp_path)
    assert reason in str(refusal.value)


def test_there_is_nothing_to_resume_before_the_first_checkpoint(tmp_path):
    from megatron_entropy.checkpoint import saver as checkpoint

    assert checkpoint.newest(tmp_path / "none") is None
    (tmp_path / "step_000001.partial").mkdir()
    assert checkpoint.newest(tmp_path) is None


def inspect(folder: Path, checksums: bool | None = None) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=140)
    code = inspection.inspect(folder, checksums, console)
    return code, console.file.getvalue()


@pytest.mark.parametrize("path", [".", "checkpoints/rl", "checkpoints/rl/step_000001"])
def test_inspection_shows_the_content_of_a_checkpoint(run, path):
    code, shown = inspect(run / path)
    assert code == 0
    for expected in (
        "decoder.layers.mlp.linear_fc1.weight",
        "4 x 192 x 64",
        "optimizer.state.exp_avg.embedding.word_embeddings.weight",
        "step 1, 2 updates, 3 prompts drawn",
        "saved under  1 rank",
        "fingerprint  settings",
        "Qwen3ForCausalLM, 4 layers, hidden 64, 301 words, 172,736 parameters",
        "intact (checksums match)",
    ):
        assert expected in shown, expected


def test_inspection_shows_a_hugging_face_folder(run):
    code, shown = inspect(run / "model")
    assert code == 0 and "model.layers.*.mlp.up_proj.weight" in shown and "96 x 64" in shown and "sizes match" in shown


def test_a_forged_checkpoint_runs_nothing(run, tmp_path):
    """Neither its index nor its objects are unpickled freely: when inspected, converted or loaded."""

    class Forged:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    step = shutil.copytree(run / "checkpoints" / "rl" / "step_000001", tmp_path / "rl" / "step_000001")
    shutil.copy(run / "model" / "config.json", step)
    forged = pickle.dumps(Forged())
    (step / "shards" / ".metadata").write_bytes(forged)
    state = manifest.read(step)
    files = {**state.files, "shards/.metadata": FileRecord.of(step / "shards" / ".metadata")}
    manifest.write(step, state.content, files)
    code, shown = inspect(step)
    assert code == 1 and "refers to posix.system" in shown
    with pytest.raises(CheckpointError, match=r"refers to posix\.system"):
        manifest.tensors(step / "shards")
    with pytest.raises(CheckpointError, match=r"refers to posix\.system"):
        MegatronFolder(step, read_architecture(run / "model"))
    with pytest.raises(RuntimeError, match=r"CheckpointError: .*refers to posix\.system"):
        run_on_ranks(load_newest, 1, str(run / "model"), str(step.parent))
    assert not (tmp_path / "ran").exists()


def load_newest(folder: str, checkpoints: str) -> None:
    from megatron_entropy.checkpoint import saver as checkpoint

    path, progress = checkpoint.newest(Path(checkpoints))
    checkpoint.load(path, build(folder, ONE), progress)


def test_inspection_finds_damage(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    step = copy / "checkpoints" / "rl" / "step_000001"
    flip(step / "shards" / "__0_0.distcp", 100_000)
    assert inspect(step, checksums=False)[0] == 0, "sizes alone do not show it"
    for damaged in (step, copy):
        code, shown = inspect(damaged)
        assert code == 1 and "damaged: shards/__0_0.distcp was changed" in " ".join(shown.split())
    (step / "shards" / ".metadata").unlink()
    assert inspect(step)[0] == 1
    weights = copy / "model" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    code, shown = inspect(copy / "model")
    assert code == 1 and "damaged: model.safetensors has" in shown


@pytest.mark.parametrize("content", [None, "empty", "text"])
def test_inspection_of_anything_else_is_one_line(tmp_path, content):
    folder = tmp_path / "folder"
    if content:
        folder.mkdir()
    if content == "text":
        (folder / "model.safetensors").write_text("not one")
    with pytest.raises(UserError, match="no such folder|is neither a run|corrupt or not a safetensors"):
        inspect(folder)
