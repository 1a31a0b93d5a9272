"""What of `actor.performance` an actor uses on a machine, and why. torch is imported for GPUs only."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from megatron_entropy.config.schema import ActorConfig
from megatron_entropy.errors import ConfigError


@dataclass(frozen=True)
class Software:
    """What the choices depend on.

    `capability`: compute capability of the GPU, None without one. `apex_fusion`: Apex's extension
    `fused_weight_gradient_mlp_cuda` is there, which not every build of Apex has.
    """

    capability: tuple[int, int] | None
    transformer_engine: bool
    apex: bool
    apex_fusion: bool
    triton: bool

    @property
    def gpu(self) -> bool:
        """Whether there is a GPU."""
        return self.capability is not None

    @property
    def fused_layers(self) -> bool:
        """Whether the model runs on Transformer Engine's layers."""
        return self.gpu and self.transformer_engine


@dataclass(frozen=True)
class Choice:
    """Whether something is used, and why. `problem`: the setting cannot be obeyed, with what to change."""

    is_active: bool
    reason: str
    problem: str = ""


def find_software(capability: tuple[int, int] | None) -> Software:
    """Look for the packages, without importing them.

    Args:
        capability: compute capability of the GPU, None without one.
    """
    names = ("transformer_engine", "apex", "fused_weight_gradient_mlp_cuda", "triton")
    return Software(capability, *(importlib.util.find_spec(name) is not None for name in names))


def choices(actor: ActorConfig, software: Software) -> dict[str, Choice]:
    """Return what a run uses, by the key of `PerformanceConfig` or the name of what has no key."""
    reduce = _overlap_grad_reduce(actor, software)
    engine, apex = software.fused_layers, software.gpu and software.apex
    plain = "no GPU" if not software.gpu else "Transformer Engine is not installed"
    return {
        "overlap_grad_reduce": reduce,
        "overlap_param_gather": _overlap_param_gather(actor, software, reduce),
        "fuse_grad_accumulation": _fuse_grad_accumulation(actor, software),
        "Triton head kernels": _head_kernels(actor, software),
        "fused rope, bias and SwiGLU": Choice(engine, "Transformer Engine's" if engine else plain),
        "fused AdamW": Choice(
            engine or apex,
            "Transformer Engine's or Apex's" if engine or apex else plain + "; Apex would help" * software.gpu,
        ),
        "weights stored in FP8": Choice(
            actor.fp8.parameters, f"actor.fp8.parameters={str(actor.fp8.parameters).lower()}"
        ),
        "recompute": Choice(actor.recompute != "none", f"actor.recompute={actor.recompute}"),
        "CUDA graphs": Choice(False, "every pack has its own length, and a graph has one"),
    }


def _overlap_grad_reduce(actor: ActorConfig, software: Software) -> Choice:
    asked = actor.performance.overlap_grad_reduce
    if asked != "auto":
        return Choice(asked, "as configured")
    if actor.parallel.dp * actor.parallel.cp == 1:
        return Choice(False, "there is one data and context parallel rank")
    return Choice(software.gpu, "hides the sum behind the backward pass" if software.gpu else "no GPU")


def _overlap_param_gather(actor: ActorConfig, software: Software, reduce: Choice) -> Choice:
    asked = actor.performance.overlap_param_gather
    missing = "" if reduce.is_active else "actor.performance.overlap_grad_reduce=true"
    if not actor.parallel.distributed_optimizer:
        missing = "actor.parallel.distributed_optimizer=true"
    if asked == "auto" and not software.gpu:
        return Choice(False, "no GPU")
    if asked == "auto":
        return Choice(not missing, f"needs {missing}" if missing else "hides the gather behind the forward pass")
    if asked and missing:
        return Choice(
            False, "", f"actor.performance.overlap_param_gather=true needs {missing}; set it, or leave it out"
        )
    return Choice(asked, "as configured")


def _fuse_grad_accumulation(actor: ActorConfig, software: Software) -> Choice:
    asked = actor.performance.fuse_grad_accumulation
    if not software.gpu:
        missing = "a GPU and Transformer Engine or Apex"
    elif not software.transformer_engine and not software.apex_fusion:
        missing = "Transformer Engine, or Apex built with --cuda_ext"
    elif actor.lora.rank:
        missing = "actor.lora.rank=0: frozen weights have no gradient"
    else:
        missing = ""
    if asked is True and missing:
        return Choice(False, "", f"actor.performance.fuse_grad_accumulation=true needs {missing}; leave it out")
    if asked == "auto":
        return Choice(not missing, f"needs {missing}" if missing else "saves a pass over every weight gradient")
    return Choice(asked, "as configured")


def _head_kernels(actor: ActorConfig, software: Software) -> Choice:
    if actor.performance.head_kernels == "chunked":
        return Choice(False, "actor.performance.head_kernels=chunked")
    if software.capability is None or not software.triton:
        return Choice(False, "Triton is not installed" if software.gpu else "no GPU")
    from entropy_kernels.checks import uncovered

    problem = uncovered(software.capability)
    if problem and actor.dtype != "float32":  # whose tiles are small
        return Choice(False, problem, f'actor.performance.head_kernels="auto": {problem}; set it to "chunked"')
    return Choice(True, "statistics and divergences without logits")


def resolve(config: ActorConfig) -> dict[str, Choice]:
    """Return what the actor uses.

    Raises:
        ConfigError: a setting cannot be obeyed.
    """
    import torch

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    found = choices(config, find_software(capability))
    for choice in found.values():
        if choice.problem:
            raise ConfigError(choice.problem)
    return found


def describe(config: ActorConfig) -> str:
    """Say in one line what is active, and why the rest is not."""
    found = resolve(config)
    active = [name for name, choice in found.items() if choice.is_active]
    others = [f"{name} ({choice.reason})" for name, choice in found.items() if not choice.is_active]
    return f"performance: active: {', '.join(active) or 'nothing'}; not: {', '.join(others)}"
