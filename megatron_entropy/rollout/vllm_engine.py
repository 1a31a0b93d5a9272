"""A vLLM engine in its own process. The pool makes it a Ray actor; only this file uses vLLM's inference API.

vLLM and torch are imported when an engine is created, not when this file is imported: importing vLLM takes seconds and
initializes torch.distributed, which the trainer's process does itself.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from megatron_entropy.config.architecture import read_architecture
from megatron_entropy.config.schema import RolloutConfig
from megatron_entropy.errors import EngineDied, MissingPackageError
from megatron_entropy.imports import fast_imports
from megatron_entropy.records import Alternatives
from megatron_entropy.rollout.engine import Completion, EngineSpec, GenerationUpdate, Request
from megatron_entropy.rollout.entropy import ROW, EntropyTable, uncut_logprobs
from megatron_entropy.rollout.vllm_core import CoreCalls, EngineLog

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams

UPDATE_SECONDS = 0.25
"""Time between two updates of a generation."""
GIB = 2**30
KV_BLOCK = 128
"""Tokens of a block of the KV cache; vLLM has the same on a CPU, or fewer."""


class VllmEngine:
    """A vLLM engine that starts with random weights and refuses to generate before it has received others.

    Args:
        spec: the model and the device.
        config: parallelism, memory and batch size.
        threads: OpenMP threads on a CPU.
    Raises:
        MissingPackageError: when vLLM is not installed.
        EngineDied: when vLLM's core cannot start, with the cause.
    """

    def __init__(self, spec: EngineSpec, config: RolloutConfig, threads: int = 1) -> None:
        self._spec = spec
        self._records_entropy = config.entropy
        self._num_alternatives = config.top_alternatives
        self._has_weights = False
        self._num_added = 0
        self._awake = {"weights", "kv_cache"}
        _prepare_environment(spec, threads)
        if config.entropy:  # the two model runners of vLLM have different logits processors
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if spec.device == "cuda" else "0"
        with fast_imports():
            try:
                from vllm.v1.engine.llm_engine import LLMEngine
            except ImportError as error:
                raise MissingPackageError(f"rollout needs vLLM, which cannot be imported here: {error}") from error
            from megatron_entropy.rollout import vllm_receiver

            vllm_receiver.register()
            log = EngineLog()
            try:  # imports the model and its layers
                self._engine = LLMEngine.from_engine_args(_engine_args(spec, config))
            except RuntimeError as error:
                raise EngineDied(log.explain(error)) from error
        self._core = CoreCalls(self._engine, log)
        if executor := getattr(self._engine, "model_executor", None):
            executor.register_failure_callback(lambda: os._exit(1))  # also while a call waits for the dead worker

    def ready(self) -> int:
        """Return the process id once the engine can be used."""
        return os.getpid()

    def generate_stream(self, requests: Sequence[Request]) -> Iterator[GenerationUpdate]:
        """Answer all requests, each as soon as it is finished; yields an update at least once a second.

        Raises:
            RuntimeError: when the engine has received no weights since it was created or since a failed weight sync.
        """
        if not self._has_weights:
            raise RuntimeError("the engine has no weights yet; sync them first")
        from vllm.inputs import TokensPrompt

        by_id: dict[str, tuple[int, Request]] = {}
        for row, request in enumerate(requests):
            longest = len(request.tokens) + request.max_tokens
            assert longest <= self._spec.max_model_len, f"{request.key}: {longest} > {self._spec.max_model_len} tokens"
            self._num_added += 1
            by_id[str(self._num_added)] = (row, request)
            prompt = TokensPrompt(prompt_token_ids=list(request.tokens))
            self._engine.add_request(str(self._num_added), prompt, self._sampling(request, row))
        longest = max((request.max_tokens for request in requests), default=0)
        table = EntropyTable(len(requests), longest) if self._records_entropy else None
        finished: list[RequestOutput] = []

        def update() -> GenerationUpdate:
            if table is not None:
                table.add(self._on_workers("read_entropy"))
            return GenerationUpdate(
                [_completion(*by_id[output.request_id], output, table, self._num_alternatives) for output in finished]
            )

        last_update = time.monotonic()
        while self._engine.has_unfinished_requests():
            finished += self._step()
            if time.monotonic() - last_update > UPDATE_SECONDS:
                yield update()
                finished, last_update = [], time.monotonic()
        yield update()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Join a transfer group."""
        self._on_workers("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> None:
        """Prepare the model for new weights; it cannot generate before `finish_weight_update`."""
        self._has_weights = False
        self._on_workers("begin_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> float:
        """Receive all weights; returns the seconds spent loading them into the model."""
        self._on_workers("update_weights", update_info)
        return max(self._on_workers("load_seconds"))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Use the received weights from now on; drop the prefix cache of the old ones."""
        self._on_workers("finish_weight_update")
        self._engine.reset_prefix_cache()
        self._has_weights = True

    def weight_checksums(self) -> list[dict[str, int]]:
        """Compute the checksum of every tensor that each worker uses, by vLLM's name of it; slow."""
        return self._on_workers("weight_checksums")

    def sleep(self) -> None:
        """Free the GPU memory, weights included (vLLM's level 2); nothing on a CPU. Not yet run on a GPU."""
        if self._spec.device == "cpu" or not self._awake:
            return
        if len(self._awake) == 1:  # a weight sync failed; vLLM can only sleep when both kinds are awake
            self._engine.wake_up()
        self._engine.sleep(level=2)
        self._awake.clear()
        self._has_weights = False

    def wake(self, tag: Literal["weights", "kv_cache"]) -> None:
        """Allocate memory of one kind again; the weights must then be synced. Nothing on a CPU."""
        if self._spec.device == "cuda" and tag not in self._awake:
            self._engine.wake_up(tags=[tag])
            self._awake.add(tag)

    def _on_workers(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method on every worker.

        Raises:
            EngineDied: when vLLM's core is dead, with the cause.
            Fault: the first one of a worker; one that says more than a broken connection, if there is any.
        """
        from megatron_entropy.errors import TransportError

        try:
            answers = self._core.run(self._engine.collective_rpc, "attempt", args=(method, arguments))
        except Exception:
            if getattr(getattr(self._engine, "model_executor", None), "is_failed", False):
                os._exit(1)  # without one of its workers the engine is dead, and the pool must notice
            raise
        faults = [fault for _, fault in answers if fault is not None]
        for fault in sorted(faults, key=lambda fault: isinstance(fault, TransportError)):
            raise fault
        return [answer for answer, _ in answers]

    def _step(self) -> list[RequestOutput]:
        outputs = self._core.run(self._engine.step)
        return cast("list[RequestOutput]", outputs)  # a pooling model's outputs are of another type

    def _sampling(self, request: Request, row: int) -> SamplingParams:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        num_top = max(int(self._records_entropy and _is_cut(request)), self._num_alternatives)
        return SamplingParams(
            seed=request.seed,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            repetition_penalty=request.repetition_penalty,
            max_tokens=request.max_tokens,
            stop_token_ids=list(self._spec.eos_ids),
            logprobs=num_top,  # besides the sampled token, the most probable ones
            extra_args={ROW: row} if self._records_entropy else None,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )


def _prepare_environment(spec: EngineSpec, threads: int) -> None:
    # Ray passes torchrun's variables on to this process. With TORCHELASTIC_USE_AGENT_STORE vLLM's own
    # torch.distributed would wait for a store server that nobody starts.
    for name in list(os.environ):
        if name.startswith(("TORCHELASTIC_", "ROLE_", "GROUP_")) or name in _TORCHRUN_NAMES:
            del os.environ[name]
    os.environ["VLLM_LOGGING_LEVEL"] = os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # errors as objects, between the engine's own processes
    if spec.device == "cpu":
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ["OMP_NUM_THREADS"] = str(threads)
        # Threads that spin while they wait make an engine many times slower when other processes use the cores.
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        # Otherwise vLLM reserves a core per worker and refuses to start when too few are left.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        # Huge pages: a weight sync allocates as much memory as the model, which is three times faster with them.
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
        # vLLM would compile the rank of a sampled token, which is not used: two seconds and a C++ compiler.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"


_TORCHRUN_NAMES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def _engine_args(spec: EngineSpec, config: RolloutConfig) -> EngineArgs:
    from vllm.engine.arg_utils import EngineArgs

    common: dict[str, Any] = {
        "model": spec.model_folder,
        "runner": "generate",  # a config.json without `architectures` would become a pooling model
        "skip_tokenizer_init": True,  # prompts are token ids
        "load_format": "dummy",  # the trainer sends the weights
        "dtype": spec.dtype,
        "max_model_len": spec.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "tensor_parallel_size": config.tensor_parallel,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",  # not the model folder's sampling settings
        "weight_transfer_config": {"backend": "megatron_entropy"},  # rollout/vllm_receiver.py
        "worker_extension_cls": "megatron_entropy.rollout.vllm_receiver.Worker",
        "disable_log_stats": True,
        "seed": 0,
    }
    if config.entropy:
        common["logits_processors"] = [_entropy_processor(spec.device)]
    if spec.device == "cuda":
        return EngineArgs(
            **common,
            quantization=config.quantization or None,
            gpu_memory_utilization=config.gpu_memory_utilization,
            enable_sleep_mode=config.colocate,
        )
    return EngineArgs(
        **common,
        enforce_eager=True,
        distributed_executor_backend="uni" if config.tensor_parallel == 1 else "mp",
        kv_cache_memory_bytes=_kv_cache_bytes(spec, config),
        enable_prefix_caching=False,
        # For a prompt read in chunks vLLM rewinds the request's random generator, which a CPU generator cannot do.
        enable_chunked_prefill=False,
        max_num_batched_tokens=max(spec.max_model_len, 4096),
    )


def _kv_cache_bytes(spec: EngineSpec, config: RolloutConfig) -> int:
    """Return the bytes of a worker's KV cache on a CPU: the configured ones, or what its sequences can fill.

    vLLM writes zeros to all of it when it starts, a second for each GiB.
    """
    arch = read_architecture(spec.model_folder)
    heads = max(1, arch.num_query_groups // config.tensor_parallel)
    size = 2 if spec.dtype == "bfloat16" else 4
    blocks = config.max_num_seqs * -(-spec.max_model_len // KV_BLOCK) + 2  # one is vLLM's own, one is a reserve
    full = blocks * KV_BLOCK * arch.num_layers * 2 * heads * arch.head_dim * size
    return min(config.kv_cache_gib * GIB, full)


def _entropy_processor(device: str) -> str:
    """Return the logits processor that records entropies, in vLLM's notation.

    Raises:
        MissingPackageError: when this version of vLLM lacks its base class.
    """
    module = "megatron_entropy.rollout." + ("vllm_entropy_v2" if device == "cuda" else "vllm_entropy")
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            f"rollout.entropy=true needs a vLLM with logits processors for its sampler, as 0.32 has: {error}; "
            "update vLLM or set it to false"
        ) from None
    return f"{module}:EntropyProcessor"


def _is_cut(request: Request) -> bool:
    """Whether a request samples from a part of the vocabulary."""
    return request.top_p < 1 or request.top_k > 0


def _completion(
    row: int, request: Request, output: RequestOutput, table: EntropyTable | None, num_alternatives: int
) -> Completion:
    answer = output.outputs[0]
    tokens = np.array(answer.token_ids, np.int32)
    flat: Any = answer.logprobs
    has_top = table is not None and _is_cut(request)
    num_columns = 1 + max(has_top, num_alternatives)  # the sampled token, then the most probable ones
    assert len(flat.logprobs) == len(tokens) * num_columns, f"{request.key}: {len(tokens)}, {len(flat.logprobs)}"
    if answer.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended request {request.key} with {answer.finish_reason!r}")
    logprobs = np.array(flat.logprobs, np.float32).reshape(-1, num_columns)
    sampled = logprobs[:, 0].copy()
    alternatives = None
    if num_alternatives:
        columns = slice(1, 1 + num_alternatives)
        ids = np.array(flat.token_ids, np.int32).reshape(-1, num_columns)
        alternatives = Alternatives(ids[:, columns].copy(), logprobs[:, columns].copy())
    if table is None:
        return Completion(request.key, tokens, sampled, answer.finish_reason, alternatives=alternatives)
    entropy, top = table.response(row, len(tokens))
    uncut = uncut_logprobs(sampled, logprobs[:, 1].copy(), top) if has_top else sampled
    return Completion(request.key, tokens, sampled, answer.finish_reason, entropy, uncut, alternatives)
