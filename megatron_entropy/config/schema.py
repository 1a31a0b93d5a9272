"""Configuration: a TOML file, dotted command-line overrides, defaults that are the vetted setting.

`load(path, overrides, method_configs)` reads a file into one `Config` per stage. A file describes one training run;
a `[[stages]]` list makes it several in a row, each stage being the file's top level with the stage's own keys laid
over it, and each starting from the model the one before it exported. Overrides (`--actor.parallel.tp=2`) apply to
every stage, `--stages.NAME.KEY=VALUE` to one.

Unknown keys are errors that name the nearest known key; `check` compares the fields with one another and with the
model's shape before anything starts. Importing this module imports neither torch nor any engine.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializeAsAny,
    model_validator,
)

from megatron_entropy.config.architecture import ModelArchitecture
from megatron_entropy.errors import ConfigError


class Section(BaseModel):
    """A table of the file; keys it does not know are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class MethodConfig(Section):
    """What every method's settings have in common; each method file derives its own."""

    name: str


class ModelConfig(Section):
    """The model to start from; later stages default to what the stage before exported."""

    path: str = ""
    """Hugging Face folder: `config.json`, safetensors, tokenizer."""
    reference: str = ""
    """Folder of another reference model or teacher, of the same shape; empty: the model itself."""


class DataConfig(Section):
    """Questions to train and to evaluate on."""

    train: list[str] = []
    """JSONL or parquet files."""
    eval: list[str] = []
    columns: str = "auto"
    """Schema of the rows (see `data/schemas.py`), or `auto` to tell it from the columns."""
    tokenizer: str = ""
    """Folder or `tokenizer.model`; empty: the model's folder."""
    template: str = ""
    """`{question}` with text around it; empty: the tokenizer's chat template, else the question and a newline."""
    system: str = ""
    """A system message put before every conversation (chat templates only)."""
    chat_options: dict[str, bool | int | str] = {}
    """Further names for the chat template, such as `enable_thinking`."""
    max_prompt_tokens: PositiveInt = 1024
    """Longer prompts are left out, counted and reported."""


class ParallelConfig(Section):
    """The layout of the trainer's ranks: `tp * pp * cp * dp` of them."""

    tp: PositiveInt = 1
    pp: PositiveInt = 1
    vpp: PositiveInt = 1
    """Model chunks per pipeline stage (interleaved schedule when above 1)."""
    dp: PositiveInt = 1
    cp: PositiveInt = 1
    """Context parallel ranks; only 1 for now (packs are not cut along the sequence)."""
    ep: PositiveInt = 1
    """Expert parallel ranks, out of the `tp * dp` of a pipeline stage (mixture-of-experts models)."""
    etp: PositiveInt = 1
    """Tensor parallel ranks of one expert."""
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    """Shard the optimizer state over data-parallel ranks (ZeRO-1)."""

    @property
    def world_size(self) -> int:
        """Number of trainer ranks."""
        return self.tp * self.pp * self.cp * self.dp


class OptimizerConfig(Section):
    """AdamW with warm-up and decay, in optimizer steps."""

    lr: float = Field(default=1e-6, ge=0)
    min_lr: float = Field(default=0.0, ge=0)
    warmup_steps: NonNegativeInt = 0
    warmup_lr: float = Field(default=0.0, ge=0)
    """Where the warm-up begins."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    decay_steps: NonNegativeInt = 0
    """Steps at whose end `min_lr` is reached, warm-up included; 0: those of the stage."""
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    clip_grad: float = Field(default=1.0, ge=0)
    """Global gradient norm above which gradients are scaled down; 0: never."""

    @model_validator(mode="after")
    def _is_in_order(self) -> OptimizerConfig:
        for name in ("min_lr", "warmup_lr"):
            if getattr(self, name) > self.lr:
                raise ValueError(f"{name}={getattr(self, name)} is above lr={self.lr}")
        if 0 < self.decay_steps <= self.warmup_steps:
            raise ValueError(f"decay_steps={self.decay_steps} must be above warmup_steps={self.warmup_steps}")
        return self


LINEARS = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
"""Megatron's linear layers, in their order in a layer, and the Hugging Face modules that each of them fuses."""


