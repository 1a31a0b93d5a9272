"""What the GPU cases compute, on any device: tests/unit/test_gpu_cases.py runs them small on a CPU.

Models have random weights of a published shape, so no network is needed.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from megatron_entropy.config.architecture import read_architecture
from megatron_entropy.config.fp8 import Fp8Config
from megatron_entropy.config.schema import ActorConfig, OptimizerConfig, ParallelConfig
from megatron_entropy.distributed import process_groups
from megatron_entropy.records import HeadInputs, Sample

QWEN_05B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
"""Shape of Qwen2.5-0.5B."""
TINY = {**QWEN_05B, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 301}  # fmt: skip

PEAK_TFLOPS = {"H100": 989, "H200": 989, "B200": 2250, "A100": 312}
"""Dense bfloat16 TFLOP/s of the SXM boards in NVIDIA's data sheets, by a part of the device's name."""


def write_model(folder: Path, shape: dict[str, Any], device: torch.device) -> Path:
    """Write a Hugging Face folder with random weights (no tokenizer)."""
    from safetensors.torch import save_file

    from megatron_entropy.weights import names

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape))
    generator = torch.Generator(device=device).manual_seed(0)
    tensors = {}
    for entry in names.entries(read_architecture(folder)):
        for name, size in zip(entry.tensors, entry.shapes, strict=True):
            if len(size) == 1:
                tensors[name] = torch.zeros(size) if name.endswith("bias") else torch.ones(size)
            else:
                tensors[name] = (0.02 * torch.randn(size, generator=generator, device=device)).cpu()
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def make_samples(vocab_size: int, count: int, length: int) -> list[Sample]:
    """Random tokens with the weights of a mean over all of them."""
    rng = np.random.default_rng(0)
    response = length - 8
    fields = {"weight": np.r_[np.zeros(8), np.full(response, 1 / (count * response))].astype(np.float32)}
    return [
        Sample(rng.integers(0, vocab_size, length).astype(np.int32), 8, "length", "", **fields) for _ in range(count)
    ]


def write_responses(dump: Path, folder: Path, *, count: int, length: int) -> None:
    """Write a rollout dump with responses of random tokens of a model's vocabulary."""
    samples = make_samples(read_architecture(folder).vocab_size, count, length)
    lines = (
        {"prompt": index, "question": "", "response": "", "tokens": sample.tokens.tolist(), "prompt_length": 8,
         "finish_reason": "length"}
        for index, sample in enumerate(samples)
    )  # fmt: skip
    dump.write_text("".join(json.dumps(line) + "\n" for line in lines))


def build_actor(
    folder: Path, *, dtype: Any, recipe: Any = "", parameters: bool = False, tokens: int, lr: float = 1e-4
) -> Any:
    """Build an actor on one rank with a folder's weights; `parameters`: stored in FP8."""
    from megatron_entropy.actor.actor import Actor
    from megatron_entropy.weights.hf_folder import TensorFolder
    from megatron_entropy.weights.source import load

    config = ActorConfig(
        dtype=dtype, fp8=Fp8Config(recipe=recipe, parameters=parameters), optimizer=OptimizerConfig(lr=lr),
        parallel=ParallelConfig(distributed_optimizer=parameters), max_tokens_per_microbatch=tokens,
    )  # fmt: skip
    process_groups.init_model_parallel(config.parallel, seed=1)
    actor = Actor(read_architecture(folder), config, total_updates=100)
    load(TensorFolder(str(folder)), actor.arch, config.parallel, actor.named_shards(), copy=actor.loader.copy)
    actor.after_load()
    return actor


def release(actor: Any) -> None:
    """Free an actor's memory for the next case."""
    from megatron_entropy.distributed import memory

    actor.close()
    memory.release()


@contextlib.contextmanager
def plain_layers() -> Iterator[None]:
    """Build and run the model without Transformer Engine: the layers that the CPU tests prove."""
    from megatron_entropy.actor import model

    with mock.patch.object(model, "has_transformer_engine", lambda: False):
        yield


def actor_error(folder: Path, *, count: int, length: int) -> dict[str, float]:
    """Compare bfloat16 scores, on Transformer Engine where it is, with the plain layers in float32 on one device."""
    from megatron_entropy.actor.statistics import policy_statistics

    samples = make_samples(read_architecture(folder).vocab_size, count, length)

    def score(dtype: str) -> np.ndarray:
        actor = build_actor(folder, dtype=dtype, tokens=count * length)
        scored = actor.score(samples, policy_statistics(temperature=1.0))
        release(actor)
        columns = [[s.response("logprob"), s.response("entropy")] for s in scored]
        return np.concatenate(columns, axis=1)

    found = score("bfloat16")
    with plain_layers():
        expected, same_type = score("float32"), score("bfloat16")
    figures = {}
    for name, a, b, plain in zip(("logprob", "entropy"), found, expected, same_type, strict=True):
        figures[f"{name} bias"] = float((a - b).mean())
        figures[f"{name} sd"] = float((a - b).std())
        figures[f"{name} sd of plain bfloat16"] = float((plain - b).std())
    return figures


