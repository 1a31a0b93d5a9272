"""Every configuration key with its type, default and meaning; `megatron-entropy config` prints this file's docstrings.

The defaults are the tested setting. `config.load` reads a TOML file into these classes, `config.check` compares the
values with one another and with the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, SerializerFunctionWrapHandler, model_serializer, model_validator

from megatron_entropy.config.cluster import ClusterConfig
from megatron_entropy.config.fp8 import Fp8Config
from megatron_entropy.config.performance import PerformanceConfig
from megatron_entropy.config.types import (
    Betas,
    LearningRate,
    NonNegativeFloat,
    NonNegativeInt,
    PathList,
    PathText,
    PositiveFloat,
    PositiveInt,
    Processes,
    Section,
    ServerUrl,
    StageName,
    Temperature,
    TextList,
)


class MethodConfig(Section):
    """Base class of every method's settings.

    Setting a key that has no effect is an error. `unused` lists the inherited keys that the method never reads,
    `unused_with` the keys that one value of another key makes ineffective: `{("guided", True): ("temperature",)}`. The
    entries of all base classes count. A written configuration leaves such keys out.
    """

    unused: ClassVar[tuple[str, ...]] = ()
    unused_with: ClassVar[Mapping[tuple[str, object], tuple[str, ...]]] = {}

    name: str
    """Training method: a name listed by `megatron-entropy config method`, or `package.module:ConfigClass`."""

    def unused_keys(self) -> dict[str, str]:
        """Return the keys that have no effect, each with the setting that makes it so."""
        found = {}
        for base in type(self).__mro__:
            found |= dict.fromkeys(base.__dict__.get("unused", ()), f'method.name="{self.name}"')
            for (switch, value), keys in base.__dict__.get("unused_with", {}).items():
                if getattr(self, switch) == value:
                    found |= dict.fromkeys(keys, f"method.{switch}={json.dumps(value)}")
        return found

    @model_serializer(mode="wrap")
    def _without_unused_keys(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unused = self.unused_keys()
        return {key: value for key, value in write(self).items() if key not in unused}


class ModelConfig(Section):
    """The model that training starts from."""

    path: PathText = ""
    """Hugging Face folder (`config.json`, safetensors, tokenizer). Empty: the model the previous stage exported, so
    only the first stage must set it."""
    reference: PathText = ""
    """Hugging Face folder of another reference model or teacher of the same architecture. Empty: the model itself."""


class DataConfig(Section):
    """Training and eval data."""

    train: PathList = []
    """JSONL, JSON, CSV or parquet files of the training data, or `reasoning-gym:NAMES` (see docs/data.md)."""
    eval: PathList = []
    """The same for the eval data (the test questions). Empty: no evaluation."""
    format: str = "auto"
    """Schema of the rows, which names their columns: `auto` (detected for each file), a known name, or
    `package.module:NAME`."""
    columns: dict[str, str] = {}
    """Columns with other names in your files: `columns.question = "q"` reads the column `q` as `question`. Holds for
    every file of `train` and `eval`."""
    tokenizer: PathText = ""
    """Folder with a tokenizer, or a `tokenizer.model` file. Empty: the model's folder."""
    template: str = ""
    """Prompt text with `{question}` in it. Empty: the tokenizer's chat template, or without one the question and a
    newline."""
    system: str = ""
    """System message before every conversation; needs a chat template."""
    chat_options: dict[str, bool | int | str] = {}
    """Further variables of the chat template, such as `enable_thinking`."""
    max_prompt_tokens: PositiveInt = 1024
    """Longest prompt in tokens; rows with a longer one are skipped, counted and reported."""


class ParallelConfig(Section):
    """Layout of the trainer: it runs on `tp * pp * cp * dp` ranks."""

    tp: Processes = 1
    """Tensor parallel ranks."""
    pp: Processes = 1
    """Pipeline parallel ranks."""
    vpp: Processes = 1
    """Model chunks per pipeline rank; above 1 the schedule is interleaved."""
    dp: Processes = 1
    """Data parallel ranks."""
    cp: Processes = 1
    """Context parallel ranks: each holds two of the 2 `cp` chunks of every sequence, padded to whole chunks."""
    ep: Processes = 1
    """Expert parallel ranks, out of the `tp * cp * dp` ranks of a pipeline stage (mixture-of-experts models)."""
    etp: Processes = 1
    """Tensor parallel ranks of one expert."""
    sequence_parallel: bool = False
    """Split activations between tensor parallel ranks along the sequence; needs `tp` above 1."""
    distributed_optimizer: bool = False
    """Shard the optimizer state over data and context parallel ranks (ZeRO-1)."""

    @property
    def world_size(self) -> int:
        """Number of trainer ranks."""
        return self.tp * self.pp * self.cp * self.dp


