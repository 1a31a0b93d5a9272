"""Megatron-Core on machines without CUDA.

Megatron-Core reads the current CUDA device at about 175 call sites, writes `device="cuda"` literally, and keeps CUDA
random states and streams. `activate()` redirects these entry points of `torch.cuda` to the CPU, once per process and
before anything of `megatron.core` is imported. Where CUDA is present it does nothing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._device import _device_constructors

log = logging.getLogger(__name__)

_FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "rand", "randn", "empty_like", "zeros_like")
_CPU_TYPES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}
_active = False


def activate() -> bool:
    """Make Megatron-Core run on the CPU if there is no CUDA device.

    Returns:
        Whether the redirection is active; False where CUDA is present.
    """
    global _active
    if torch.cuda.is_available():
        return False
    if not _active:
        _active = True
        _redirect_devices()
        _redirect_random_state()
        _redirect_streams()
        _redirect_types()
        _redirect_experts()
        log.info("no CUDA device: Megatron-Core runs on the CPU (megatron_entropy/distributed/cpu.py)")
    return True


def device() -> torch.device:
    """The device of this rank: its CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def multiplies_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself (AMX-BF16 or AVX512-BF16)."""
    try:
        return bool({"amx_bf16", "avx512_bf16"} & set(Path("/proc/cpuinfo").read_text().split()))
    except OSError:
        return False


def _redirect_devices() -> None:
    cpu = torch.device("cpu")
    cuda: Any = torch.cuda
    cuda.current_device = lambda: cpu
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.set_device = lambda *args, **kwargs: None
    # `with torch.device(...)` (transformers loads under it) recognises factories by a list it builds on first use; the
    # list must contain the originals, or tensors created under it stay uninitialised on the wrong device.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    module: Any = torch.nn.Module
    module.cuda = lambda self, *args, **kwargs: self


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return create


def _redirect_random_state() -> None:
    def set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.random.set_rng_state(state)

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.random.get_rng_state()

    cuda: Any = torch.cuda
    cuda.get_rng_state = cuda.random.get_rng_state = get_state
    cuda.set_rng_state = cuda.random.set_rng_state = set_state
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda._lazy_call = lambda callback, **kwargs: callback()
    cuda.default_generators = _Generators()


class _Generators:
    """`torch.cuda.default_generators[anything]` is the CPU generator."""

    def __getitem__(self, index: object) -> torch.Generator:
        return torch.default_generator


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...


class _Stream:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, other: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self, event: object = None) -> _Event:
        return _Event()

    def synchronize(self) -> None: ...


def _redirect_streams() -> None:
    @contextlib.contextmanager
    def on_stream(stream: object) -> Iterator[None]:
        yield

    cuda: Any = torch.cuda
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.stream = on_stream
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _Stream()
    tensor: Any = torch.Tensor
    tensor.record_stream = lambda self, stream: None


def _redirect_types() -> None:
    """Let `type()` name a CUDA tensor: Megatron's optimizers accept no other parameters."""
    original = torch.Tensor.type

    def type_of(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        return _CPU_TYPES.get(result, result) if isinstance(result, str) else result

    tensor: Any = torch.Tensor
    tensor.type = type_of
    cuda: Any = torch.cuda
    cuda.FloatTensor, cuda.HalfTensor, cuda.BFloat16Tensor = torch.FloatTensor, torch.HalfTensor, torch.BFloat16Tensor


def _redirect_experts() -> None:
    """Supply what Megatron-Core's expert layers assume: a name of Transformer Engine's, split sizes on the host."""
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]
    exchange = dispatcher.all_to_all

    def all_to_all(group: Any, tensor: torch.Tensor, *split_sizes: Any, **options: Any) -> torch.Tensor:
        """Convert the split sizes to lists, which Megatron does only in its copy from the GPU."""
        lists = [s.tolist() if isinstance(s, torch.Tensor) else s for s in split_sizes]
        return exchange(group, tensor, *lists, **options)

    dispatcher.all_to_all = all_to_all