def training_curve(
    folder: Path,
    *,
    dtype: str,
    recipe: str,
    parameters: bool = False,
    steps: int,
    count: int,
    length: int,
    device: torch.device,
) -> dict[str, Any]:
    """Train on one batch again and again: losses, tokens/s after two warm-up steps, MFU and peak memory."""
    actor = build_actor(folder, dtype=dtype, recipe=recipe, parameters=parameters, tokens=count * length)
    samples = make_samples(actor.arch.vocab_size, count, length)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    losses, seconds = [], []
    for _ in range(steps):
        start = time.perf_counter()
        metrics = actor.update(samples, lambda stats, batch: (-stats.logprob, {}), temperature=1.0)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(metrics["train/loss"].value)
    rate = count * length / float(np.median(seconds[2:] or seconds))
    flops = rate * flops_per_token(actor.arch, length)
    release(actor)
    return {
        "losses": [round(loss, 4) for loss in losses],
        "tokens/s": rate,
        "TFLOP/s": flops / 1e12,
        "MFU": mfu(flops, device),
        "peak GB": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
    }


def flops_per_token(arch: Any, length: int) -> float:
    """Training FLOPs a token: 6 for each weight of a matrix product (head included) and causal attention's products."""
    head = arch.padded_vocab_size * arch.hidden_size
    matrices = arch.num_parameters - (0 if arch.tied_embeddings else head)  # reading an embedding is no product
    attention = arch.num_layers * arch.num_heads * arch.head_dim * length / 2
    return 6.0 * matrices + 12.0 * attention


def mfu(flops_per_second: float, device: torch.device) -> float | None:
    """Fraction of the device's dense bfloat16 peak, also for FP8; None for a device that `PEAK_TFLOPS` lacks."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
    return flops_per_second / (peak * 1e12) if peak else None


def kernel_forms(
    device: torch.device, *, tokens: int, hidden: int, vocab: int, setting: Callable[[str, str], None]
) -> dict[str, Any]:
    """Milliseconds of both forms of the forward kernel and of the timed choice, and their results' largest difference.

    Args:
        setting: Set an environment variable.
    """
    import entropy_kernels as ek

    generator = torch.Generator(device).manual_seed(0)
    states = torch.randn(tokens, hidden, generator=generator, device=device).bfloat16()
    weight = (torch.randn(vocab, hidden, generator=generator, device=device) * 2 / hidden**0.5).bfloat16()
    target = torch.randint(vocab, (tokens,), generator=generator, device=device)
    figures: dict[str, Any] = {}
    values = {}
    for name, value in (("plain", "0"), ("specialized", "1"), ("timed", "auto")):
        setting("ENTROPY_KERNELS_SPECIALIZED", value)
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            values[name] = ek.token_stats(states, weight, target)
            values[name].entropy.sum().item()
            seconds.append(time.perf_counter() - start)
        figures[f"{name} ms"] = 1000 * float(np.median(seconds[1:]))
    differences = [
        (getattr(values["plain"], field) - getattr(values["specialized"], field)).abs().max().item()
        for field in ("logprob", "entropy")
    ]
    figures["largest difference"] = max(differences)
    return figures


def full_logits(head: HeadInputs) -> dict[str, torch.Tensor]:
    """Log-probability and entropy from the whole logits in float32: what the kernel saves."""
    logits = (head.hidden @ head.weight.T)[:, : head.vocab_size].float()
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, head.targets.clamp(min=0)[:, None])[:, 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    keep = head.targets >= 0
    return {"logprob": chosen * keep, "entropy": entropy * keep}


def score_cost(folder: Path, *, dtype: str, count: int, length: int, device: torch.device) -> dict[str, Any]:
    """Seconds and peak memory of `Actor.score`, by the kernel and from the whole logits."""
    from megatron_entropy.actor.statistics import policy_statistics

    actor = build_actor(folder, dtype=dtype, tokens=count * length)
    samples = make_samples(actor.arch.vocab_size, count, length)
    contestants: dict[str, Callable] = {"kernel": policy_statistics(temperature=1.0), "logits": full_logits}
    figures: dict[str, Any] = {}
    values = {}
    for name, statistics in contestants.items():
        seconds = []
        for attempt in range(4):
            if device.type == "cuda" and attempt == 1:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            scored = actor.score(samples, statistics)
            seconds.append(time.perf_counter() - start)
        values[name] = np.concatenate([sample.response("entropy") for sample in scored])
        figures[f"{name} seconds"] = float(np.median(seconds[1:]))
        figures[f"{name} peak GB"] = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    release(actor)
    figures["largest difference of entropy"] = float(np.abs(values["kernel"] - values["logits"]).max())
    assert math.isfinite(figures["largest difference of entropy"])
    return figures
