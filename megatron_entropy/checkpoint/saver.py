"""Save and load checkpoints: sharded weights, optimizer state, and the progress of the stage.

A checkpoint is a folder `step_000010` with `shards/` (the format of `megatron.core.dist_checkpointing`, readable under
any layout) and `state.json` (`weights/manifest.py`). `Saver` writes it in the background: training waits while the
ranks plan and copy their tensors, then each rank writes its copy in a thread. When all bytes of all ranks are on disk,
rank 0 writes `state.json` and renames the folder from `step_000010.partial`: a folder with a final name is complete
unless it was damaged later. `newest` compares every byte with its checksum and reports why it skips a damaged one.

A step that exists already (a damaged one, or one that was not resumed) is replaced; only checkpoints up to the resumed
one and those written since count as good.

A checkpoint contains no random state. Every draw has a seed that depends only on the run's seed and on what is drawn:
prompts on epoch and position, samples on stage, step, prompt and number (the engines keep no state between requests).
Every step seeds the generators of `random`, `numpy`, torch and Megatron on each rank (`seeds.seed_generators`).
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_entropy.actor.actor import Actor
from megatron_entropy.actor.lora import is_adapter
from megatron_entropy.checkpoint.sharded_state import SHARDED, global_shapes, restore, sharded_state
from megatron_entropy.checkpoint.snapshot import Snapshot, Written
from megatron_entropy.distributed import process_groups
from megatron_entropy.errors import CheckpointError, Fault
from megatron_entropy.files import fsync_path
from megatron_entropy.weights import manifest
from megatron_entropy.weights.manifest import Content, FileRecord, ModelFacts, StageProgress
from megatron_entropy.weights.safe_index import check_checkpoint

log = logging.getLogger(__name__)

SHARDS = "shards"


class Saver:
    """Writes the checkpoints of one stage while training continues.

    It holds a copy of the rank's tensors in host memory until they are written, one checkpoint at a time. A checkpoint
    that cannot be written stops the run, because a crash would lose all later training.

    Args:
        folder: of the stage's checkpoints; the first save creates it.
        keep: number of complete checkpoints to keep.
        asynchronous: False: `save` returns when the checkpoint is complete, and nothing is copied.
        resumed_step: step of the checkpoint that the stage was resumed from; later ones in the folder are damaged.
    """

    def __init__(self, folder: Path, *, keep: int, asynchronous: bool, resumed_step: int = 0) -> None:
        """Create the process group of the writer threads; a collective."""
        self._folder = folder
        self._last_good = resumed_step
        self._keep = keep
        self._asynchronous = asynchronous
        self._group: Any = dist.new_group(backend="gloo")  # the threads do not wait for training's collectives
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, actor: Actor, progress: StageProgress) -> None:
        """Start a checkpoint after the previous one is complete; a collective.

        Raises:
            Fault: on every rank, when this checkpoint or the previous one could not be written.
        """
        self.wait()
        final = self._folder / f"step_{progress.step:06d}"
        partial = final.with_name(f"{final.name}.partial")
        process_groups.run_on_rank_zero(lambda: self._prepare(final, partial))
        snapshot = Snapshot(sharded_state(actor, is_loading=False), partial / SHARDS, copy=self._asynchronous)
        arch = actor.arch
        model = ModelFacts(
            architecture=arch.architecture,
            num_layers=arch.num_layers,
            hidden_size=arch.hidden_size,
            vocab_size=arch.vocab_size,
        )
        content = Content(progress=progress, layout=actor.config.parallel, model=model)
        self._thread = threading.Thread(
            target=self._complete, args=(snapshot, final, partial, content), name="checkpoint", daemon=True
        )
        self._thread.start()
        if not self._asynchronous:
            self.wait()

    def check(self) -> None:
        """Raise the error of a finished save that rank 0 knows of, without waiting for a running one; a collective."""
        failure = process_groups.broadcast_object(self._failure)
        if failure is not None:
            self._failure = None
            raise failure

    def wait(self) -> None:
        """Wait until the last save is complete; no collective.

        Raises:
            Fault: the checkpoint could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Wait for the last save; its error is logged, not raised, because another error may have ended the run."""
        try:
            self.wait()
        except Exception as error:
            if process_groups.rank() == 0:
                log.error("%s", error)
        dist.destroy_process_group(self._group)

    def _prepare(self, final: Path, partial: Path) -> None:
        """Create an empty folder for the new checkpoint and check that the disk accepts files; on rank 0."""
        try:
            for leftover in self._folder.glob("*.partial"):
                _delete(leftover)
            (partial / SHARDS).mkdir(parents=True)
            probe = partial / "probe"
            probe.write_bytes(bytes(2**20))  # a full disk fails here, before Megatron writes and other ranks wait
            probe.unlink()
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise self._fault(final, error) from None

    def _complete(self, snapshot: Snapshot, final: Path, partial: Path, content: Content) -> None:
        """Write this rank's files, gather all outcomes and publish the checkpoint on rank 0; in the thread."""
        try:
            try:
                outcome: Written | BaseException = snapshot.write()
            except Exception as error:
                outcome = self._fault(final, error)
            outcomes: list[Any] = [None] * dist.get_world_size() if process_groups.rank() == 0 else []
            dist.gather_object(outcome, outcomes or None, dst=0, group=self._group)
            failures: list[BaseException | None] = [None]
            if process_groups.rank() == 0:
                failures[0] = self._finish(snapshot, outcomes, final, partial, content)
            dist.broadcast_object_list(failures, src=0, group=self._group)
            self._failure = failures[0]
            if self._failure is None:
                self._last_good = step_number(final)
        except Exception as error:  # another rank has gone
            self._failure = error

    def _finish(
        self, snapshot: Snapshot, outcomes: list[Any], final: Path, partial: Path, content: Content
    ) -> BaseException | None:
        """Complete and publish the checkpoint on rank 0, or delete it; returns the first error."""
        failure = next((outcome for outcome in outcomes if isinstance(outcome, BaseException)), None)
        if failure is None:
            try:
                snapshot.write_index(outcomes)
                files = {f"{SHARDS}/{name}": record for rank in outcomes for name, record in rank.files.items()}
                for path in (partial / SHARDS).iterdir():
                    name = f"{SHARDS}/{path.name}"
                    files[name] = files.get(name) or FileRecord.of(path)
                manifest.verify(partial, files, checksums=False)  # fails unless all nodes write into the same folder
                manifest.write(partial, content, files)
                self._publish(final, partial)
                return None
            except Exception as error:
                failure = self._fault(final, error)
        shutil.rmtree(partial, ignore_errors=True)
        return failure

    def _publish(self, final: Path, partial: Path) -> None:
        """Rename the checkpoint to its final name; delete damaged ones, ones that were not resumed, and old ones."""
        if os.path.lexists(final):
            _discard(final)
        os.replace(partial, final)
        fsync_path(self._folder)
        good = [*self._good_steps(), final]
        for obsolete in set(_steps(self._folder)) - set(good[-self._keep :]):
            _discard(obsolete)

    def _good_steps(self) -> list[Path]:
        return [step for step in _steps(self._folder) if step_number(step) <= self._last_good]

    def _fault(self, final: Path, error: Exception) -> Exception:
        """Turn an error of the operating system or of a missing file into a `Fault` for the user."""
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if isinstance(error, Fault):
            reason = str(error)
        elif isinstance(cause, OSError):
            reason = f"{cause.strerror or cause}" + (f": {cause.filename}" if cause.filename else "")
        elif isinstance(error, CheckpointError):
            reason = f"{error}; checkpoints need a folder that all nodes share"
        else:
            return RuntimeError(f"checkpoint {final}: {type(error).__name__}: {error}")
        good = self._good_steps()
        last = f"{good[-1].name} is the last good one" if good else "there is no earlier one"
        return Fault(f"checkpoint {final} could not be written ({reason}); {last}; fix this and continue with --resume")


