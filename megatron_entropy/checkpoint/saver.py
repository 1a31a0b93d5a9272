"""What a run resumes from: sharded weights and optimizer state, and where the stage stood.

A checkpoint is a folder `step_000010` with `shards/` (the format of `megatron.core.dist_checkpointing`, readable under
any layout) and `state.json` (`manifest.py`). `Saver` writes it beside training: the ranks plan and copy their tensors
at once, which training waits for, and each writes its copy in a thread. When all bytes of all ranks are on disk, rank 0
writes `state.json` and renames the folder from `step_000010.partial`, so that one with a final name is whole unless it
was damaged later. `newest` compares every byte with its checksum and says why it passes over a damaged one.

Random numbers need no place in it. What is drawn is drawn from seeds that depend on the run's seed and the place alone:
prompts on epoch and position, samples on stage, step, prompt and number (on the engines, which keep no state between
requests), and every step seeds the generators of `random`, `numpy`, torch and Megatron anew on each rank
(`seeds.seed_generators`), for methods and layers that use them.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_entropy.actor.actor import Actor
from megatron_entropy.actor.lora import is_adapter
from megatron_entropy.checkpoint.sharded_state import global_shapes, restore, sharded_state
from megatron_entropy.checkpoint.snapshot import Snapshot, Written
from megatron_entropy.distributed import process_groups
from megatron_entropy.errors import CheckpointError, Fault
from megatron_entropy.weights import manifest
from megatron_entropy.weights.manifest import FileRecord

log = logging.getLogger(__name__)

SHARDS = "shards"


@dataclass(frozen=True)
class Progress:
    """Where a stage stands.

    `step`: steps done. `updates`: optimizer steps taken, which is also where the learning-rate schedule stands.
    `position`: prompts drawn. `fingerprint`: of the stage's settings. `method`: `Method.state()`.
    """

    step: int
    updates: int
    position: int
    fingerprint: str
    method: dict[str, Any] = field(default_factory=dict)


class Saver:
    """Writes the checkpoints of one stage, each while training goes on.

    It takes a copy of the rank's share of the tensors in host memory until they are written. One checkpoint is written
    at a time. A checkpoint that cannot be written stops the run: going on would be training that a crash loses.

    Args:
        folder: of the stage's checkpoints; made by the first save.
        keep: complete checkpoints that stay.
        asynchronous: False: `save` returns when the checkpoint is complete, and nothing is copied.
    """

    def __init__(self, folder: Path, *, keep: int, asynchronous: bool) -> None:
        """Connect the ranks' writers; a collective."""
        self._folder = folder
        self._keep = keep
        self._asynchronous = asynchronous
        self._group: Any = dist.new_group(
            backend="gloo"
        )  # of their own, so that they need not wait for training's turn
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, actor: Actor, progress: Progress) -> None:
        """Start a checkpoint, once the one before is complete; a collective.

        Raises:
            Fault: on every rank, when this one or the one before could not be written.
        """
        self.wait()
        final = self._folder / f"step_{progress.step:06d}"
        partial = final.with_name(f"{final.name}.partial")
        process_groups.run_on_rank_zero(lambda: self._prepare(final, partial))
        snapshot = Snapshot(sharded_state(actor, is_loading=False), partial / SHARDS, copy=self._asynchronous)
        content = {
            "progress": dataclasses.asdict(progress),
            "layout": actor.config.parallel.model_dump(),
            "model": dataclasses.asdict(actor.arch),
        }
        self._thread = threading.Thread(
            target=self._complete, args=(snapshot, final, partial, content), name="checkpoint", daemon=True
        )
        self._thread.start()
        if not self._asynchronous:
            self.wait()

    def check(self) -> None:
        """Raise what went wrong with a save, without waiting for one that goes on; a collective, on rank 0's word."""
        failure = process_groups.broadcast_object(self._failure)
        if failure is not None:
            self._failure = None
            raise failure

    def wait(self) -> None:
        """Return when the last save is complete; no collective.

        Raises:
            Fault: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Let the last save end, whatever else has failed meanwhile."""
        try:
            self.wait()
        except Exception as error:
            if process_groups.rank() == 0:
                log.error("%s", error)
        dist.destroy_process_group(self._group)

    def _prepare(self, final: Path, partial: Path) -> None:
        """Rank 0: an empty folder for the new checkpoint, on a disk that takes files."""
        try:
            for leftover in self._folder.glob("*.partial"):
                shutil.rmtree(leftover)
            (partial / SHARDS).mkdir(parents=True)
            probe = partial / "probe"
            probe.write_bytes(bytes(2**20))  # a full disk shows here, before Megatron writes with others waiting
            probe.unlink()
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise self._fault(final, error) from None

    def _complete(self, snapshot: Snapshot, final: Path, partial: Path, content: dict[str, Any]) -> None:
        """What the thread does: write, hear of the others, and on rank 0 publish."""
        try:
            try:
                outcome: Written | BaseException = snapshot.write()
            except Exception as error:
                outcome = self._fault(final, error)
            outcomes: list[Any] = [None] * dist.get_world_size() if process_groups.rank() == 0 else []
            dist.gather_object(outcome, outcomes or None, dst=0, group=self._group)
            verdict: list[BaseException | None] = [None]
            if process_groups.rank() == 0:
                verdict[0] = self._conclude(snapshot, outcomes, final, partial, content)
            dist.broadcast_object_list(verdict, src=0, group=self._group)
            self._failure = verdict[0]
        except Exception as error:  # another rank has gone
            self._failure = error

    def _conclude(
        self, snapshot: Snapshot, outcomes: list[Any], final: Path, partial: Path, content: dict[str, Any]
    ) -> BaseException | None:
        failure = next((outcome for outcome in outcomes if isinstance(outcome, BaseException)), None)
        if failure is None:
            try:
                snapshot.write_index(outcomes)
                files = {f"{SHARDS}/{name}": record for rank in outcomes for name, record in rank.files.items()}
                for path in (partial / SHARDS).iterdir():
                    name = f"{SHARDS}/{path.name}"
                    files[name] = files.get(name) or FileRecord.of(path)
                manifest.verify(partial, files, checksums=False)  # do all nodes write into the same folder?
                manifest.write(partial, content, files)
                self._publish(final, partial)
                return None
            except Exception as error:
                failure = self._fault(final, error)
        shutil.rmtree(partial, ignore_errors=True)
        return failure

    def _publish(self, final: Path, partial: Path) -> None:
        """Give the checkpoint its name; drop those of a future that was not resumed, and all but the newest."""
        if final.exists():
            _discard(final)
        os.replace(partial, final)
        manifest.sync(self._folder)
        steps = _steps(self._folder)
        past = steps[: steps.index(final) + 1]
        for unwanted in set(steps) - set(past[-self._keep :]):
            _discard(unwanted)

    def _fault(self, final: Path, error: Exception) -> Exception:
        """A line for the user where the operating system has refused, the error itself otherwise."""
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, OSError):
            reason = f"{cause.strerror or cause}" + (f": {cause.filename}" if cause.filename else "")
        elif isinstance(error, CheckpointError):
            reason = f"{error}; checkpoints need a folder that all nodes share"
        else:
            return RuntimeError(f"checkpoint {final}: {type(error).__name__}: {error}")
        kept = [step.name for step in _steps(self._folder)]
        stays = f"{kept[-1]} is the last good one" if kept else "there is none before it"
        return Fault(f"checkpoint {final} could not be written ({reason}); {stays}; mend that and go on with --resume")


