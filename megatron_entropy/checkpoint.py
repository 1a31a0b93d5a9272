"""What a run resumes from: sharded weights and optimizer state, and where the stage stood.

A checkpoint is a folder `step_000010` with `shards/` (written by `megatron.core.dist_checkpointing`, readable under
any layout) and `state.json` with the position of the stage and the size of every file. It is written under a temporary
name and renamed when complete, so that a folder with the final name is whole unless it was damaged later; `newest`
checks sizes and says why it passes over a damaged one.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_entropy import parallel
from megatron_entropy.actor.actor import Actor
from megatron_entropy.actor.state import restore, sharded_state
from megatron_entropy.errors import CheckpointError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Where a stage stands: steps done, optimizer steps taken, prompts drawn; `fingerprint` of its settings."""

    step: int
    updates: int
    position: int
    fingerprint: str


def save(folder: Path, actor: Actor, progress: Progress, *, keep: int) -> None:
    """Write a checkpoint and drop all but the newest `keep`; a collective.

    Args:
        folder: of the stage's checkpoints.
    """
    from megatron.core import dist_checkpointing

    final = folder / f"step_{progress.step:06d}"
    partial = folder / f"{final.name}.partial"
    if parallel.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "shards").mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(sharded_state(actor, is_loading=False), str(partial / "shards"))
    dist.barrier()
    if parallel.rank() == 0:
        sizes = {str(f.relative_to(partial)): f.stat().st_size for f in sorted(partial.rglob("*")) if f.is_file()}
        text = json.dumps({**dataclasses.asdict(progress), "files": sizes}, indent=2)
        (partial / "state.json").write_text(text)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for old in sorted(folder.glob("step_??????"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def newest(folder: Path) -> tuple[Path, Progress] | None:
    """The newest complete checkpoint of a stage, or None; damaged ones are passed over with a warning."""
    for candidate in sorted(folder.glob("step_??????"), reverse=True):
        try:
            state = json.loads((candidate / "state.json").read_text())
            for name, size in state.pop("files").items():
                found = (candidate / name).stat().st_size
                if found != size:
                    raise CheckpointError(f"{name} has {found} bytes instead of {size}")
            return candidate, Progress(**state)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("checkpoint %s is damaged and passed over: %s", candidate, error)
    return None


def load(path: Path, actor: Actor, progress: Progress) -> None:
    """Read a checkpoint into an actor of any layout; a collective."""
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load(sharded_state(actor, is_loading=True), str(path / "shards"))
    restore(actor, loaded, updates=progress.updates)
