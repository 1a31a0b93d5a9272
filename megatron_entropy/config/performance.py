"""The table `actor.performance`: what makes a step faster without changing its numbers."""

from __future__ import annotations

from typing import Literal

from megatron_entropy.config.types import Section

Switch = bool | Literal["auto"]


class PerformanceConfig(Section):
    """Speed of a training step; the numbers stay the same. `auto`: where it helps, which `doctor` and the log explain.

    Fused kernels of Transformer Engine need no setting; CUDA graphs are never used, because every pack has its own
    length.
    """

    overlap_grad_reduce: Switch = "auto"
    """Sum gradients over data and context parallel ranks while the backward pass goes on. `auto`: on GPUs with `dp` or
    `cp` above 1."""
    overlap_param_gather: Switch = "auto"
    """Gather updated weights while the next forward pass goes on, between the updates of a step. Needs
    `parallel.distributed_optimizer` and `overlap_grad_reduce`. `auto`: where both are on and on GPUs."""
    fuse_grad_accumulation: Switch = "auto"
    """Add weight gradients to the fp32 buffer inside the matrix product. Needs Transformer Engine, or Apex's
    `fused_weight_gradient_mlp_cuda` with plain layers. `auto`: where one is installed, without LoRA. The head's own
    kernels always do it."""
    head_kernels: Literal["auto", "chunked"] = "auto"
    """Code of the head's statistics and divergences: `auto` is Triton on a GPU and tiles in plain PyTorch on a CPU,
    `chunked` those tiles everywhere, for a GPU generation that the Triton kernels were not compiled for."""