class OptimizerConfig(Section):
    """AdamW with a learning rate schedule, counted in optimizer steps."""

    lr: LearningRate = 1e-6
    """Peak learning rate."""
    min_lr: LearningRate = 0.0
    """Learning rate at the end of the decay."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up from `warmup_lr` to `lr`. verl counts training steps, with rate 0 in all of the
    first: multiply its number by `batch.updates`, and the rates agree at the first update of every training step."""
    warmup_lr: LearningRate = 0.0
    """Learning rate at the start of the warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the decay after the warm-up."""
    decay_steps: NonNegativeInt = 0
    """Optimizer steps, warm-up included, after which `min_lr` is reached. 0: all of the stage."""
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = 0.01
    """Decoupled weight decay of matrices; norms and biases have none."""
    betas: Betas = (0.9, 0.999)
    """Decay rates of Adam's two moments."""
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """Adam's epsilon."""
    clip_grad: NonNegativeFloat = 1.0
    """Global gradient norm above which gradients are scaled down. 0: no clipping."""

    @model_validator(mode="after")
    def _check_order(self) -> OptimizerConfig:
        for name in ("min_lr", "warmup_lr"):
            if getattr(self, name) > self.lr:
                raise ValueError(f"{name}={getattr(self, name)} is above lr={self.lr}")
        if 0 < self.decay_steps <= self.warmup_steps:
            raise ValueError(f"decay_steps={self.decay_steps} must be above warmup_steps={self.warmup_steps}")
        return self


class LoraConfig(Section):
    """Low-rank adapters on linear layers (LoRA, Hu et al. 2021, arXiv 2106.09685); all other weights are frozen.

    An adapter adds `alpha / rank * up @ down` to its weight. Checkpoints hold the adapters only. The model folder that
    a stage exports has them merged, and `adapter/` beside it holds them in PEFT's format.
    """

    rank: NonNegativeInt = 0
    """Rank of the adapters. 0: no adapters, every weight is trained."""
    alpha: PositiveFloat = 32.0
    """Adapters are scaled by `alpha / rank`."""
    targets: TextList = ["all-linear"]
    """Hugging Face names of the modules that get adapters (`q_proj`, ...), or `all-linear`: every linear layer of
    attention and, without experts, of the feed-forward block. Modules that Megatron fuses (query, key and value; gate
    and up) share `down` and must be named together."""

    @property
    def scale(self) -> float:
        """Factor of `up @ down`."""
        return self.alpha / self.rank


class MoeConfig(Section):
    """Losses of the routers of a mixture-of-experts model, added to the method's: they change the objective."""

    aux_loss_coeff: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Coefficient of the load-balancing loss (Switch Transformers, arXiv 2101.03961) of a micro-batch, averaged over
    the tokens of a step. 0: none."""
    z_loss_coeff: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Coefficient of the squared logsumexp of the router's logits (ST-MoE, arXiv 2202.08906), averaged over the tokens
    of a step. 0: none."""


class ActorConfig(Section):
    """The trained Megatron-Core model."""

    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    fp8: Fp8Config = Fp8Config()
    performance: PerformanceConfig = PerformanceConfig()
    moe: MoeConfig = MoeConfig()
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights in forward and backward. `auto`: bfloat16 on a GPU; on a CPU for models
    at least 512 wide where the processor multiplies it (AMX-BF16, AVX512-BF16); else float32."""
    max_tokens_per_microbatch: PositiveInt = 8192
    """Largest number of tokens in one packed micro-batch, over all its context parallel ranks."""
    recompute: Literal["none", "full"] = "none"
    """`full`: recompute the activations of each layer in the backward pass, which saves memory."""
    reference_on_host: bool = False
    """Keep the reference model in host memory between its passes."""


class RolloutConfig(Section):
    """vLLM engines and their sampling parameters."""

    num_engines: Processes = 1
    """Number of engines; each holds a full copy of the model."""
    tensor_parallel: Processes = 1
    """Tensor parallel ranks of one engine."""
    nodes: list[str] = []
    """Host names or addresses of the nodes of a joined Ray cluster that engines may use. Empty: all."""
    temperature: Temperature = 1.0
    """Sampling temperature of training rollouts."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling threshold. 1: off."""
    max_response_tokens: PositiveInt = 2048
    """Longest response in tokens, end token included; for supervised methods the longest target."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the engines' weights. `auto`: as `actor.dtype`."""
    quantization: Literal["", "fp8_per_tensor", "fp8_per_block", "mxfp8"] = ""
    """vLLM's quantization of the linear layers while weights arrive: the trainer sends them as always, and every sync
    quantizes them again. Sampled log-probs then differ more from the trainer's: see `tis_cap`. Empty: none."""
    max_num_seqs: PositiveInt = 256
    """Largest number of sequences that an engine decodes at once."""
    kv_cache_gib: PositiveInt = 1
    """Largest KV cache of an engine on a CPU, in GiB; an engine whose sequences cannot fill it takes less."""
    gpu_memory_utilization: float = Field(default=0.6, gt=0, le=1)
    """Fraction of each GPU's memory that an engine takes."""
    colocate: bool = False
    """Run the engines on the trainer's GPUs; trainer and engines take turns, each offloading its memory."""
    weight_transfer: Literal["auto", "shared_memory", "cuda_ipc", "gloo", "nccl"] = "auto"
    """Transport of weights to the engines. `auto`: nccl for engines on GPUs of their own, else shared memory on one
    machine and gloo over several. `cuda_ipc`: colocated engines read the weights in GPU memory."""
    verify_weights: bool = False
    """Compare checksums of all synced weights on both sides; a difference ends the run."""
    max_restarts: NonNegativeInt = 3
    """Number of times each engine may die and be restarted."""
    entropy: bool = False
    """Record the full-vocabulary entropy of every token while it is sampled, and use it instead of the trainer's."""
    entropy_check_every: NonNegativeInt = 10
    """Training steps between two comparisons of these entropies with the trainer's. 0: never."""
    top_alternatives: int = Field(default=0, ge=0, le=20)
    """Most probable tokens that are recorded at every position, for the rollout dumps (`megatron-entropy view`)."""
    record: PathText = ""
    """Folder to record the engines' answers in. Empty: no recording."""
    replay: PathText = ""
    """Folder with recorded answers to use instead of engines. Empty: no replay."""