def newest(folder: Path) -> tuple[Path, Progress] | None:
    """The newest whole checkpoint of a stage, or None before the first; warns of every one it passes over.

    Raises:
        CheckpointError: there are checkpoints and every one is damaged.
    """
    for partial in sorted(folder.glob("*.partial")):
        log.warning("checkpoint %s was never completed and is passed over", partial)
    damaged = []
    for candidate in reversed(_steps(folder)):
        try:
            content, files = manifest.read(candidate)
            manifest.verify(candidate, files)
            return candidate, Progress(**content["progress"])
        except (CheckpointError, KeyError, TypeError) as error:
            reason = str(error) if isinstance(error, CheckpointError) else f"{manifest.NAME} holds no progress"
            log.warning("checkpoint %s is damaged and passed over: %s", candidate, reason)
            damaged.append(f"{candidate.name}: {reason}")
    if damaged:
        raise CheckpointError(
            f"{folder}: every checkpoint is damaged ({'; '.join(damaged)}); put a copy back, or start over with "
            "--overwrite"
        )
    return None


def load(path: Path, actor: Actor, progress: Progress) -> None:
    """Read a checkpoint into an actor of any layout; a collective.

    Raises:
        CheckpointError: on every rank, when it is of another model.
    """
    from megatron.core import dist_checkpointing

    state = sharded_state(actor, is_loading=True)
    wanted: list[dict[str, tuple[int, ...]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(wanted, global_shapes(state))
    merged = {name: shape for rank in wanted for name, shape in rank.items()}
    process_groups.run_on_rank_zero(lambda: _check_model(path, merged, actor.arch.vocab_size))
    loaded: Any = dist_checkpointing.load(state, str(path / SHARDS))
    restore(actor, loaded, updates=progress.updates)


def _check_model(path: Path, wanted: dict[str, tuple[int, ...]], vocab_size: int) -> None:
    """Compare the model's tensors with the checkpoint's, by their global shapes."""
    found = {name: tensor.shape for name, tensor in manifest.tensors(path / SHARDS).items()}
    names = sorted(wanted.keys() | found.keys(), key=lambda n: (n.startswith("optimizer."), not is_adapter(n), n))
    same = "model and actor.lora" if any(is_adapter(name) for name in names) else "model"
    for name in names:
        here, there = wanted.get(name), found.get(name)
        if here != there:
            raise CheckpointError(
                f"{path} is of another model: tensor {name} is {there or 'missing'} in it and {here or 'missing'} in "
                f"the model of model.path; resume with the {same} the run was started with, or choose another --output"
            )
    rows = manifest.read(path)[0]["model"]["vocab_size"]
    if rows != vocab_size:  # hidden by the padding
        raise CheckpointError(
            f"{path} is of another model: tensor embedding.word_embeddings.weight has {rows} rows without padding in "
            f"it and {vocab_size} in the model of model.path; resume with the model the run was started with"
        )


def _steps(folder: Path) -> list[Path]:
    """Checkpoints with a final name, oldest first."""
    return sorted(path for path in _listed(folder) if re.fullmatch(r"step_\d{6,}", path.name))


def _listed(folder: Path) -> Iterator[Path]:
    return folder.iterdir() if folder.is_dir() else iter(())


def _discard(path: Path) -> None:
    """Delete a checkpoint, which loses its name first: a folder with a final name is whole."""
    doomed = path.with_name(f"{path.name}.partial")
    os.replace(path, doomed)
    shutil.rmtree(doomed)