def newest(folder: Path, *, checksums: bool = True) -> tuple[Path, StageProgress] | None:
    """Return the newest complete checkpoint of a stage, or None before the first; warn about every skipped one.

    Args:
        folder: of the stage's checkpoints.
        checksums: False: compare only the sizes of the files, which reads none of them.
    Raises:
        CheckpointError: every checkpoint is damaged.
    """
    for partial in sorted(folder.glob("*.partial")):
        log.warning("checkpoint %s was never completed and is skipped", partial)
    damaged = []
    for candidate in reversed(_steps(folder)):
        try:
            state = manifest.read(candidate)
            manifest.verify(candidate, state.files, checksums=checksums)
            if state.content.progress.step != step_number(candidate):
                raise CheckpointError(f"{manifest.NAME} is of step {state.content.progress.step}")
            return candidate, state.content.progress
        except CheckpointError as error:
            log.warning("checkpoint %s is damaged and skipped: %s", candidate, error)
            damaged.append(f"{candidate.name}: {error}")
    if damaged:
        raise CheckpointError(
            f"{folder}: every checkpoint is damaged ({'; '.join(damaged)}); restore one from a copy, or start over "
            "with --overwrite"
        )
    return None


def load(path: Path, actor: Actor, progress: StageProgress) -> None:
    """Load a checkpoint into an actor of any layout; a collective.

    Raises:
        CheckpointError: on every rank, when the checkpoint belongs to another model, or contains anything but tensors
            and plain values.
    """
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

    state = sharded_state(actor, is_loading=True)
    expected: list[dict[str, tuple[int, ...]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(expected, global_shapes(state))
    merged = {name: shape for rank in expected for name, shape in rank.items()}
    process_groups.run_on_rank_zero(lambda: _check_model(path, merged, actor.arch.vocab_size))
    shards = str(path / SHARDS)
    own = {SHARDED: state.pop(SHARDED)} if SHARDED in state else {}
    loaded: dict[str, Any] = dist_checkpointing.load(own, shards) if own else {}  # type: ignore[assignment]
    # One data-parallel rank reads what all of them need and sends it to the others.
    replicas: Any = parallel_state.get_data_parallel_group(with_context_parallel=True)
    strategy: Any = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), replicas)
    loaded |= dist_checkpointing.load(state, shards, sharded_strategy=strategy)  # type: ignore[operator]
    restore(actor, loaded, updates=progress.updates)