class RewardConfig(Section):
    """Grading of responses."""

    verifier: str = "math_verify"
    """Verifier: a name of `docs/graders.md` (`math_verify`, `boxed`, `choice`, ...), or `package.module:function`."""
    workers: int = Field(default=2, gt=0, le=1024)
    """Processes that grade. With `url` those of the server count."""
    timeout: float = Field(default=10.0, gt=0, le=86400)
    """Seconds that grading one response may take before its worker is killed. With `url` the server's limit counts."""
    budget: PositiveFloat = 60.0
    """Seconds that grading up to 1,000 responses may take in one call, proportionally more for more; the responses
    without a grade then count as errors."""
    url: ServerUrl = ""
    """Reward server (`megatron-entropy serve-rewards`) that grades, such as `http://127.0.0.1:19876`. Its token is read
    from the environment variable `MEGATRON_ENTROPY_REWARD_TOKEN`. Empty: processes of this machine grade."""


class BatchConfig(Section):
    """Size of a training step."""

    prompts: PositiveInt = 128
    """Prompts per step."""
    samples: PositiveInt = 8
    """Responses per prompt."""
    updates: PositiveInt = 1
    """Optimizer steps per training step: the rollouts are split into this many mini-batches of whole groups."""


class EvalConfig(Section):
    """Evaluation on `data.eval` before, during and after training: accuracy, entropy, length."""

    every: NonNegativeInt = 0
    """Training steps between evaluations. 0: only before the first and after the last step."""
    samples: PositiveInt = 1
    """Responses per eval prompt."""
    temperature: Temperature = 1.0
    """Sampling temperature of eval responses."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling threshold of eval responses. 1: off."""
    top_k: NonNegativeInt = 0
    """Number of most probable tokens that an eval response samples from. 0: all."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Divisor of the logits of tokens that the prompt or the response already has (negative logits are multiplied). 1:
    off."""
    max_response_tokens: NonNegativeInt = 0
    """Longest eval response in tokens, end token included. 0: `rollout.max_response_tokens`."""
    limit: NonNegativeInt = 0
    """Number of eval prompts, from the first row on. 0: all."""


class CheckpointConfig(Section):
    """Checkpoints that a run is resumed from."""

    every: NonNegativeInt = 50
    """Training steps between checkpoints. 0: only after the last step and on a stop signal."""
    keep: PositiveInt = 2
    """Number of complete checkpoints to keep, newest first."""
    asynchronous: bool = True
    """Write in the background; costs a copy of weights and optimizer state in host memory."""


class LogConfig(Section):
    """Outputs beside `metrics.jsonl`."""

    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb_project: str = ""
    """Weights & Biases project to log to. Empty: no logging there."""
    rollouts_every: NonNegativeInt = 1
    """Training steps between rollout dumps. 0: no dumps."""


class Config(Section):
    """Settings of one training stage: the top level of the file, or one of its `[[stages]]` tables."""

    output: PathText = "runs/default"
    """Run folder: everything the run writes goes there."""
    name: StageName = "train"
    """Name of the stage, unique in the file."""
    seed: NonNegativeInt = 1
    """Seed of every random decision."""
    steps: PositiveInt
    """Training steps of the stage."""
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
    cluster: ClusterConfig = ClusterConfig()

    @property
    def max_sequence_tokens(self) -> int:
        """Longest sequence of training and evaluation in tokens, prompt and response."""
        return self.data.max_prompt_tokens + max(self.rollout.max_response_tokens, self.eval.max_response_tokens)

    def fingerprint(self) -> str:
        """Hash every setting that changes the numbers of a run; a resume compares the result."""
        settings = self.model_dump(mode="json", exclude={"output", "steps", "checkpoint", "log", "eval", "cluster"})
        settings["actor"].pop("parallel")
        settings["reward"].pop("url")
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
