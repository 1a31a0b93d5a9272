"""Paths under a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run; `config.output` is its root.

    ```
    config.toml  metrics.jsonl  summary.json  report.html  plots/        of the whole run
    hf/  adapter/                                                        the last stage's model, and its LoRA adapter
    tensorboard/STAGE/  rollouts/STAGE/step_000001.jsonl  eval/STAGE/step_000001.jsonl
    checkpoints/STAGE/step_000001/  stages/STAGE/{hf,adapter}/           of one stage
    benchmarks/PRESET/                                                   evaluations of the last stage's model
    ```
    """

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.toml"

    @property
    def metrics(self) -> Path:
        """Metrics of every step, one JSON object a line."""
        return self.root / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """One entry per finished stage."""
        return self.root / "summary.json"

    @property
    def report(self) -> Path:
        """The page with plots and tables."""
        return self.root / "report.html"

    @property
    def plots(self) -> Path:
        """PNG files of the report."""
        return self.root / "plots"

    @property
    def benchmarks(self) -> Path:
        """Evaluations of the exported model by `megatron-entropy eval`, one folder each."""
        return self.root / "benchmarks"

    def tensorboard(self, stage: str) -> Path:
        """Event files of a stage."""
        return self.root / "tensorboard" / stage

    def rollouts(self, stage: str, step: int) -> Path:
        """Samples of a training step, one JSON object a line."""
        return self.root / "rollouts" / stage / f"step_{step:06d}.jsonl"

    def evaluation(self, stage: str, step: int) -> Path:
        """Samples of an evaluation after `step` steps, one JSON object a line."""
        return self.root / "eval" / stage / f"step_{step:06d}.jsonl"

    def checkpoints(self, stage: str) -> Path:
        """Folder of a stage's checkpoints."""
        return self.root / "checkpoints" / stage

    def export(self, stage: str, last: bool) -> Path:
        """Hugging Face folder that a stage exports; the last stage's is the result of the run."""
        return self.root / "hf" if last else self.root / "stages" / stage / "hf"

    def adapter(self, stage: str, last: bool) -> Path:
        """LoRA adapter in PEFT's format, beside the model with the adapter merged in; only of a stage with LoRA."""
        return self.export(stage, last).with_name("adapter")