def _check_model(path: Path, expected: dict[str, tuple[int, ...]], vocab_size: int) -> None:
    """Compare the global shapes of the model's and the checkpoint's tensors, before Megatron reads any of its files."""
    check_checkpoint(path / SHARDS)
    found = {name: tensor.shape for name, tensor in manifest.tensors(path / SHARDS).items()}
    names = sorted(expected.keys() | found.keys(), key=lambda n: (n.startswith("optimizer."), not is_adapter(n), n))
    settings = "model and actor.lora" if any(is_adapter(name) for name in names) else "model"
    for name in names:
        ours, theirs = expected.get(name), found.get(name)
        if ours != theirs:
            raise CheckpointError(
                f"{path} belongs to another model: tensor {name} is {theirs or 'missing'} in it and "
                f"{ours or 'missing'} in the model of model.path; resume with the {settings} that started the run, or "
                "choose another output"
            )
    rows = manifest.read(path).content.model.vocab_size
    if rows != vocab_size:  # hidden by the padding
        raise CheckpointError(
            f"{path} belongs to another model: tensor embedding.word_embeddings.weight has {rows} rows without padding "
            f"in it and {vocab_size} in the model of model.path; resume with the model that started the run"
        )


def step_number(checkpoint: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(checkpoint.name.removeprefix("step_"))


def _steps(folder: Path) -> list[Path]:
    """Checkpoints with a final name, oldest first."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{6,12}", path.name)]
    return sorted(found, key=step_number)


def _discard(path: Path) -> None:
    """Rename a checkpoint, then delete it: no folder with a final name is half deleted.

    The other name differs from that of a new checkpoint of the same step, which may be complete already.
    """
    discarded = path.with_name(f"{path.name}.discarded.partial")
    os.replace(path, discarded)
    _delete(discarded)


def _delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
