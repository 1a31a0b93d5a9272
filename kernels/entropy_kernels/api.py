"""The two front doors: statistics from hidden states and from logits that already exist."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from . import checks, reference
from .collectives import locate
from .head import TokenStatsFunction
from .logits import LogitStatsFunction
from .prepare import Settings, masked, prepare
from .records import TokenStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DEFAULT_SAVE_BUDGET = 1 << 30
"""Bytes that save="auto" may spend on saved logits per call."""


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    group: ProcessGroup | None = None,
    sequence_parallel: bool = False,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    entropy: bool = True,
    entropy_grad: bool = True,
    varentropy: bool = False,
    teacher_temperature: float | Tensor | None = None,
    top_k: int = 0,
    softcap: float | None = None,
    impl: str = "auto",
    save: str = "recompute",
    save_budget: int = DEFAULT_SAVE_BUDGET,
    skip_mass: float = 0.0,
    main_grad: Tensor | None = None,
    compact: bool = True,
    row_chunk: int | None = None,
    vocab_tile: int | None = None,
    validate: bool = False,
) -> TokenStats:
    """Log-prob, entropy and more of `softmax(hidden @ weight^T / temperature)`, without logits.

    Args:
        hidden: [T, H], or [T/tp, H] with `sequence_parallel`.
        weight: [V/tp, H], this rank's rows of the output embedding; same dtype as hidden.
        target: [T] int64 ids in the whole vocabulary, or `ignore_index`.
        temperature: > 0, one number or [T].
        group: tensor-parallel group over which the vocabulary is split; None: not split. Every
            rank of it must pass the same tokens.
        sequence_parallel: hidden is split over the group; it is gathered, and its gradient
            reduce-scattered. Without it the gradient is all-reduced.
        vocab_size: true size over all shards; later rows are padding and never count.
        ignore_index: rows with this target are not computed: outputs 0, no gradient.
        entropy: compute the entropy.
        entropy_grad: let gradient flow through the entropy.
        varentropy: compute Var[log p].
        teacher_temperature: a second temperature (one number or [T]) that defines the
            self-teacher q = softmax(logits / teacher_temperature).
        top_k: also return the k largest log-probs and their ids.
        softcap: logits become `softcap * tanh(logits / softcap)` before any temperature.
        impl: "reference", "chunked", "triton" or "auto" (triton on CUDA where it is installed).
        save: "recompute" keeps no logits; "half" keeps float16(logit - tile maximum), which
            spares backward one product in three; "auto" is "half" for 16-bit inputs whose
            saved logits fit in `save_budget`, else "recompute".
        save_budget: bytes "auto" may spend.
        skip_mass: probability in [0, 1). Backward leaves out a row's tile of `vocab_tile` columns
            that holds less than this and neither the target nor a top-k id; what a row lost is
            returned as `skipped_mass`, which bounds the error of its gradient (README). 0 is exact.
        main_grad: float32 [V/tp, H]; the weight gradient is added here instead of returned.
        compact: drop ignored rows before forward and rows without gradient before backward. On a
            GPU each drop reads one count back (a synchronisation); False computes every row,
            with the same results, and never waits (CUDA graphs).
        row_chunk: rows of a tile; None: a good size.
        vocab_tile: columns of a tile; None: a good size.
        validate: also run the checks that must wait for the device.

    Returns:
        TokenStats with [T] float32 values (float64 for float64 inputs).

    Raises:
        ValueError: an argument does not fit; the message names it and the numbers.

    Source:
        The entropy contract and every formula are in the library's README.
    """
    settings = Settings.of(locals(), from_logits=False)
    checks.check_operands(hidden, weight)
    checks.check_main_grad(main_grad, weight)
    vocab_size = checks.check_vocabulary(vocab_size, weight.shape[0], group, validate)
    shard = locate(group, weight.shape[0], vocab_size)
    tokens = hidden.shape[0] * (shard.size if sequence_parallel else 1)
    call = prepare(hidden, tokens, target, shard, vocab_size, settings)
    if call.engine is None:
        values = reference.from_hidden(hidden, weight, call.request, vocab_size, call.sequence_parallel)
        return masked(values, call)
    results = TokenStatsFunction.apply(hidden, weight, call)
    return TokenStats(**dict(zip(call.outputs, results, strict=True)))


def token_stats_from_logits(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    entropy: bool = True,
    entropy_grad: bool = True,
    varentropy: bool = False,
    teacher_temperature: float | Tensor | None = None,
    top_k: int = 0,
    softcap: float | None = None,
    impl: str = "auto",
    compact: bool = True,
    row_chunk: int | None = None,
    vocab_tile: int | None = None,
    validate: bool = False,
) -> TokenStats:
    """The statistics of `token_stats` for logits [T, V/tp] that already exist.

    The logits are read only, and kept by reference for backward; their gradient has their dtype.
    Arguments, returned values and errors are those of `token_stats`.
    """
    settings = Settings.of(locals(), from_logits=True)
    checks.check_matrix("logits", logits)
    vocab_size = checks.check_vocabulary(vocab_size, logits.shape[1], group, validate)
    shard = locate(group, logits.shape[1], vocab_size)
    call = prepare(logits, logits.shape[0], target, shard, vocab_size, settings)
    if call.engine is None:
        return masked(reference.from_logits(logits, call.request, vocab_size), call)
    results = LogitStatsFunction.apply(logits, call)
    return TokenStats(**dict(zip(call.outputs, results, strict=True)))
