"""Completions from the engines, always by the actor's present weights.

`RolloutService` lies between whoever needs completions and the engine pool. It syncs the weights when they have
changed, replaces engines that die, gives the GPUs to colocated engines and back, and records or replays completions.
It knows nothing of methods, samples or grading.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_entropy.config.schema import RolloutConfig
from megatron_entropy.distributed import process_groups
from megatron_entropy.errors import EngineLost
from megatron_entropy.monitor.timer import StepTimer
from megatron_entropy.rollout import recording
from megatron_entropy.rollout.engine import Completion, Request
from megatron_entropy.rollout.pool import EnginePool
from megatron_entropy.trainer.colocation import EngineTurn, Offloadable
from megatron_entropy.weights.sync import WeightSync

log = logging.getLogger(__name__)


class RolloutService:
    """Answers generation requests; every method is a collective, the completions are on rank 0 only.

    `version`: number of the weights that the engines have, counted from 1; 0 before the first sync.
    """

    def __init__(
        self,
        config: RolloutConfig,
        *,
        actor: Offloadable,
        weight_sync: WeightSync | None,
        pool: EnginePool | None,
        timer: StepTimer,
    ) -> None:
        """Connect the actor with the engines.

        Args:
            actor: offloaded already, if the engines are colocated.
            weight_sync: from the actor to the engines, on every rank; None when the stage uses no engines.
            pool: the engines, on rank 0 only.
            timer: of the step, for the phases `weight_sync` and `generate`.
        """
        self.version = 0
        self._config = config
        self._weight_sync = weight_sync
        self._pool = pool
        self._timer = timer
        self._weights_are_stale = True
        self._turn = EngineTurn(actor, pool, is_colocated=config.colocate and weight_sync is not None)

    def weights_changed(self) -> None:
        """Sync the actor's weights to the engines before they generate the next time."""
        self._weights_are_stale = True

    def generate(
        self,
        requests: Sequence[Request],
        *,
        description: str,
        file: Path,
        on_finished: Callable[[Sequence[Completion]], None] | None = None,
    ) -> list[Completion]:
        """Answer all requests.

        Args:
            requests: the same on every rank, with different keys.
            description: for the progress bar and the log.
            file: where `rollout.record` and `rollout.replay` keep these completions, relative to their folder.
            on_finished: called on rank 0 with the completions that an engine has just finished, often with none; each
                completion comes once. Replayed completions do not come.
        Returns:
            On rank 0 one completion per request, in the same order; elsewhere nothing.
        Raises:
            EngineFault: on every rank, when an engine has died more often than `rollout.max_restarts`.
            Fault: on every rank, when replayed completions do not answer these requests.
        """
        completions = [] if self._config.replay else self._generate(requests, description, on_finished)

        def record_or_replay() -> None:
            if self._config.replay:
                source = Path(self._config.replay) / file
                completions.extend(recording.read(source, requests, needs_entropy=self._config.entropy))
            if self._config.record:
                recording.write(Path(self._config.record) / file, requests, completions)

        if self._config.replay or self._config.record:
            process_groups.run_on_rank_zero(record_or_replay)
        return completions

    def close(self) -> None:
        """Leave the weight-sync group; the engines stay for the next stage."""
        if self._weight_sync is not None:
            self._weight_sync.close()

    def _generate(
        self,
        requests: Sequence[Request],
        description: str,
        on_finished: Callable[[Sequence[Completion]], None] | None,
    ) -> list[Completion]:
        """Let the engines answer; those that die are replaced and get the weights again."""
        answered: dict[tuple[int, ...], Completion] = {}

        def generate_missing() -> bool:
            """Return whether an engine died, so that requests may be left."""
            missing = [request for request in requests if request.key not in answered]
            completions, dead = self._engines.generate(missing, description, on_finished)
            answered.update({completion.key: completion for completion in completions})
            self._engines.restart(dead)
            return bool(dead)

        with self._turn():
            if self._weights_are_stale or self._turn.is_colocated:  # colocated engines lose their weights asleep
                self.version += self._weights_are_stale
                self._sync_weights()
                self._weights_are_stale = False
            with self._timer("generate"):
                while process_groups.run_on_rank_zero(generate_missing):
                    self._sync_weights()
        return [answered[request.key] for request in requests] if answered else []

    def _sync_weights(self) -> None:
        """Send the weights to every engine; if engines die meanwhile, restart them and sync all again."""
        with self._timer("weight_sync"):
            while lost := self._try_sync():
                process_groups.run_on_rank_zero(functools.partial(self._restart, lost))

    def _try_sync(self) -> tuple[int, ...]:
        """Sync once; returns the engines that were lost."""
        weight_sync = self._weight_sync
        assert weight_sync is not None, "the stage was built without engines"

        def sync() -> tuple[int, ...]:
            try:
                weight_sync.sync(self.version, self._engines.clients())
            except EngineLost as lost:
                log.warning("weight sync failed: %s", lost.reason)
                return lost.indices
            return ()

        self._turn.return_to_actor()
        # Rank 0 must not fail once the other ranks are inside the sync: they would wait for it.
        process_groups.run_on_rank_zero(lambda: self._engines.wait_ready())
        self._turn.offload_actor(keep_weights=True)
        lost = self._turn.wake("weights")
        if not lost:
            if process_groups.rank() != 0:
                weight_sync.sync(self.version, None)
            lost = process_groups.run_on_rank_zero(sync)
        self._turn.offload_actor()
        return lost or self._turn.wake("kv_cache")

    def _restart(self, indices: Sequence[int]) -> None:
        self._engines.restart(indices)
        self._engines.wait_ready()

    @property
    def _engines(self) -> EnginePool:
        assert self._pool is not None, "only rank 0 calls the engines"
        return self._pool