class LoraConfig(Section):
    """Low-rank adapters on linear layers (LoRA, Hu et al. 2021, arXiv 2106.09685); all other weights stay fixed.

    An adapter adds `alpha / rank * up @ down` to its weight. Checkpoints hold adapters only; the model folder a stage
    exports has them folded in, and `adapter/` beside it holds them in PEFT's format.
    """

    rank: NonNegativeInt = 0
    """Columns of `up`, rows of `down`; 0: no adapters, every weight is trained."""
    alpha: float = Field(default=32.0, gt=0)
    targets: list[str] = ["all-linear"]
    """Hugging Face names of the modules that get adapters (`q_proj`, ...), or `all-linear`: all of the attention and,
    where there are no experts, of the feed-forward layers. Those that Megatron fuses (query, key and value; gate and
    up) share `down` and come together."""

    @property
    def scale(self) -> float:
        """What `up @ down` is multiplied with."""
        return self.alpha / self.rank

    def linears(self, arch: ModelArchitecture) -> list[str]:
        """Megatron's names of the linear layers that get adapters; empty where `rank` is 0.

        Raises:
            ConfigError: for a target the model has not, a part of a fused layer without the others, or experts.
        """
        if not self.rank:
            return []
        known = {linear: parts for linear, parts in LINEARS.items() if arch.moe is None or "fc" not in linear}
        if self.targets == ["all-linear"]:
            return list(known)
        modules = [part for parts in known.values() for part in parts]
        if wrong := [target for target in self.targets if target not in modules]:
            expert = any(wrong[0] in parts for parts in LINEARS.values())
            what = "a part of the experts, which take no adapters" if expert else "no linear layer of the model"
            raise ConfigError(
                f"actor.lora.targets: {wrong[0]} is {what}; known are {', '.join(modules)}, and all-linear alone"
            )
        if not self.targets:
            raise ConfigError("actor.lora.targets is empty; all-linear is every layer, actor.lora.rank=0 is no LoRA")
        for parts in known.values():
            missing = [part for part in parts if part not in self.targets]
            if 0 < len(missing) < len(parts):
                raise ConfigError(
                    f"actor.lora.targets: {', '.join(parts)} share an adapter, because Megatron fuses them; add "
                    f"{' and '.join(missing)}"
                )
        return [linear for linear, parts in known.items() if parts[0] in self.targets]


class ActorConfig(Section):
    """The Megatron-Core model that is trained."""

    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 on a GPU, float32 on a CPU."""
    fp8: Literal["", "tensorwise", "blockwise"] = ""
    """FP8 linear layers (Transformer Engine, Hopper or newer); the head stays in bfloat16."""
    max_tokens_per_microbatch: PositiveInt = 8192
    """Most tokens in one packed micro-batch of a data-parallel rank."""
    recompute: Literal["none", "full"] = "none"
    """`full`: activations of each layer are recomputed in backward."""
    reference_on_host: bool = False
    """Keep the reference model or teacher of a method in host memory between its passes."""


class RolloutConfig(Section):
    """vLLM engines and how they sample."""

    num_engines: PositiveInt = 1
    tensor_parallel: PositiveInt = 1
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_response_tokens: PositiveInt = 2048
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    max_num_seqs: PositiveInt = 256
    """Most sequences an engine decodes at a time."""
    kv_cache_gib: PositiveInt = 1
    """KV cache of an engine on a CPU."""
    gpu_memory_utilization: float = Field(default=0.6, gt=0, le=1)
    colocate: bool = False
    """Engines on the trainer's GPUs take turns with it: one side's memory is away while the other works."""
    weight_transfer: Literal["auto", "shared_memory", "gloo", "nccl"] = "auto"
    """What carries the weights to the engines. `auto`: nccl where they have GPUs beside the trainer's; else memory that
    all share on one machine, gloo over several."""
    verify_weights: bool = False
    """Compare checksums of all weights that are pushed before and after they travel; a difference ends the run."""
    max_restarts: NonNegativeInt = 3
    """How often each engine may die and be started again."""
    record: str = ""
    """Folder to write the engines' answers to."""
    replay: str = ""
    """Folder to take the answers from: no engine is started."""


class RewardConfig(Section):
    """How an answer is checked."""

    verifier: str = "math_verify"
    workers: PositiveInt = 2
    timeout: float = Field(default=10.0, gt=0)
    """Seconds one answer may take before its worker is killed."""


class BatchConfig(Section):
    """The size of a step."""

    prompts: PositiveInt = 128
    samples: PositiveInt = 8
    """Responses per prompt."""
    updates: PositiveInt = 1
    """Optimizer steps per rollout batch: it is cut into this many mini-batches of whole groups."""


class EvalConfig(Section):
    """Accuracy, entropy and length on the test files, before, during and after training."""

    every: NonNegativeInt = 0
    """Steps between evaluations; 0: only before and after."""
    samples: PositiveInt = 1
    temperature: float = Field(default=1.0, gt=0)
    limit: NonNegativeInt = 0
    """First so many test questions; 0: all."""


class CheckpointConfig(Section):
    """What a run can be resumed from."""

    every: NonNegativeInt = 50
    """Steps between checkpoints; 0: only at the end and on a stop signal."""
    keep: PositiveInt = 2
    """Newest complete checkpoints that stay."""
    asynchronous: bool = True
    """Train on while a checkpoint is written, for a copy of weights and optimizer state in host memory."""


class LogConfig(Section):
    """Where metrics go beside `metrics.jsonl`."""

    tensorboard: bool = True
    wandb_project: str = ""
    rollouts_every: NonNegativeInt = 1
    """Steps between rollout dumps; 0: none."""


class Config(Section):
    """One stage of training."""

    output: str = "runs/default"
    """Folder for everything the run writes."""
    name: str = "train"
    """Name of the stage."""
    seed: NonNegativeInt = 1
    steps: PositiveInt
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    method: SerializeAsAny[MethodConfig]
    actor: ActorConfig = ActorConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    batch: BatchConfig = BatchConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def fingerprint(self) -> str:
        """Short hash of every setting that changes the numbers of a run; a resume compares it."""
        settings = self.model_dump(mode="json", exclude={"output", "steps", "checkpoint", "log", "eval"})
        settings["actor"].pop("parallel")
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
