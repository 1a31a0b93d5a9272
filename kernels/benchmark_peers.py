"""The contestants of benchmark.py: each computes log-prob and entropy and leaves both gradients.

A contestant is made by a function of a Case; it raises Unavailable with the reason where it cannot
run. Peers are called through their public functions, with their default settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import entropy_kernels as ek

Outputs = tuple[Tensor, Tensor | None]
Contestant = Callable[[Tensor, Tensor], Outputs]


class Unavailable(Exception):
    """Why a contestant cannot run here."""


@dataclass(frozen=True)
class Case:
    """The problem all contestants solve; target is [T] with -100 on masked rows."""

    target: Tensor
    group: dist.ProcessGroup
    tp: int
    device: torch.device
    dtype: torch.dtype
    peaked: bool
    """Whether few tokens hold nearly all probability."""

    @property
    def labels(self) -> Tensor:
        """Targets with 0 on masked rows, for contestants without an ignore index."""
        return self.target.clamp(min=0)

    def needs_gpu(self, what: str) -> None:
        """Raise unless the tensors are on a GPU."""
        if self.device.type != "cuda":
            raise Unavailable(f"{what} is a GPU kernel; the tensors are on {self.device}")

    def needs_one_rank(self, what: str) -> None:
        """Raise if the vocabulary is split."""
        if self.tp > 1:
            raise Unavailable(f"{what} has no vocabulary-parallel form; tp is {self.tp}")


def _ours(**options: Any) -> Callable[[Case], Contestant]:
    def make(case: Case) -> Contestant:
        if options.get("impl") == "triton":
            case.needs_gpu("impl='triton'")
        if options.get("impl") == "reference":
            case.needs_one_rank("the benchmark of impl='reference'")
        if options.get("skip_mass") and not case.peaked:
            raise Unavailable("skip_mass finds no light tiles among random logits; see --peaked")

        def run(hidden: Tensor, weight: Tensor) -> Outputs:
            stats = ek.token_stats(hidden, weight, case.target, group=case.group, **options)
            return stats.logprob, stats.entropy

        return run

    return make


def plain_torch(case: Case) -> Contestant:
    """float32 logits, log_softmax and autograd."""
    case.needs_one_rank("plain torch")

    def run(hidden: Tensor, weight: Tensor) -> Outputs:
        logp = torch.log_softmax((hidden @ weight.t()).float(), dim=1)
        return logp.gather(1, case.labels[:, None])[:, 0], -(logp.exp() * logp).sum(dim=1)

    return run


def verl_pair(case: Case) -> Contestant:
    """verl's vocab_parallel_entropy and vocab_parallel_log_probs_from_logits, as its engine does."""
    try:
        from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
        from verl.utils.megatron.tensor_parallel import (
            vocab_parallel_entropy,
            vocab_parallel_log_probs_from_logits,
        )
    except ImportError as error:
        raise Unavailable(f"not installed: {error}") from error

    def run(hidden: Tensor, weight: Tensor) -> Outputs:
        logits = copy_to_tensor_model_parallel_region(hidden) @ weight.t()
        copy = logits.clone()
        entropy = vocab_parallel_entropy(logits)
        return vocab_parallel_log_probs_from_logits(copy, case.labels), entropy

    return run


def verl_triton(case: Case) -> Contestant:
    """verl's fused linear cross entropy."""
    case.needs_gpu("verl linear_cross_entropy")
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def run(hidden: Tensor, weight: Tensor) -> Outputs:
        return tuple(linear_cross_entropy(hidden, weight, case.labels, 1.0, "none", case.group))

    return run


def verl_torch(case: Case) -> Contestant:
    """verl's FusedLinearForPPO, torch backend, 512-token chunks."""
    case.needs_one_rank("verl FusedLinearForPPO")
    try:
        from verl.utils.experimental.torch_functional import FusedLinearForPPO
    except ImportError as error:
        raise Unavailable(f"not installed: {error}") from error
    module = FusedLinearForPPO()
    return lambda hidden, weight: module(hidden, weight, case.labels)


