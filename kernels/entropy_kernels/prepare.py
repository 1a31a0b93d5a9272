"""From a caller's arguments to a checked `Call`; shared by both front doors."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from . import checks, chunked
from .head import OUTPUTS, Call, Engine
from .records import Request, Shard, TokenStats, accumulate_dtype


@dataclass(frozen=True)
class Settings:
    """Keyword arguments of `token_stats`; what has a default is fixed for logits that exist."""

    temperature: float | Tensor
    teacher_temperature: float | Tensor | None
    ignore_index: int
    entropy: bool
    entropy_grad: bool
    varentropy: bool
    top_k: int
    softcap: float | None
    impl: str
    compact: bool
    row_chunk: int | None
    vocab_tile: int | None
    validate: bool
    from_logits: bool
    sequence_parallel: bool = False
    save: str = "recompute"
    save_budget: int = 0
    skip_mass: float = 0.0
    main_grad: Tensor | None = None

    @classmethod
    def of(cls, arguments: dict[str, Any], from_logits: bool) -> Settings:
        """The settings among a front door's arguments."""
        names = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in arguments.items() if k in names}, from_logits=from_logits)

    def outputs(self) -> tuple[str, ...]:
        """Names of the statistics asked for, in the order of OUTPUTS."""
        asked = {"logprob"}
        asked |= {"entropy"} if self.entropy else set()
        asked |= {"varentropy"} if self.varentropy else set()
        if self.teacher_temperature is not None:
            asked |= {"teacher_logprob", "teacher_entropy", "kl_forward", "kl_reverse"}
        asked |= {"topk_logprobs", "topk_ids"} if self.top_k else set()
        asked |= {"skipped_mass"} if self.skip_mass else set()
        return tuple(name for name in OUTPUTS if name in asked)


def prepare(source: Tensor, tokens: int, target: Tensor, shard: Shard, vocab_size: int, settings: Settings) -> Call:
    """Check everything per-token and build the call; `source` is hidden or logits."""
    device, dtype = source.device, accumulate_dtype(source.dtype)
    look = settings.validate or device.type == "cpu"
    checks.check_target(target, tokens, device)
    checks.check_temperature("temperature", settings.temperature, tokens, device, look)
    if settings.teacher_temperature is not None:
        checks.check_temperature("teacher_temperature", settings.teacher_temperature, tokens, device, look)
    checks.check_options(
        vocab_size=vocab_size,
        top_k=settings.top_k,
        softcap=settings.softcap,
        impl=settings.impl,
        save=settings.save,
        skip_mass=settings.skip_mass,
        compact=settings.compact,
        row_chunk=settings.row_chunk,
        vocab_tile=settings.vocab_tile,
    )
    if look:
        checks.check_target_values(target, settings.ignore_index, vocab_size)
    for name, given in (("main_grad", settings.main_grad is not None), ("skip_mass", settings.skip_mass > 0)):
        if given and settings.impl == "reference":
            raise ValueError(f"{name} is not supported by impl='reference'")
    teacher = settings.teacher_temperature
    request = Request(
        shard=shard,
        labels=target.to(torch.int64) - shard.start,
        beta=_inverse(settings.temperature, dtype),
        teacher_beta=None if teacher is None else _inverse(teacher, dtype),
        want_entropy=settings.entropy or settings.varentropy or teacher is not None,
        want_variance=settings.varentropy,
        topk=settings.top_k,
        softcap=settings.softcap,
        row_chunk=settings.row_chunk,
        vocab_tile=settings.vocab_tile,
        save=_saves(settings, source.dtype, 2 * tokens * shard.valid),
        skip_mass=settings.skip_mass,
    )
    return Call(
        request=request,
        keep=target != settings.ignore_index,
        outputs=settings.outputs(),
        entropy_grad=settings.entropy_grad,
        sequence_parallel=settings.sequence_parallel and shard.size > 1,
        main_grad=settings.main_grad,
        engine=engine(settings, source),
        compact=settings.compact,
    )


def _inverse(temperature: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    if isinstance(temperature, Tensor):
        return 1.0 / temperature.detach().to(dtype)
    return 1.0 / float(temperature)


def _saves(settings: Settings, dtype: torch.dtype, size: int) -> bool:
    if not torch.is_grad_enabled():
        return False
    if settings.save == "auto":
        return dtype in (torch.bfloat16, torch.float16) and size <= settings.save_budget
    return settings.save == "half"


def engine(settings: Settings, source: Tensor) -> Engine | None:
    """The module that computes tiles; None stands for the reference."""
    if settings.impl == "reference":
        return None
    if not _triton_serves(settings.impl, source, _settings_obstacle(settings) or _triton_obstacle(source)):
        return chunked
    from . import triton_engine

    return triton_engine


def uses_triton(impl: str, *sources: Tensor) -> bool:
    """Whether `impl` ("chunked", "triton" or "auto") makes Triton's kernels serve these hidden states."""
    if impl not in ("chunked", "triton", "auto"):
        raise ValueError(f"impl is {impl!r}; known: chunked, triton, auto")
    return _triton_serves(impl, sources[0], next(filter(None, map(_triton_obstacle, sources)), None))


def _triton_serves(impl: str, source: Tensor, obstacle: str | None) -> bool:
    """Whether Triton computes; "auto" leaves it alone where only its interpreter could."""
    if impl == "triton" and obstacle is not None:
        raise ValueError(f"impl is 'triton', but {obstacle}")
    return impl == "triton" or (impl == "auto" and obstacle is None and source.is_cuda)


def _triton_obstacle(source: Tensor) -> str | None:
    """Why Triton cannot serve these hidden states; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not source.is_cuda and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return f"hidden is on {source.device} (CPU needs TRITON_INTERPRET=1)"
    if source.dtype == torch.float64:
        return "hidden is float64; its statistics are float32"
    return None


def _settings_obstacle(settings: Settings) -> str | None:
    """What of a call the Triton kernels do not offer; None if nothing."""
    if settings.from_logits:
        return "token_stats_from_logits has no Triton kernel"
    if settings.top_k:
        return f"top_k is {settings.top_k}; its kernels have no top-k"
    if settings.skip_mass:
        return f"skip_mass is {settings.skip_mass}; its kernels compute every tile"
    return None


def masked(values: dict[str, Tensor], call: Call) -> TokenStats:
    """The reference's values as a TokenStats: ignored rows 0, gradients as the call says."""
    results = {}
    for name in call.outputs:
        value = values[name]
        keep = call.keep if value.dim() == 1 else call.keep[:, None]
        value = torch.where(keep, value, torch.zeros_like(value))
        detach = name == "entropy" and not call.entropy_grad
        results[name] = value.detach() if detach else value
    return TokenStats(**results)