def trl_logits(case: Case) -> Contestant:
    """TRL's selective_log_softmax and entropy_from_logits on logits that are kept."""
    case.needs_one_rank("TRL selective_log_softmax")
    try:
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax
    except ImportError as error:
        raise Unavailable(f"not installed: {error}") from error

    def run(hidden: Tensor, weight: Tensor) -> Outputs:
        logits = hidden @ weight.t()
        logprob = selective_log_softmax(logits[None], case.labels[None])[0]
        return logprob, entropy_from_logits(logits)

    return run


def trl_chunked(case: Case) -> Contestant:
    """TRL's ChunkedLogProbFunction with the chunk size of its fused head."""
    case.needs_one_rank("TRL ChunkedLogProbFunction")
    try:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk
    except ImportError as error:
        raise Unavailable(f"not installed: {error}") from error

    def run(hidden: Tensor, weight: Tensor) -> Outputs:
        results = ChunkedLogProbFunction.apply(hidden, weight, None, case.labels, 1.0, chunk, None, 1.0, ("entropy",))
        return results[0], results[1]

    return run


def liger_scaled(case: Case) -> Contestant:
    """Liger's fused linear scaled cross entropy (its torch fallback on a CPU)."""
    case.needs_one_rank("LigerFusedLinearScaledCrossEntropyFunction")
    try:
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction
    except ImportError as error:
        raise Unavailable(f"not installed: {error}") from error

    def run(hidden: Tensor, weight: Tensor) -> Outputs:
        nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, case.target, 1.0, -100, 1, True)
        return -nll, entropy

    return run


def liger_flce(case: Case) -> Contestant:
    """Liger's fused linear cross entropy, per token (log-prob only)."""
    case.needs_gpu("Liger fused_linear_cross_entropy")
    case.needs_one_rank("Liger fused_linear_cross_entropy")
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def run(hidden: Tensor, weight: Tensor) -> Outputs:
        result = LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, case.target, None, None, -100, 0.0, 0.0, "none"
        )
        return -(result[0] if isinstance(result, tuple) else result), None

    return run


def liger_chunked(case: Case) -> Contestant:
    """Liger's chunked selective log-prob, the head of its PPO and GRPO losses (log-prob only)."""
    case.needs_one_rank("Liger chunked log-prob")
    try:
        from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction
    except ImportError as error:
        raise Unavailable(f"not installed: {error}") from error

    def run(hidden: Tensor, weight: Tensor) -> Outputs:
        logprob = _ChunkedSelectiveLogProbFunction.apply(hidden, weight, case.labels, None, 1.0, 4096)
        return logprob, None

    return run


def apple_cce(case: Case) -> Contestant:
    """Apple's cut-cross-entropy (log-prob only)."""
    case.needs_one_rank("cut-cross-entropy 25.1")
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise Unavailable(f"not installed: {error}") from error
    case.needs_gpu("cut-cross-entropy (impl='cce')")

    def run(hidden: Tensor, weight: Tensor) -> Outputs:
        return -linear_cross_entropy(hidden, weight, case.target, reduction="none"), None

    return run


CONTESTANTS: dict[str, Callable[[Case], Contestant]] = {
    "ours recompute": _ours(),
    "ours save=half": _ours(save="half"),
    "ours chunked": _ours(impl="chunked"),
    "ours skip_mass=1e-4": _ours(skip_mass=1e-4),
    "ours reference": _ours(impl="reference"),
    "plain torch": plain_torch,
    "verl pair": verl_pair,
    "verl fused triton": verl_triton,
    "verl fused torch": verl_torch,
    "trl logits": trl_logits,
    "trl chunked": trl_chunked,
    "liger scaled": liger_scaled,
    "liger flce": liger_flce,
    "liger chunked": liger_chunked,
    "apple cce": apple_cce,
}
